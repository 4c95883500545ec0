"""The two nodes that compute: `collect` makes rollouts, `gradients` makes updates of them."""

import dataclasses
import math
import time
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.collect import CollectState, collect_rollout, first_state, restored
from fnrl.errors import CompositionError
from fnrl.lift import Run
from fnrl.merge import merge_infos, merge_moments
from fnrl.parts import Parts
from fnrl.record import host, record, replace
from fnrl.topology.base import as_many, fold, own, require
from fnrl.types import Batches, Choice, Info, Rollout, Tree, Update, Weights


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
        begin, count = time.perf_counter(), state.rollouts
        state, rollout, episodes = collect_rollout(run, state, weights)
        report, choices = {"time/collect": time.perf_counter() - begin}, ()
        if run.least is not None:
            choices = (Choice("length", run.name, count, rollout.env_steps // run.parts.env.num_envs),)
        return state, rollout, Info({"sound": state.sound.float()}, (episodes,), report, choices=choices)

    def gather(self, run: Run, state: CollectState) -> CollectState:
        """With the simulators' states as records."""
        return replace(state, env=run.parts.env.gather(state.env), ahead=())

    def restore(self, run: Run, pure: CollectState) -> CollectState:
        """With simulators brought back to where they were."""
        own(run, self, pure, CollectState)
        as_many(run, self, pure.tally.returns.shape[-1], run.parts.env.num_envs, "environments")
        return restored(run, pure)

    def close(self, run: Run, state: CollectState) -> None:
        """Closes the simulators."""
        run.parts.env.close(state.env)


collect = Collect()


_AHEAD = 32  # plans that keys, and updates that noise is drawn for at once


@record
class GradientsState:
    """The storage, the plan and its cursor, moments to merge at the plan's end, and the node below.

    `noise` `[R, ...]` is drawn for more updates than the plan's, where that has few: for the `left` last of them, of so
    many samples. `keys` `[R, 2, 2]` of this and the next plans follow from the key, so that no record holds them.
    """

    storage: Tree
    batches: Tree
    moments: Tree
    child: Tree
    key: Tensor
    noise: Tree = ()
    keys: Tree = ()
    plans: int = host(default=0)
    cursor: int = host(default=0)
    left: tuple[int, int] = host(default=(0, 0))


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Turns rollouts into updates: owns the storage, the batch plan and its cursor."""

    child: Any
    produces: ClassVar[str] = "updates"

    def __post_init__(self) -> None:
        require("gradients", self.child, "rollouts")

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
        own, below = fold(run, key, 0), fold(run, key, 1)
        return GradientsState(run.parts.storage.init(), (), (), self.child.init(run, below), own)

    def step(self, run: Run, state: GradientsState, weights: Weights) -> tuple[GradientsState, Update, Info]:
        """One gradient; a new plan is made, from new rollouts, when the last one is used up."""
        parts, info, env_steps = run.parts, Info({}, ()), 0
        first = isinstance(state.batches, tuple)
        if first:
            state, info, env_steps = self._plan(run, state, weights)
        begin = time.perf_counter()
        rows, noise = state.batches.at(state.cursor)
        grads, aux = run.graph(_gradient, keep=True)(
            parts.algo, parts.storage, parts.actor, weights, state.batches.data, rows, noise
        )
        storage = parts.storage.feedback(state.storage, state.batches.data, rows, aux.priority)
        state = replace(state, storage=storage)
        last = state.cursor + 1 == state.batches.updates
        moments = state.moments if last else ()
        told = aux.info
        if run.lanes is not None and info.metrics:  # a lane whose rollouts aren't is dead to the algorithm as well
            told = {**told, "loss": torch.where(info.metrics["sound"] < 1.0, math.nan, told["loss"])}
        update = Update(grads, told, moments, first, last, env_steps, weights.version)
        if last:
            state = replace(state, batches=(), moments=(), cursor=0, plans=state.plans + 1)
        else:
            state = replace(state, cursor=state.cursor + 1)
        report = {**info.report, "time/gradient": time.perf_counter() - begin}
        return state, update, replace(info, metrics={}, report=report)

    def _plan(self, run: Run, state: GradientsState, weights: Weights) -> tuple[GradientsState, Info, int]:
        parts, storage, child, moments = run.parts, state.storage, state.child, state.moments
        infos, env_steps = [], 0
        while not parts.storage.ready(storage, parts.algo.plan, self.envs(parts)):
            child, rollout, info = self.child.step(run, child, weights)
            storage = parts.storage.append(storage, rollout)
            moments, env_steps = merge_moments(run, moments, rollout.moments), env_steps + rollout.env_steps
            infos += [info, Info({}, (), lags={"scheme/metrics/collection_lag": (weights.version - rollout.version,)})]
        begin = time.perf_counter()
        keys, place = state.keys, state.plans % _AHEAD
        if place == 0 or keys == ():
            drawn = run.graph(_keys)(state.key, run.number(state.plans - place), _AHEAD).unbind(-2)
            keys = tuple(zip(*(x.unbind(-2) for x in drawn), strict=True))
        own, noisy = keys[place]
        facts = parts.actor, weights, parts.algo.plan, self.envs(parts)
        lift = run.graph if parts.storage.fixed else run.lift
        storage, data, index = parts.storage.batches(lift, storage, *facts, own, parts.env)
        updates, batch = index.shape[-2:]
        noise, (left, size) = state.noise, state.left
        if left < updates or size != batch:
            left = max(updates, _AHEAD)
            noise = run.graph(parts.algo.noise)(parts.actor, noisy, left, batch)
        used = tree.map(lambda x: x.narrow(run.axis, x.shape[run.axis] - left, updates), noise)
        info = merge_infos(infos)
        info.report["time/batches"] = time.perf_counter() - begin
        made = GradientsState(
            storage, Batches(data, index, used), moments, child, state.key, noise, keys, state.plans, state.cursor,
            (left - updates, batch),
        )  # fmt: skip
        return made, info, env_steps

    def gather(self, run: Run, state: GradientsState) -> GradientsState:
        """The storage and the node below, gathered."""
        child, storage = self.child.gather(run, state.child), run.parts.storage.gather(state.storage, run.copy)
        return replace(state, child=child, storage=storage, keys=())

    def restore(self, run: Run, pure: GradientsState) -> GradientsState:
        """The storage and the node below, restored."""
        own(run, self, pure, GradientsState)
        child, storage = self.child.restore(run, pure.child), run.parts.storage.restore(pure.storage, run.copy)
        return replace(pure, child=child, storage=storage)

    def close(self, run: Run, state: GradientsState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


def _keys(key: Tensor, first: Tensor, plans: int) -> Tensor:
    numbers = first + torch.arange(plans, device=key.device)
    return torch.func.vmap(lambda number: random.split(random.fold_in(key, number)))(numbers)


def _gradient(algo: Any, storage: Any, actor: Any, weights: Weights, data: Any, rows: Tensor, noise: Tree) -> Any:
    return algo.grad(actor, weights, storage.take(data, rows), noise)


def gradients(node: Any) -> Gradients:
    """Turns the rollouts of `node` into updates."""
    return Gradients(node)
