"""Lanes sharded over processes: each shard is the whole architecture over some of the lanes, stepped by itself."""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fnrl import tree
from fnrl.apply import declared, first_algo
from fnrl.errors import CompositionError, DeadLaneWarning
from fnrl.lift import Run
from fnrl.parts import Parts
from fnrl.record import host, record, replace
from fnrl.topology.base import Root, fold, own, require, whole
from fnrl.topology.roots import RootState
from fnrl.types import Info, Tree, Weights


@record
class ShardOrder:
    """What flows down to a shard: hyper-parameters that were set since its last step, or `()`; and how many updates it
    is to do.
    """

    hyper: Tree
    pinned: tuple[str, ...] = host(default=())
    updates: int = host(default=1)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some lanes of an architecture; what goes up is the algorithm's state without the optimiser's memory."""

    child: Any
    produces: ClassVar[str] = "weights"

    def __repr__(self) -> str:
        return f"a shard of {self.child!r}"

    def init(self, run: Run, key: Tensor) -> RootState:
        """The architecture's own."""
        return self.child.init(run, key)

    def step(self, run: Run, state: RootState, order: ShardOrder) -> tuple[RootState, RootState, Info]:
        """Some updates of its lanes; what is told of them is merged."""
        if order.hyper:
            state = _with_hyper(self.child, state, order.hyper, order.pinned)
        state, info = self.child.steps(run, state, order.updates)
        return state, RootState(replace(state.algo, opt=()), (), state.pinned, state.settled), info

    def gather(self, run: Run, state: RootState) -> RootState:
        """The architecture's own."""
        return self.child.gather(run, state)

    def restore(self, run: Run, pure: RootState) -> RootState:
        """The architecture's own."""
        return self.child.restore(run, pure)

    def close(self, run: Run, state: RootState) -> None:
        """The architecture's own."""
        self.child.close(run, state)


@record
class ShardedState:
    """The shards, what all lanes' algorithm's state is (but for the optimiser's memory), and what to tell them next."""

    algo: Tree
    shards: Tree
    order: ShardOrder
    pinned: tuple[str, ...] = host(default=())
    settled: bool = host(default=True)


