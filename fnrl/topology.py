"""Topology: stages of an architecture as values, composed by combinators. Weights flow down, products flow up.

A node has `init(run, key) -> state` and `step(run, state, weights) -> (state, product, info)`; `gather` and `restore`
turn its state into pure records and back. Keys are folded in along the path, so what a replica draws depends on where
it stands, not on when or where it runs.
"""

import dataclasses
import math
import time
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor

from fnrl import random
from fnrl.apply import apply_update, declared, first_algo
from fnrl.collect import CollectState, collect_rollout, first_state
from fnrl.errors import CheckpointError, CompositionError
from fnrl.lift import Run
from fnrl.merge import merge_infos, merge_moments, merge_rollouts, merge_updates
from fnrl.parts import Parts
from fnrl.record import host, record
from fnrl.types import Batches, Info, Rollout, Tree, Update, Weights


class Node(Protocol):
    """A stage of an architecture."""

    produces: ClassVar[str]

    def envs(self, parts: Parts) -> int:
        """Environments behind one product."""
        ...

    def check(self, parts: Parts) -> None:
        """Refuses parts whose sizes don't fit (CompositionError)."""
        ...

    def init(self, run: Run, key: Tensor) -> Any: ...

    def step(self, run: Run, state: Any, weights: Any) -> tuple[Any, Any, Info]: ...

    def gather(self, run: Run, state: Any) -> Any: ...

    def restore(self, run: Run, pure: Any) -> Any: ...

    def close(self, run: Run, state: Any) -> None: ...


def _fold(run: Run, key: Tensor, i: int) -> Tensor:
    return run.lift(random.fold_in)(key, i)


def _require(outer: str, node: Any, *products: str) -> None:
    made = getattr(node, "produces", None)
    if made is None or isinstance(node, type):
        raise CompositionError(f"{outer} takes a node such as collect or gradients(collect), got {node!r}")
    if made not in products:
        fits = {"rollouts": "collect", "updates": "gradients(collect)"}
        raise CompositionError(
            f"{outer} takes a node that produces {' or '.join(products)} (such as {fits[products[0]]}), "
            f"got {node!r}, which produces {made}"
        )


def _own(run: Run, node: Any, pure: Any, kind: type) -> None:
    """Refuses to restore the record of another node (CheckpointError)."""
    if not isinstance(pure, kind):
        raise CheckpointError(
            f"node {run.name} is {node!r}, but what was saved there is a {type(pure).__name__}, not a {kind.__name__}: "
            "give the scheme the topology it was saved with"
        )


def _as_many(run: Run, node: Any, saved: int, here: int, what: str) -> None:
    """Refuses to restore a record of another number of `what` (CheckpointError)."""
    if saved != here:
        raise CheckpointError(
            f"node {run.name} was saved with {saved} {what}, {node!r} has {here}: a run goes on with as many as it was "
            "begun with"
        )


# -- collect --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collect:
    """Produces rollouts: steps the environments with the present weights. The value is `collect`."""

    produces: ClassVar[str] = "rollouts"

    def __repr__(self) -> str:
        return "collect"

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise CompositionError("collect is a node as it stands: write gradients(collect), without brackets after it")

    def envs(self, parts: Parts) -> int:
        """One vector."""
        return parts.env.num_envs

    def check(self, parts: Parts) -> None:
        """Anything goes."""

    def init(self, run: Run, key: Tensor) -> CollectState:
        """Fresh episodes."""
        return first_state(run, key)

    def step(self, run: Run, state: CollectState, weights: Weights) -> tuple[CollectState, Rollout, Info]:
        """One rollout of `storage.steps` steps."""
        begin = time.perf_counter()
        state, rollout, episodes = collect_rollout(run, state, weights)
        metrics = {} if run.lanes is None else {"sound": state.sound.float()}
        return state, rollout, Info(metrics, (episodes,), {"time/collect": time.perf_counter() - begin})

    def gather(self, run: Run, state: CollectState) -> CollectState:
        """With the simulators' states as records."""
        return dataclasses.replace(state, env=run.parts.env.gather(state.env))

    def restore(self, run: Run, pure: CollectState) -> CollectState:
        """With simulators brought back to where they were."""
        _own(run, self, pure, CollectState)
        _as_many(run, self, pure.tally.returns.shape[-1], run.parts.env.num_envs, "environments")
        return dataclasses.replace(pure, env=run.parts.env.restore(pure.env))

    def close(self, run: Run, state: CollectState) -> None:
        """Closes the simulators."""
        run.parts.env.close(state.env)


collect = Collect()


# -- gradients ------------------------------------------------------------------------------------------------------


