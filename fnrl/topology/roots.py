"""The roots of a topology: where updates are applied and weights come from."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from fnrl import tree
from fnrl.apply import apply_update, declared, first_algo
from fnrl.errors import CompositionError, DivergedError
from fnrl.lift import Run
from fnrl.merge import merge_infos, merge_updates
from fnrl.parts import Parts
from fnrl.record import host, record, replace
from fnrl.topology.base import Root, as_many, fold, own, require, whole
from fnrl.topology.workers import Round, round_of, told
from fnrl.types import Info, Tree, Update, Weights


@record
class RootState:
    """The algorithm's state and the node below; `pinned` names hyper-parameters a user has set, `settled` is whether
    the last update ended a plan.
    """

    algo: Tree
    child: Tree
    pinned: tuple[str, ...] = host(default=())
    settled: bool = host(default=True)


@dataclasses.dataclass(frozen=True)
class Centralised(Root):
    """Applies updates in one place and sends weights down."""

    child: Any

    def __post_init__(self) -> None:
        require("centralised", self.child, "updates")

    def __repr__(self) -> str:
        return f"centralised({self.child!r})"

    def envs(self, parts: Parts) -> int:
        """Those of an update."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The node's own check."""
        self.child.check(parts)

    def init(self, run: Run, key: Tensor) -> RootState:
        """Fresh weights."""
        return RootState(first_algo(run, fold(run, key, 0)), self.child.init(run, fold(run, key, 1)))

    def step(self, run: Run, state: RootState, weights: Any = ()) -> tuple[RootState, Weights, Info]:
        """One update. Errors: NonFiniteError, before anything of the update is kept."""
        child, update, info = self.child.step(run, state.child, state.algo.weights)
        return _applied(run, state, child, update, info)

    def set(self, state: RootState, algo: Any, pinned: tuple[str, ...]) -> RootState:
        """With the hyper-parameters of `algo` from now on."""
        return replace(state, algo=algo, pinned=pinned)

    def gather(self, run: Run, state: RootState) -> RootState:
        """The node below, gathered."""
        return replace(state, child=self.child.gather(run, state.child))

    def restore(self, run: Run, pure: RootState) -> RootState:
        """The node below, restored; hyper-parameters that nobody has set are the parts'."""
        own(run, self, pure, RootState)
        algo = declared(run, pure.algo, pure.pinned, pure.settled)
        return replace(pure, algo=algo, child=self.child.restore(run, pure.child))

    def close(self, run: Run, state: RootState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


def _applied(run: Run, state: RootState, child: Tree, update: Update, info: Info) -> tuple[RootState, Weights, Info]:
    """The state after an update, the weights to go on with, and what is told of it."""
    begin = time.perf_counter()
    algo, metrics = apply_update(run, state.algo, update, state.pinned)
    report = {**info.report, "time/apply": info.report.get("time/apply", 0.0) + time.perf_counter() - begin}
    lags = {**info.lags, "scheme/metrics/gradient_lag": (state.algo.weights.version - update.version,)}
    state = replace(state, algo=algo, child=child, settled=update.last)
    return state, algo.weights, replace(info, metrics=metrics, report=report, lags=lags)


def centralised(node: Any) -> Centralised:
    """Applies the updates of `node` in one place."""
    return Centralised(node)


# -- decentralised --------------------------------------------------------------------------------------------------


@record
class Order:
    """What flows down to replicas that apply updates themselves: the last merged update, or at first, and after a
    change, the algorithm's state as it is now.
    """

    algo: Tree
    update: Tree
    pinned: tuple[str, ...] = host(default=())
    digest: bool = host(default=False)  # whether they are to say what they hold


@record
class Share:
    """What a replica contributes: its update, and a digest of the algorithm's state it was made with, if asked for."""

    update: Update
    digest: int = host(default=0)


@record
class ReplicaState:
    """A replica of the algorithm's state (`()` until it is sent), and the node below."""

    algo: Tree
    child: Tree


@dataclasses.dataclass(frozen=True)
class Replica:
    """Applies the update that all made, then makes the next one with a child of its own."""

    child: Any
    produces: ClassVar[str] = "updates"

    def __repr__(self) -> str:
        return f"a replica of {self.child!r}"

    def init(self, run: Run, key: Tensor) -> ReplicaState:
        """The node below; the algorithm's state comes with the first order."""
        return ReplicaState((), self.child.init(run, key))

    def step(self, run: Run, state: ReplicaState, order: Order) -> tuple[ReplicaState, Share, Info]:
        """One update, made with the weights that the order leads to."""
        begin, algo = time.perf_counter(), order.algo
        if isinstance(algo, tuple):
            algo, _ = apply_update(run, state.algo, order.update, order.pinned)
        spent = {"time/apply": time.perf_counter() - begin}
        child, update, info = self.child.step(run, state.child, algo.weights)
        share = Share(update, digest(algo) if order.digest else 0)
        return ReplicaState(algo, child), share, merge_infos([info, Info({}, (), spent)])

    def gather(self, run: Run, state: ReplicaState) -> ReplicaState:
        """The node below, gathered. The algorithm's state comes along: a cell that is lost goes on from it."""
        return replace(state, child=self.child.gather(run, state.child))

    def restore(self, run: Run, pure: ReplicaState) -> ReplicaState:
        """The node below, restored."""
        own(run, self, pure, ReplicaState)
        return replace(pure, child=self.child.restore(run, pure.child))

    def close(self, run: Run, state: ReplicaState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


@record
class DecentralisedState:
    """The replicas, in worker order, and the update they have yet to apply; `()` if they are to be sent all."""

    workers: Tree
    update: Tree


@dataclasses.dataclass(frozen=True)
class Decentralised(Root):
    """`workers` replicas that each apply the averaged update themselves. See `decentralised`."""

    child: Any
    workers: int
    quorum: float = 1.0
    samples: float = 1.0
    check_every: int = 100

    def __post_init__(self) -> None:
        require("decentralised", self.child, "updates")
        whole("decentralised", "check_every", self.check_every)
        if hasattr(self.child, "workers"):
            raise CompositionError(
                f"decentralised has gradient workers of its own, which average before anyone goes on, and got "
                f"{self.child!r}: write decentralised({self.child.child!r}, workers={self.child.workers})"
            )
        self._round()

    def __repr__(self) -> str:
        options = told(quorum=self.quorum, samples=self.samples)
        every = f", check_every={self.check_every}" if self.check_every != 100 else ""
        return f"decentralised({self.child!r}, workers={self.workers}{options}{every})"

    def _round(self) -> Round:
        return round_of("decentralised", self.workers, self.quorum, self.samples)

    def envs(self, parts: Parts) -> int:
        """Those of one replica's update."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The node's own check; and whether rollouts may be of unequal length."""
        self.child.check(parts)
        self._round().check("decentralised", parts)

    def init(self, run: Run, key: Tensor) -> RootState:
        """Fresh weights here, to be sent to the replicas; all keys are those of centralised(synchronous(...))."""
        algo, replicas = first_algo(run, fold(run, key, 0)), Replica(self.child)
        return RootState(algo, DecentralisedState(self._round().init(run, replicas, fold(run, key, 1)), ()))

    def step(self, run: Run, state: RootState, weights: Any = ()) -> tuple[RootState, Weights, Info]:
        """One update, applied here as in every replica. Errors: NonFiniteError; DivergedError."""
        below: DecentralisedState = state.child
        version, asked = state.algo.weights.version, state.algo.weights.version % self.check_every == 0
        anew = isinstance(below.update, tuple)
        order = Order(state.algo if anew else (), below.update, state.pinned, asked)
        workers, shares, info = self._round().step(run, Replica(self.child), below.workers, order)
        if asked:
            self._compare(run, digest(state.algo), [share.digest for share in shares], version)
        update = merge_updates(run, [share.update for share in shares])
        return _applied(run, state, DecentralisedState(workers, update), update, info)

    def _compare(self, run: Run, here: int, there: Collection[int], version: int) -> None:
        wrong = [run.child(i).name for i, found in enumerate(there) if found != here]
        if wrong:
            raise DivergedError(
                f"at update {version} the replicas {', '.join(wrong)} of {self!r} no longer hold the weights and "
                "moments that the others and the driver do: replicas compute alike only with equal hardware, library "
                "versions and thread counts. centralised(synchronous(...)) does without that"
            )

    def set(self, state: RootState, algo: Any, pinned: tuple[str, ...]) -> RootState:
        """With the hyper-parameters of `algo` from now on, in every replica: they are sent all of it."""
        child = replace(state.child, update=())
        return replace(state, algo=algo, pinned=pinned, child=child)

    def gather(self, run: Run, state: RootState) -> RootState:
        """The replicas, gathered, without what each has of the algorithm's state: the root has it once."""
        workers = self._round().each(run, run.executor.gather, Replica(self.child), state.child.workers)
        return replace(state, child=DecentralisedState(tuple(replace(w, algo=()) for w in workers), ()))

    def restore(self, run: Run, pure: RootState) -> RootState:
        """The replicas, restored; hyper-parameters that nobody has set are the parts'."""
        own(run, self, pure, RootState)
        own(run, self, pure.child, DecentralisedState)
        as_many(run, self, len(pure.child.workers), self.workers, "workers")
        workers = self._round().each(run, run.executor.restore, Replica(self.child), pure.child.workers)
        algo = declared(run, pure.algo, pure.pinned, pure.settled)
        return replace(pure, algo=algo, child=DecentralisedState(workers, ()))

    def close(self, run: Run, state: RootState) -> None:
        """Releases every replica."""
        self._round().each(run, run.executor.close, Replica(self.child), state.child.workers)


def digest(state: Tree) -> int:
    """CRC-32 of all bits of a tree: cheap, and different for states that are not the same."""
    return functools.reduce(
        lambda crc, x: zlib.crc32(x.detach().cpu().contiguous().numpy(), crc), tree.leaves(state), 0
    )


def decentralised(
    node: Any, workers: int, quorum: float = 1.0, samples: float = 1.0, check_every: int = 100
) -> Decentralised:
    """`workers` replicas of `node` (gradients) that each apply the averaged update themselves.

    What flows down is an update, and no weights. The bits are those of `centralised(synchronous(node, workers))`; a
    digest of every replica is compared every `check_every` updates. `quorum` and `samples` are those of `synchronous`.
    Errors: CompositionError; when stepped, DivergedError.
    """
    return Decentralised(node, workers, quorum, samples, check_every)
