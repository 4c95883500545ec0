"""Replicas of a node: stepped together and merged in worker order, or each by itself and taken as they arrive."""

import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fnrl.collect import cut
from fnrl.errors import CompositionError, LagWarning
from fnrl.lift import Run
from fnrl.merge import merge_infos, merge_rollouts, merge_updates
from fnrl.parts import Parts
from fnrl.record import host, record, replace
from fnrl.topology.base import as_many, fold, own, require, whole
from fnrl.types import Choice, Info, Landed, Tree, Weights

_TOLD = 4  # products that are dropped for each worker, before it is told that most are


@dataclasses.dataclass(frozen=True)
class Round:
    """How replicas step together: once a part `quorum` of them are done, the others are asked to stop after a part
    `samples` of their rollouts.
    """

    workers: int
    quorum: float
    samples: float

    @property
    def enough(self) -> int:
        """Workers that a round waits for."""
        return math.ceil(self.quorum * self.workers)

    def runs(self, run: Run) -> list[Run]:
        """The surroundings of each replica."""
        least = self.samples if self.enough < self.workers else None
        return [run.child(i, self.workers, least) for i in range(self.workers)]

    def init(self, run: Run, node: Any, key: Tensor) -> tuple[Any, ...]:
        """Replicas with keys of their own."""
        return tuple(run.executor.init(r, node, fold(run, key, i)) for i, r in enumerate(self.runs(run)))

    def step(self, run: Run, node: Any, states: Sequence[Any], down: Any) -> tuple[tuple[Any, ...], list[Any], Info]:
        """One step of every replica with the same weights (or whatever flows down), in worker order."""
        executor = run.executor
        calls = [executor.submit(r, node, s, down) for r, s in zip(self.runs(run), states, strict=True)]
        begin = time.perf_counter()
        if self.enough < self.workers:
            executor.preempt(calls, self.enough)
        after, products, infos = zip(*(executor.result(c) for c in calls), strict=True)
        waited = Info({}, (), {"time/wait": time.perf_counter() - begin})
        return after, list(products), merge_infos([*infos, waited])

    def each(self, run: Run, f: Any, node: Any, states: Sequence[Any]) -> tuple[Any, ...]:
        """A function of the executor, of every replica."""
        return tuple(f(r, node, s) for r, s in zip(self.runs(run), states, strict=True))

    def check(self, outer: str, parts: Parts) -> None:
        """Refuses parts that can't learn from rollouts of unequal length (CompositionError)."""
        if self.enough < self.workers:
            try:
                parts.storage.check_unequal(parts.actor)
            except CompositionError as error:
                raise CompositionError(
                    f"{outer}(quorum={self.quorum:g}) makes rollouts of unequal length: {error}"
                ) from None