@dataclasses.dataclass(frozen=True)
class Sharded(Root):
    """`workers` shards of the lanes, each a program of its own in its executor's place. See `sharded`."""

    child: Any
    workers: int

    def __post_init__(self) -> None:
        require("sharded", self.child, "weights")
        whole("sharded", "shards", self.workers)
        node = self.child
        while node is not None:
            if hasattr(node, "workers"):
                raise CompositionError(
                    f"sharded splits lanes, and {node!r} has workers of its own: shard an architecture without, such "
                    "as centralised(gradients(collect))"
                )
            node = getattr(node, "child", None)

    def __repr__(self) -> str:
        return f"sharded({self.child!r}, shards={self.workers})"

    def envs(self, parts: Parts) -> int:
        """Those of an update of one lane."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The architecture's own check."""
        self.child.check(parts)

    def init(self, run: Run, key: Tensor) -> ShardedState:
        """Shards of lanes that lie beside each other, as even as can be."""
        runs = self._runs(run)
        keys = key.split([r.lanes or 0 for r in runs])
        made = tuple(run.executor.init(r, Shard(self.child), k) for r, k in zip(runs, keys, strict=True))
        algo = replace(first_algo(run, fold(run, key, 0)), opt=())
        return ShardedState(algo, made, ShardOrder(()))

    def step(self, run: Run, state: ShardedState, weights: Any = ()) -> tuple[ShardedState, Weights, Info]:
        """One update of every lane. Errors: NonFiniteError when no lane of a shard is left."""
        state, info = self.steps(run, state, 1)
        return state, state.algo.weights, info

    def steps(self, run: Run, state: ShardedState, updates: int) -> tuple[ShardedState, Info]:
        """Some updates of every lane, in one round of calls. Errors: as of one."""
        runs, node = self._runs(run), Shard(self.child)
        order = replace(state.order, updates=updates)
        orders = _split(order, runs) if order.hyper else [order] * len(runs)
        pairs = zip(runs, state.shards, orders, strict=True)
        calls = [run.executor.submit(r, node, s, order) for r, s, order in pairs]
        shards, roots, infos = zip(*(run.executor.result(c) for c in calls), strict=True)
        root = _join(roots)
        new = root.algo.dead & ~state.algo.dead
        for i in torch.nonzero(new).flatten().tolist():
            warnings.warn(f"lane {run.numbers[i]} is dead in its shard", DeadLaneWarning, stacklevel=3)
        after = ShardedState(root.algo, tuple(shards), ShardOrder(()), root.pinned, root.settled)
        return after, _joined_info(infos)

    def set(self, state: ShardedState, algo: Any, pinned: tuple[str, ...]) -> ShardedState:
        """With the hyper-parameters of `algo` from now on; shards are told at their next step."""
        return replace(state, algo=algo, pinned=pinned, order=ShardOrder(algo.weights.hyper, pinned))

    def gather(self, run: Run, state: ShardedState) -> RootState:
        """All lanes as they are without shards: the same record, to go on from with any number of shards, or none."""
        node = Shard(self.child)
        pure = _join([run.executor.gather(r, node, s) for r, s in zip(self._runs(run), state.shards, strict=True)])
        return _with_hyper(self.child, pure, state.order.hyper, state.pinned) if state.order.hyper else pure

    def restore(self, run: Run, pure: RootState) -> ShardedState:
        """Shards that go on with their lanes."""
        own(run, self, pure, RootState)
        runs, node = self._runs(run), Shard(self.child)
        made = [run.executor.restore(r, node, p) for r, p in zip(runs, _split(pure, runs), strict=True)]
        algo = replace(declared(run, pure.algo, pure.pinned, pure.settled), opt=())
        return ShardedState(algo, tuple(made), ShardOrder(()), pure.pinned, pure.settled)

    def close(self, run: Run, state: ShardedState) -> None:
        """Releases every shard."""
        for r, s in zip(self._runs(run), state.shards, strict=True):
            run.executor.close(r, Shard(self.child), s)

    def _runs(self, run: Run) -> list[Run]:
        """The surroundings of each shard: its lanes, and their numbers."""
        lanes = run.lanes or 0
        if lanes < 2 * self.workers:
            raise CompositionError(
                f"{self!r} over {lanes or 'no'} lanes: a shard has at least two, since products round alike from two "
                f"lanes on; take at least {2 * self.workers} seeds, or fewer shards"
            )
        ends = [lanes * i // self.workers for i in range(self.workers + 1)]
        return [
            dataclasses.replace(run.child(i), lanes=end - begin, which=run.numbers[begin:end])
            for i, (begin, end) in enumerate(itertools.pairwise(ends))
        ]


def sharded(topology: Any, shards: int) -> Sharded:
    """The lanes of `topology` in `shards` programs of at least two lanes each, so that all cores work.

        Scheme(parts, sharded(centralised(gradients(collect)), shards=2), executor=fnrl.Ray())

    Every lane has the bits that it has unsharded, and a run that was saved goes on with other shards or with none.
    Errors: CompositionError.
    """
    return Sharded(topology, shards)


def _with_hyper(node: Any, state: RootState, hyper: dict[str, Tensor], pinned: tuple[str, ...]) -> RootState:
    weights = replace(state.algo.weights, hyper=hyper)
    return node.set(state, replace(state.algo, weights=weights), pinned)


def _split(whole: Any, runs: Sequence[Run]) -> list[Any]:
    """The lanes of each shard."""
    begins = [sum(r.lanes or 0 for r in runs[:i]) for i in range(len(runs))]
    return [
        tree.map(lambda x, b=b, n=r.lanes: x.narrow(0, b, n).clone(), whole) for b, r in zip(begins, runs, strict=True)
    ]


def _join(shards: Sequence[Any]) -> Any:
    """All lanes of some shards. What is padded to the longest of a shard's lanes is padded to the longest of all."""

    def cat(*xs: Tensor) -> Tensor:
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in xs), strict=True)]
        pads = [[p for d in range(x.dim() - 1, 0, -1) for p in (0, shape[d - 1] - x.shape[d])] for x in xs]
        return torch.cat([F.pad(x, p) if any(p) else x for x, p in zip(xs, pads, strict=True)])

    return tree.map(cat, shards[0], *shards[1:])


def _joined_info(infos: Sequence[Info]) -> Info:
    """What all lanes tell: metrics and episodes side by side, host facts added."""
    metrics, episodes = _join([(i.metrics, i.episodes) for i in infos])
    names = dict.fromkeys(n for i in infos for n in i.report)
    return Info(metrics, episodes, {n: sum(i.report.get(n, 0.0) for i in infos) for n in names}, infos[0].lags)
