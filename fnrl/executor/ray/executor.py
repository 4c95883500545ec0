"""The executor of a Ray cluster: replicas in cells, one process each, that give the bits of one process.

Results are taken in worker order, and a cell that is lost is replaced and brought to where it was, so neither who
finishes first nor who dies changes anything.
"""

import contextlib
import dataclasses
import importlib.util
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fnrl import tree
from fnrl.errors import CompositionError
from fnrl.executor.ray.cluster import Session, connect, joined
from fnrl.executor.ray.orders import ORDERS
from fnrl.executor.ray.owner import Call, CellOwner, Terms
from fnrl.executor.ray.resources import Resources, cells, kind_of, refuse_more_than
from fnrl.executor.ray.wire import Packed, product_size, refuse_small_store, shipped, weights_size
from fnrl.lift import Run
from fnrl.record import host, record
from fnrl.token import Token
from fnrl.types import Info, Landed

_LEAST_STORE = 75 * 2**20  # bytes; Ray takes no fewer


@record
class CellState:
    """A replica that lives in a cell."""

    token: Token = host()


@dataclasses.dataclass(eq=False)
class Answer:
    """A call to a cell, and what came of it once that was asked for."""

    call: Call
    value: tuple[Any, Info] | None = None


@record
class CellCall:
    """A step under way in a cell, and the replica after it."""

    state: CellState
    answer: Answer = host()
    device: str = host()