def round_of(outer: str, workers: int, quorum: float, samples: float) -> Round:
    """A round; refuses numbers that are out of range, or would have no effect (CompositionError)."""
    whole(outer, "workers", workers)
    for name, value in (("quorum", quorum), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
            raise CompositionError(f"{outer}: {name} = {value!r}, expected a number in (0, 1]")
    for one, other, said in (("samples", "quorum", "nobody is stopped"), ("quorum", "samples", "nothing is left out")):
        given = {"quorum": quorum, "samples": samples}
        if given[one] < 1.0 and given[other] == 1.0:
            raise CompositionError(
                f"{outer}: {one}={given[one]:g} has no effect with {other}=1, where {said}: pass {other}=0.75 or so"
            )
    return Round(workers, quorum, samples)


def told(**options: float) -> str:
    """`, name=value` for each option that isn't 1.0."""
    return "".join(f", {n}={v!r}" for n, v in options.items() if v != 1.0)


# -- synchronous ----------------------------------------------------------------------------------------------------


@record
class SynchronousState:
    """The replicas' states, in worker order."""

    workers: Tree


@dataclasses.dataclass(frozen=True)
class Synchronous:
    """`workers` replicas of a node, stepped together and merged in worker order: rollouts side by side, updates
    averaged. See `synchronous`.
    """

    child: Any
    workers: int
    quorum: float = 1.0
    samples: float = 1.0

    def __post_init__(self) -> None:
        require("synchronous", self.child, "rollouts", "updates")
        self._round()

    def __repr__(self) -> str:
        options = told(quorum=self.quorum, samples=self.samples)
        return f"synchronous({self.child!r}, workers={self.workers}{options})"

    def _round(self) -> Round:
        return round_of("synchronous", self.workers, self.quorum, self.samples)

    @property
    def produces(self) -> str:
        """What the node produces."""
        return self.child.produces

    def envs(self, parts: Parts) -> int:
        """Rollouts of all workers are one; updates are each worker's own."""
        one = self.child.envs(parts)
        return one * self.workers if self.produces == "rollouts" else one

    def check(self, parts: Parts) -> None:
        """The node's own check; and whether rollouts may be of unequal length."""
        self.child.check(parts)
        self._round().check("synchronous", parts)

    def init(self, run: Run, key: Tensor) -> SynchronousState:
        """Replicas with keys of their own."""
        return SynchronousState(self._round().init(run, self.child, key))

    def step(self, run: Run, state: SynchronousState, weights: Weights) -> tuple[SynchronousState, Any, Info]:
        """One step of every replica with the same weights."""
        states, products, info = self._round().step(run, self.child, state.workers, weights)
        merge = merge_rollouts if self.produces == "rollouts" else merge_updates
        return SynchronousState(states), merge(run, products), info

    def gather(self, run: Run, state: SynchronousState) -> SynchronousState:
        """Every replica, gathered."""
        return SynchronousState(self._round().each(run, run.executor.gather, self.child, state.workers))

    def restore(self, run: Run, pure: SynchronousState) -> SynchronousState:
        """Every replica, restored."""
        own(run, self, pure, SynchronousState)
        as_many(run, self, len(pure.workers), self.workers, "workers")
        return SynchronousState(self._round().each(run, run.executor.restore, self.child, pure.workers))

    def close(self, run: Run, state: SynchronousState) -> None:
        """Releases every replica."""
        self._round().each(run, run.executor.close, self.child, state.workers)


def synchronous(node: Any, workers: int, quorum: float = 1.0, samples: float = 1.0) -> Synchronous:
    """`workers` replicas of `node`, merged in worker order.

    With `quorum` < 1 a round does not wait for stragglers: when that part of the workers is done, the others are asked
    to stop after at least a part `samples` of their rollout's steps. What they made counts; lengths are recorded.
    Errors: CompositionError.
    """
    return Synchronous(node, workers, quorum, samples)


# -- asynchronous ---------------------------------------------------------------------------------------------------


@record
class AsynchronousState:
    """States of workers at rest (`()` for one that is at work), and the calls in flight, oldest first: whose they are,
    and of which version the weights were that they were given. `taken` counts products.
    """

    resting: Tree
    calls: Tree
    workers: tuple[int, ...] = host(default=())
    versions: tuple[int, ...] = host(default=())
    taken: int = host(default=0)
    dropped: int = host(default=0)


@dataclasses.dataclass(frozen=True)
class Asynchronous:
    """`workers` replicas of a node, one call in flight each, taken one at a time as they arrive. See `asynchronous`."""

    child: Any
    workers: int
    max_lag: int | None = None

    def __post_init__(self) -> None:
        require("asynchronous", self.child, "rollouts", "updates")
        whole("asynchronous", "workers", self.workers)
        if self.max_lag is not None and (
            isinstance(self.max_lag, bool) or not isinstance(self.max_lag, int) or self.max_lag < 0
        ):
            raise CompositionError(
                f"asynchronous: max_lag = {self.max_lag!r}, expected an int of at least 0 (versions of the weights), "
                "or None for no limit"
            )

    def __repr__(self) -> str:
        limit = "" if self.max_lag is None else f", max_lag={self.max_lag}"
        return f"asynchronous({self.child!r}, workers={self.workers}{limit})"

    @property
    def produces(self) -> str:
        """What the node produces."""
        return self.child.produces

    def envs(self, parts: Parts) -> int:
        """Those of one worker: products are taken one at a time."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The node's own check; and that no early stop of a plan is asked of workers that have a plan each."""
        self.child.check(parts)
        if self.produces == "rollouts":
            parts.storage.check_interleaved()
        if self.produces == "updates" and "target_kl" in parts.hypers():
            raise CompositionError(
                f"target_kl stops one plan, and asynchronous({self.child!r}) has a plan in each worker: leave it out, "
                "or use synchronous(...)"
            )

    def _at(self, run: Run, i: int) -> Run:
        return run.child(i, self.workers)

    def init(self, run: Run, key: Tensor) -> AsynchronousState:
        """Replicas with keys of their own, at rest."""
        workers = range(self.workers)
        states = tuple(run.executor.init(self._at(run, i), self.child, fold(run, key, i)) for i in workers)
        return AsynchronousState(states, ())

    def step(self, run: Run, state: AsynchronousState, weights: Weights) -> tuple[AsynchronousState, Any, Info]:
        """The next product: workers at rest are set to work, the next call that arrives is taken."""
        infos: list[Info] = []
        state = self._submit(run, state, weights, infos)
        while True:
            state, product = self._take(run, state, weights.version, infos)
            if self.produces == "rollouts":  # a collector goes on at once; a gradient worker gets what it led to
                state, product = self._submit(run, state, weights, infos), cut(run, product)
            lag = weights.version - product.version
            if self.max_lag is None or lag <= self.max_lag:
                return state, product, merge_infos(infos)
            infos.append(Info({}, (), {"scheme/dropped": 1}))
            state = self._submit(run, self._dropped(run, state, lag), weights, infos)

    def _dropped(self, run: Run, state: AsynchronousState, lag: int) -> AsynchronousState:
        """One more product is lost; that most are is told once."""
        dropped = state.dropped + 1
        if dropped == _TOLD * self.workers and 2 * dropped >= state.taken:
            steady = self.workers - 1
            if self.produces == "rollouts":
                steady = self.workers * run.parts.storage.updates(run.parts.algo.plan, self.envs(run.parts))
            warnings.warn(
                f"{self!r}: of {state.taken} products {dropped} were dropped, the last one {lag} versions old. With "
                f"{self.workers} workers at one speed, products are {steady} versions old: raise max_lag to that, or "
                "take fewer workers or fewer updates a plan",
                LagWarning,
                stacklevel=4,
            )
        return replace(state, dropped=dropped)

    def _submit(self, run: Run, state: AsynchronousState, weights: Weights, infos: list[Info]) -> AsynchronousState:
        """Every worker at rest set to work with these weights."""
        idle = [i for i, s in enumerate(state.resting) if not isinstance(s, tuple)]
        if not idle:
            return state
        calls = []
        for i in idle:
            call = run.executor.submit(self._at(run, i), self.child, state.resting[i], weights)
            if isinstance(call, Landed):  # its time has passed already; what is kept has no times
                infos.append(Info({}, (), call.info.report))
                call = _untimed(call)
            calls.append(call)
        versions = (*state.versions, *(weights.version for _ in idle))
        return AsynchronousState(
            ((),) * self.workers,
            (*state.calls, *calls),
            (*state.workers, *idle),
            versions,
            state.taken,
            state.dropped,
        )

    def _take(
        self, run: Run, state: AsynchronousState, version: int, infos: list[Info]
    ) -> tuple[AsynchronousState, Any]:
        """The next arrival, or the oldest call where no other may overtake it."""
        begin, choices, at = time.perf_counter(), (), min(range(len(state.calls)), key=state.versions.__getitem__)
        if self.max_lag is None or version - state.versions[at] < self.max_lag:
            at = run.executor.arrival(run, state.calls, state.taken)
            choices = (Choice("arrival", run.name, state.taken, at),)
        after, product, info = run.executor.result(state.calls[at])
        waited = {"time/wait": time.perf_counter() - begin}
        infos += [info, Info({}, (), waited, choices=choices)]
        calls, workers, versions = ((*xs[:at], *xs[at + 1 :]) for xs in (state.calls, state.workers, state.versions))
        resting = tuple(after if i == state.workers[at] else s for i, s in enumerate(state.resting))
        return AsynchronousState(resting, calls, workers, versions, state.taken + 1, state.dropped), product

    def gather(self, run: Run, state: AsynchronousState) -> AsynchronousState:
        """Waits for the calls in flight, and keeps what they brought."""
        executor = run.executor

        def landed(call: Any, i: int) -> Landed:
            after, product, info = executor.result(call)
            return _untimed(Landed(executor.gather(self._at(run, i), self.child, after), product, info))

        return self._each(run, executor.gather, landed, state)

    def restore(self, run: Run, pure: AsynchronousState) -> AsynchronousState:
        """Every replica restored; what had arrived has still arrived."""
        own(run, self, pure, AsynchronousState)
        as_many(run, self, len(pure.resting), self.workers, "workers")

        def restored(call: Landed, i: int) -> Landed:
            return replace(call, state=run.executor.restore(self._at(run, i), self.child, call.state))

        return self._each(run, run.executor.restore, restored, pure)

    def close(self, run: Run, state: AsynchronousState) -> None:
        """Releases every replica."""
        for i, s in enumerate(state.resting):
            if not isinstance(s, tuple):
                run.executor.close(self._at(run, i), self.child, s)
        for call, i in zip(state.calls, state.workers, strict=True):
            run.executor.close(self._at(run, i), self.child, call.state)

    def _each(self, run: Run, rest: Any, flight: Any, state: AsynchronousState) -> AsynchronousState:
        resting = tuple(
            s if isinstance(s, tuple) else rest(self._at(run, i), self.child, s) for i, s in enumerate(state.resting)
        )
        calls = tuple(flight(call, i) for call, i in zip(state.calls, state.workers, strict=True))
        return replace(state, resting=resting, calls=calls)


def _untimed(call: Landed) -> Landed:
    return replace(call, info=replace(call.info, report={}))


def asynchronous(node: Any, workers: int, max_lag: int | None = None) -> Asynchronous:
    """`workers` replicas of `node`, one call in flight each; a step takes one product, the next that arrives.

    What arrives when is recorded, and `fnrl.Recorded` repeats it bit for bit. A product's lag is the number of versions
    by which the weights have moved on since it was begun. With `max_lag`, nothing overtakes a call that has reached it,
    and a product beyond it is dropped (`scheme/dropped`). Errors: CompositionError.
    """
    return Asynchronous(node, workers, max_lag)