@record
class GradientsState:
    """The storage, the plan and its cursor, moments to merge at the plan's end, and the node below."""

    storage: Tree
    batches: Tree
    moments: Tree
    child: Tree
    key: Tensor
    plans: int = host(default=0)
    cursor: int = host(default=0)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Turns rollouts into updates: owns the storage, the batch plan and its cursor."""

    child: Any
    produces: ClassVar[str] = "updates"

    def __post_init__(self) -> None:
        _require("gradients", self.child, "rollouts")

    def __repr__(self) -> str:
        return f"gradients({self.child!r})"

    def envs(self, parts: Parts) -> int:
        """Those of the rollouts."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The plan must divide a rollout."""
        self.child.check(parts)
        parts.storage.check(parts.algo.plan, parts.actor, self.envs(parts), parts.env)

    def init(self, run: Run, key: Tensor) -> GradientsState:
        """Nothing stored."""
        own, below = _fold(run, key, 0), _fold(run, key, 1)
        return GradientsState(run.parts.storage.init(), (), (), self.child.init(run, below), own)

    def step(self, run: Run, state: GradientsState, weights: Weights) -> tuple[GradientsState, Update, Info]:
        """One gradient; a new plan is made, from new rollouts, when the last one is used up."""
        parts, info, env_steps = run.parts, Info({}, (), {}), 0
        first = isinstance(state.batches, tuple)
        if first:
            state, info, env_steps = self._plan(run, state, weights)
        begin = time.perf_counter()
        rows, noise = state.batches.at(state.cursor)
        grads, aux = run.graph(_gradient)(
            parts.algo, parts.storage, parts.actor, weights, state.batches.data, rows, noise
        )
        storage = parts.storage.feedback(state.storage, state.batches.data, rows, aux.priority)
        state = dataclasses.replace(state, storage=storage)
        last = state.cursor + 1 == state.batches.updates
        moments = state.moments if last else ()
        told = aux.info
        if "sound" in info.metrics:  # a lane whose rollouts aren't is dead to the algorithm as well
            told = {**told, "loss": torch.where(info.metrics["sound"] < 1.0, math.nan, told["loss"])}
        update = Update(grads, told, moments, first, last, env_steps, weights.version)
        if last:
            state = dataclasses.replace(state, batches=(), moments=(), cursor=0, plans=state.plans + 1)
        else:
            state = dataclasses.replace(state, cursor=state.cursor + 1)
        report = {**info.report, "time/gradient": time.perf_counter() - begin}
        return state, update, Info({}, info.episodes, report)

    def _plan(self, run: Run, state: GradientsState, weights: Weights) -> tuple[GradientsState, Info, int]:
        parts, storage, child, moments = run.parts, state.storage, state.child, state.moments
        infos, env_steps = [], 0
        while not parts.storage.ready(storage, parts.algo.plan, self.envs(parts)):
            child, rollout, info = self.child.step(run, child, weights)
            storage = parts.storage.append(storage, rollout)
            moments, env_steps = merge_moments(run, moments, rollout.moments), env_steps + rollout.env_steps
            infos.append(info)
        begin = time.perf_counter()
        keys = run.lift(random.split)(_fold(run, state.key, state.plans))
        facts = parts.actor, weights, parts.algo.plan, self.envs(parts)
        storage, data, index = parts.storage.batches(run.lift, storage, *facts, keys.select(-2, 0), parts.env)
        noise = run.lift(parts.algo.noise)(parts.actor, keys.select(-2, 1), *index.shape[-2:])
        batches = Batches(data, index, noise)
        info = merge_infos(infos)
        info.report["time/batches"] = time.perf_counter() - begin
        return (
            dataclasses.replace(state, storage=storage, batches=batches, moments=moments, child=child),
            info,
            env_steps,
        )

    def gather(self, run: Run, state: GradientsState) -> GradientsState:
        """The storage and the node below, gathered."""
        child, storage = self.child.gather(run, state.child), run.parts.storage.gather(state.storage, run.copy)
        return dataclasses.replace(state, child=child, storage=storage)

    def restore(self, run: Run, pure: GradientsState) -> GradientsState:
        """The storage and the node below, restored."""
        _own(run, self, pure, GradientsState)
        child, storage = self.child.restore(run, pure.child), run.parts.storage.restore(pure.storage, run.copy)
        return dataclasses.replace(pure, child=child, storage=storage)

    def close(self, run: Run, state: GradientsState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


def _gradient(algo: Any, storage: Any, actor: Any, weights: Weights, data: Any, rows: Tensor, noise: Tree) -> Any:
    return algo.grad(actor, weights, storage.take(data, rows), noise)


def gradients(node: Any) -> Gradients:
    """Turns the rollouts of `node` into updates."""
    return Gradients(node)


# -- synchronous ----------------------------------------------------------------------------------------------------


@record
class SynchronousState:
    """The replicas' states, in worker order."""

    workers: Tree


@dataclasses.dataclass(frozen=True)
class Synchronous:
    """`workers` replicas of a node, stepped together and merged in worker order: rollouts side by side, updates
    averaged.
    """

    child: Any
    workers: int

    def __post_init__(self) -> None:
        _require("synchronous", self.child, "rollouts", "updates")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise CompositionError(f"synchronous: workers = {self.workers!r}, expected an int of at least 1")

    def __repr__(self) -> str:
        return f"synchronous({self.child!r}, workers={self.workers})"

    @property
    def produces(self) -> str:
        """What the node produces."""
        return self.child.produces

    def envs(self, parts: Parts) -> int:
        """Rollouts of all workers are one; updates are each worker's own."""
        one = self.child.envs(parts)
        return one * self.workers if self.produces == "rollouts" else one

    def check(self, parts: Parts) -> None:
        """The node's own check."""
        self.child.check(parts)

    def init(self, run: Run, key: Tensor) -> SynchronousState:
        """Replicas with keys of their own."""
        return SynchronousState(
            tuple(run.executor.init(run.child(i), self.child, _fold(run, key, i)) for i in range(self.workers))
        )

    def step(self, run: Run, state: SynchronousState, weights: Weights) -> tuple[SynchronousState, Any, Info]:
        """One step of every replica with the same weights."""
        pending = [run.executor.submit(run.child(i), self.child, s, weights) for i, s in enumerate(state.workers)]
        states, products, infos = zip(*(run.executor.result(p) for p in pending), strict=True)
        merge = merge_rollouts if self.produces == "rollouts" else merge_updates
        return SynchronousState(tuple(states)), merge(run, list(products)), merge_infos(list(infos))

    def gather(self, run: Run, state: SynchronousState) -> SynchronousState:
        """Every replica, gathered."""
        return self._each(run, run.executor.gather, state)

    def restore(self, run: Run, pure: SynchronousState) -> SynchronousState:
        """Every replica, restored."""
        _own(run, self, pure, SynchronousState)
        _as_many(run, self, len(pure.workers), self.workers, "workers")
        return self._each(run, run.executor.restore, pure)

    def close(self, run: Run, state: SynchronousState) -> None:
        """Releases every replica."""
        for i, s in enumerate(state.workers):
            run.executor.close(run.child(i), self.child, s)

    def _each(self, run: Run, f: Any, state: SynchronousState) -> SynchronousState:
        return SynchronousState(tuple(f(run.child(i), self.child, s) for i, s in enumerate(state.workers)))


def synchronous(node: Any, workers: int) -> Synchronous:
    """`workers` replicas of `node`, merged in worker order."""
    return Synchronous(node, workers)


# -- centralised ----------------------------------------------------------------------------------------------------


@record
class CentralisedState:
    """The algorithm's state and the node below; `pinned` names hyper-parameters a user has set, `settled` is whether
    the last update ended a plan.
    """

    algo: Tree
    child: Tree
    pinned: tuple[str, ...] = host(default=())
    settled: bool = host(default=True)


@dataclasses.dataclass(frozen=True)
class Centralised:
    """Applies updates in one place and sends weights down."""

    child: Any
    produces: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        _require("centralised", self.child, "updates")

    def __repr__(self) -> str:
        return f"centralised({self.child!r})"

    def envs(self, parts: Parts) -> int:
        """Those of an update."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The node's own check."""
        self.child.check(parts)

    def init(self, run: Run, key: Tensor) -> CentralisedState:
        """Fresh weights."""
        return CentralisedState(first_algo(run, _fold(run, key, 0)), self.child.init(run, _fold(run, key, 1)))

    def step(self, run: Run, state: CentralisedState, weights: Any = ()) -> tuple[CentralisedState, Weights, Info]:
        """One update. Errors: NonFiniteError, before anything of the update is kept."""
        child, update, info = self.child.step(run, state.child, state.algo.weights)
        begin = time.perf_counter()
        algo, metrics = apply_update(run, state.algo, update, state.pinned)
        report = {**info.report, "time/apply": time.perf_counter() - begin}
        state = dataclasses.replace(state, algo=algo, child=child, settled=update.last)
        return state, algo.weights, Info(metrics, info.episodes, report)

    def gather(self, run: Run, state: CentralisedState) -> CentralisedState:
        """The node below, gathered."""
        return dataclasses.replace(state, child=self.child.gather(run, state.child))

    def restore(self, run: Run, pure: CentralisedState) -> CentralisedState:
        """The node below, restored; hyper-parameters that nobody has set are the parts'."""
        _own(run, self, pure, CentralisedState)
        algo = declared(run, pure.algo, pure.pinned, pure.settled)
        return dataclasses.replace(pure, algo=algo, child=self.child.restore(run, pure.child))

    def close(self, run: Run, state: CentralisedState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


def centralised(node: Any) -> Centralised:
    """Applies the updates of `node` in one place."""
    return Centralised(node)