@dataclasses.dataclass(frozen=True)
class Ray:
    """Replicas in a Ray cluster: a local one, started when it is first needed and ended with its last cell, or the one
    at `address` (`"auto"` finds one on this machine).

    A replica that makes rollouts reserves `collect`, one that makes updates `gradients`. A cell has `patience` seconds
    to start and `deadline` for a call (more if it has cells below; its first call has none if it compiles). One that
    dies or hangs is replaced and makes its calls since the last snapshot again: there is one every `snapshot_every`
    calls, or as many more as keep its cost below a twentieth. More than `retries` faults in a row end the run.
    `object_store` is the size of a local cluster's, in bytes.

    Errors: CompositionError for what the cluster can't hold and for parts that can't be sent; ExecutorError for a
    cluster that can't be used, and for a worker that fails again and again.
    """

    address: str | None = None
    collect: Resources = dataclasses.field(default_factory=Resources)
    gradients: Resources = dataclasses.field(default_factory=Resources)
    deadline: float = 600.0
    patience: float = 120.0
    snapshot_every: int = 32
    retries: int = 3
    object_store: int | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise CompositionError("the Ray executor needs ray: pip install 'fnrl[ray]', or use fnrl.Inline()")
        for name in ("collect", "gradients"):
            if not isinstance(getattr(self, name), Resources):
                raise CompositionError(f"Ray.{name} = {getattr(self, name)!r}: expected Resources(cpus=...)")
        if self.address is not None and not isinstance(self.address, str):
            raise CompositionError(f"Ray.address = {self.address!r}: expected 'host:port', 'auto' or None")
        limits = {"deadline": 1.0, "patience": 1.0, "snapshot_every": 1, "retries": 0}
        if self.object_store is not None:
            limits["object_store"] = _LEAST_STORE
        for name, low in limits.items():
            x = getattr(self, name)
            whole = isinstance(low, int)
            if isinstance(x, bool) or not isinstance(x, int if whole else int | float) or not low <= x < math.inf:
                what = "bytes" if name == "object_store" else "an int" if whole else "seconds"
                raise CompositionError(f"Ray.{name} = {x!r}: expected {what}, {low} or more")

    # -- the protocol -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opening(self, run: Run, node: Any) -> Iterator[None]:
        """Refuses what the cluster can't hold, and waits at the end until every cell has its state."""
        if not any(cells(node)):
            yield
            return
        if not run.path:
            shipped(run, node)
        session = connect(self.address, self.object_store)
        before = set(session.owners)
        try:
            if not run.path:
                self._check(run, node, session)
            yield
            for owner in set(session.owners) - before:
                owner.settle()
        except BaseException:
            for owner in set(session.owners) - before:
                owner.close()
            session.release()
            raise

    def init(self, run: Run, node: Any, key: Tensor) -> CellState:
        """A fresh replica in a cell of its own."""
        return self._start(run, node, "init", key.cpu().numpy())

    def submit(self, run: Run, node: Any, state: CellState, weights: Any) -> CellCall:
        """Asks the cell for one step."""
        owner: CellOwner = state.token.take()
        call = owner.step(owner.session.publish(weights))
        if ORDERS.stopped:
            owner.stop()
        return CellCall(CellState(owner.advance()), Answer(call), run.device)

    def result(self, call: Any) -> tuple[Any, Any, Info]:
        """Waits for the cell; its error is raised here with the type it had there."""
        if isinstance(call, Landed):
            return call.state, call.product, call.info
        answer: Answer = call.answer
        if answer.value is None:
            owner: CellOwner = call.state.token.owner
            try:
                *made, told = owner.answer(answer.call)
            except Exception as error:  # the faults that it ends with, of all cells and those below, are told with it
                met = (Counter(x) for x in (vars(error).get("faults", {}), owner.untold(), self.untold()))
                vars(error)["faults"] = dict(sum(met, Counter()))
                raise
            product, info = tree.to_torch(tuple(made), call.device)
            for warning in told:
                warnings.warn(warning, stacklevel=2)
            for name, n in owner.untold().items():
                info.report[name] = info.report.get(name, 0.0) + n
            answer.value = product, info
        return call.state, *answer.value

    def arrival(self, run: Run, calls: Sequence[Any], taken: int) -> int:
        """The oldest that has ended; in a cell that makes a call again, the one it took before."""
        if ORDERS.chosen is not None:
            return ORDERS.chosen["arrival", run.name, taken]
        _wait(calls, 1)
        return next(i for i, c in enumerate(calls) if _ended(c))

    def preempt(self, calls: Sequence[Any], enough: int) -> None:
        """Waits for enough cells, and tells the others."""
        if ORDERS.chosen is None:
            _wait(calls, enough)
        for call in calls:
            if not _ended(call):
                call.state.token.owner.stop()

    def stopped(self, run: Run, rollout: int, steps: int) -> bool:
        """In a cell: whether the present call was told to stop, or ended here before."""
        if ORDERS.chosen is not None:
            return ORDERS.chosen["length", run.name, rollout] == steps
        return ORDERS.stopped

    def adopt(self, weights: Any, made: Packed) -> None:
        """In a cell: the weights of this call, and how they came."""
        connect(self.address, self.object_store).adopt(weights, made)

    def stop_all(self) -> None:
        """Asks the steps under way in all cells of this process's to end early."""
        for owner in list(connect(self.address, self.object_store).owners):
            owner.stop()

    def gather(self, run: Run, node: Any, state: CellState) -> Any:
        """The state of the node in the cell, as pure records."""
        owner: CellOwner = state.token.take()
        pure, below = owner.answer(owner.ask("gathered"))
        owner.faults.update({name.removeprefix("faults/"): n for name, n in below.items()})
        return tree.to_torch(pure, run.device)

    def restore(self, run: Run, node: Any, pure: Any) -> CellState:
        """A new cell that continues from pure records."""
        return self._start(run, node, "restore", tree.to_numpy(pure))

    def close(self, run: Run, node: Any, state: CellState) -> None:
        """Ends the cell."""
        state.token.owner.close()

    def untold(self) -> dict[str, float]:
        """The faults of this process's cells, and of those below them, that no step has told."""
        return dict(sum((o.untold() for session in joined() for o in list(session.owners)), Counter()))

    def _check(self, run: Run, node: Any, session: Session) -> None:
        counts = Counter[str]()
        products = 0
        for child, n in cells(node):
            counts[kind_of(child)] += n
            products += n * product_size(run, child)
        refuse_more_than(session.nodes(), [(kind, n, getattr(self, kind)) for kind, n in counts.items()])
        refuse_small_store(session.store, weights_size(run), products)

    def _start(self, run: Run, node: Any, how: str, what: Any) -> CellState:
        kind = kind_of(node)
        resources: Resources = getattr(self, kind)
        session = connect(self.address, self.object_store)
        at = "cpu" if run.device == "cpu" or not resources.gpus else "cuda"
        inside = dataclasses.replace(run, executor=self, device=at)
        levels = 1 + sum(1 for _ in cells(node))
        terms = Terms(
            f"worker {run.name} ({node!r})",
            shipped(inside, node),
            resources,
            kind,
            run.compile,
            run.least is not None,
            levels > 1,
            self.patience,
            self.deadline * levels,
            self.snapshot_every,
            self.retries,
        )
        return CellState(CellOwner(session, terms, how, what).token())


def _ended(call: Any) -> bool:
    """Whether a call waits for nothing: its answer is there, or an error that whoever asks for it will be told."""
    return isinstance(call, Landed) or call.answer.call.done or call.state.token.owner.look() or call.answer.call.done


def _wait(calls: Sequence[Any], enough: int) -> None:
    """Waits until `enough` calls have ended; cells that die or hang meanwhile are replaced, and the others go on."""
    import ray

    while len(open_ := [c for c in calls if not _ended(c)]) > len(calls) - enough:
        heads = [c.state.token.owner.waiting[0] for c in open_]
        over = min((h.since + h.limit for h in heads if h.limit is not None), default=math.inf) - time.monotonic()
        ray.wait([h.ref for h in heads], timeout=None if over == math.inf else max(over, 0.01))
