"""The driver's end of a cell: it asks, waits, and when the cell is lost starts another one and asks again.

It keeps what makes the cell's state anew: a snapshot (at first, the key or the records that the state began with) and
the calls since, with the weights each was given. A replacement is restored from the snapshot and makes those calls
again; a node is a pure function of state and weights, so it comes to the same bits.
"""

import collections
import contextlib
import dataclasses
import math
import sys
import time
import weakref
from typing import Any, NoReturn

import torch

from fnrl.errors import ExecutorError, StaleStateError
from fnrl.executor.ray import faults
from fnrl.executor.ray.cell import Cell
from fnrl.executor.ray.cluster import Session
from fnrl.executor.ray.resources import Resources
from fnrl.executor.ray.wire import Packed
from fnrl.token import Owner
from fnrl.types import Choice

_GRACE = 5.0  # seconds a cell has to close its simulators
_ARRIVING = 1.0  # and an answer to travel, if the deadline passed while nobody asked
_SHARE = 20.0  # the calls between two snapshots cost at least as many times what a snapshot does,
_LONGEST = 16  # but they are at most so many times `snapshot_every`
_ROOM = 1 / 8  # of the object store, for weights that are kept: then a snapshot is due, too


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a cell is started with, and how long it may take for a start and for a call (seconds)."""

    name: str
    shipped: bytes
    resources: Resources
    kind: str
    compiles: bool
    stoppable: bool  # whether a call may be asked to end early
    deep: bool  # whether there are cells below it
    patience: float
    deadline: float
    snapshot_every: int
    retries: int


@dataclasses.dataclass(eq=False)
class Call:
    """Something asked of a cell; `answer` is there once it is `done`."""

    method: str
    args: tuple[Any, ...] = ()
    size: int = 0  # bytes of the arguments
    covers: int = 0  # of a snapshot: how many of the calls that are kept came before it
    limit: float | None = None
    since: float = 0.0  # when it became the one that the process works on
    stopped: bool = False  # whether it was asked to end early
    ref: Any = None
    answer: Any = None
    error: BaseException | None = None  # what came instead, and comes again for whoever asks again
    done: bool = False
    choices: tuple[Choice, ...] = ()  # made in it, which it makes again if it is asked again


class CellOwner(Owner):
    """A cell, and all that is needed to replace it; closing it, or losing the last state that refers to it, ends the
    process.
    """

    def __init__(self, session: Session, terms: Terms, how: str, what: Any) -> None:
        self.session, self.terms = session, terms
        self.birth = how, what
        self.kept: list[Call] = []  # steps since
        self.waiting: collections.deque[Call] = collections.deque()  # asked of the present process, in order
        self.every = terms.snapshot_every
        self.faults: collections.Counter[str] = collections.Counter()  # since they were told
        self.row: list[str] = []  # faults since the last call without one
        self.tripped: Call | None = None  # the last call in which an environment failed
        self.end: BaseException | None = None  # why there will be no other process
        self.troubled = False
        self.steps = 0
        self._start()
        session.owners.add(self)

    # -- asking ---------------------------------------------------------------------------------------------------

    def step(self, weights: Packed) -> Call:
        """Asks for a step, and does not wait. Errors: StaleStateError when the cluster is gone."""
        self.steps += 1
        passed_on = [weights] if self.terms.deep and not isinstance(weights.wire, bytes) else []
        call = self.ask("step", weights.wire, self.steps, passed_on, size=weights.size)
        self.kept.append(call)
        full = sum(c.size for c in self.kept) > _ROOM * self.session.store
        if (full or len(self.kept) >= self.every) and not any(c.method == "snapshot" for c in self.waiting):
            self._send(Call("snapshot", covers=len(self.kept)))
        return call

    def ask(self, method: str, *args: Any, size: int = 0) -> Call:
        """Asks, and does not wait. Errors: StaleStateError when the cluster is gone."""
        if not self.session.alive:
            raise StaleStateError(f"{self.terms.name}: its Ray cluster was shut down; restore a gathered state")
        if self.end is not None:
            raise self.end
        call = Call(method, args, size)
        self._send(call)
        return call

    def answer(self, call: Call) -> Any:
        """Waits for an answer; a cell that is lost is replaced.

        Errors: what the node raised; ExecutorError when the cell is lost again and again.
        """
        while not call.done:
            if self.end is not None:
                raise self.end
            try:
                self._advance()
            except Exception as error:
                self._replace(error)
                for other in list(self.session.owners):
                    if other is not self:
                        other.look()
        if not self.troubled:
            self.row = []
        self.troubled = False
        if call.error is not None:
            raise call.error
        answer, call.answer = call.answer, None
        return answer

    def stop(self) -> None:
        """Asks the step under way to end early."""
        for call in self.waiting:
            if call.method == "step":
                call.stopped = True
                self._stop(call)

    def settle(self) -> None:
        """Waits until the cell has a state. Errors: as `answer`; ExecutorError when it finds no place."""
        while self.waiting and self.waiting[0].method in ("hello", "begin"):
            try:
                self._advance()
            except Exception as error:
                self._replace(error)

    def look(self) -> bool:
        """Takes what has come, without waiting, and replaces a cell that is lost or overdue, so that the others go on.

        Gives whether there is an error to be raised where the answer is asked for.
        """
        import ray

        while self.waiting and self.end is None:
            call = self.waiting[0]
            overdue = call.limit is not None and time.monotonic() > call.since + call.limit
            if not overdue and not ray.wait([call.ref], timeout=0)[0]:
                return False
            try:
                self._advance()
            except Exception as error:
                kind = faults.kind_of(error)
                if kind is None or self._again(kind) or len(self.row) >= self.terms.retries:
                    return True
                self._replace(error)
        return self.end is not None

    def untold(self) -> collections.Counter[str]:
        """The faults since the last time, by kind."""
        found = collections.Counter({f"faults/{kind}": n for kind, n in self.faults.items()})
        self.faults.clear()
        return found

    def close(self) -> None:
        """Closes the node's simulators, if the cell is idle, and ends its process."""
        import ray

        if self.closed:
            return
        super().close()
        if self.session.alive and not self.waiting:
            with contextlib.suppress(Exception):
                ray.get(self.handle.finish.remote(), timeout=_GRACE)
        self._end()
        self.kept, self.birth = [], ("closed", None)
        self.waiting.clear()
        self.session.release(self)

    # -- the process ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """A process, brought to where the last one was, and asked again what that one has not answered."""
        import ray

        terms = self.terms
        # Told to stop while it runs, a call needs a thread of its own, and then Ray's main thread wakes 500 times a
        # second to look for signals (one of two cells lost 25 of 465 ms to it): so only where a call may be stopped.
        groups = {"concurrency_groups": {"control": 1}} if terms.stoppable else {}
        remote: Any = ray.remote
        actor = remote(max_restarts=0, **groups)(Cell)
        self.handle = actor.options(enable_task_events=False, **terms.resources.options()).remote()
        self._end = weakref.finalize(self, _kill, self.handle, self.session.name)
        asked = [c for c in self.waiting if c.method not in ("hello", "begin", "again", "snapshot")]
        self.pid, self.fresh = None, True
        self.waiting.clear()
        self._send(Call("hello"))
        self._send(Call("begin", (sys.path, torch.get_num_threads(), terms.shipped, *self.birth)))
        for call in self.kept:
            if call.done:
                self._send(Call("again", (*call.args, call.choices)))
        for call in asked:
            self._send(call)

    def _send(self, call: Call) -> None:
        starting = {"hello": self.terms.patience, "begin": self.terms.patience + self.terms.deadline}
        call.limit = starting.get(call.method, self.terms.deadline)
        if call.method in ("step", "again"):
            if self.fresh and self.terms.compiles:
                call.limit = None
            self.fresh = False
        call.ref = getattr(self.handle, call.method).remote(*call.args)
        if call.stopped:
            self._stop(call)
        if not self.waiting:
            call.since = time.monotonic()
        self.waiting.append(call)

    def _stop(self, call: Call) -> None:
        self.handle.stop.options(concurrency_group="control").remote(call.args[1])

    def _advance(self) -> None:
        """Waits for the answer to what was asked first."""
        import ray

        call = self.waiting[0]
        left = None if call.limit is None else max(call.since + call.limit - time.monotonic(), _ARRIVING)
        answer = ray.get(call.ref, timeout=left)
        self.waiting.popleft()
        if self.waiting:
            self.waiting[0].since = time.monotonic()
        call.ref, call.done, call.answer = None, True, answer
        self.tripped = None if self.tripped is call else self.tripped
        if call.method == "hello":
            self.pid = answer
        elif call.method == "step":
            call.choices = answer[1].choices
        elif call.method == "snapshot":
            self._keep(call)

    def _keep(self, call: Call) -> None:
        """A snapshot takes the place of the calls before it, and says how often there should be one."""
        pure, cost, each = call.answer
        self.birth = "restore", pure
        del self.kept[: call.covers]
        least = self.terms.snapshot_every
        self.every = min(max(least, math.ceil(_SHARE * cost / max(each, 1e-6))), _LONGEST * least)

    def _again(self, kind: str) -> bool:
        """Whether it is what another process has just met, too."""
        return kind == "environment" and self.tripped is self.waiting[0]

    def _replace(self, error: Exception) -> None:
        """Starts another process after a fault; raises what is none."""
        call, kind, name = self.waiting[0], faults.kind_of(error), self.terms.name
        if kind == "hung" and call.method == "hello":
            self._give_up(_unplaced(self.terms))
        if kind is None or self._again(kind):
            own = faults.own_error(error, name)
            if call.method in ("begin", "again"):  # it can't be brought to where it was
                self._give_up(own)
            self.waiting.popleft()
            self.kept = [c for c in self.kept if c is not call]
            call.done, call.error = True, own
            raise own from None
        self.faults[kind] += 1
        self.row.append(kind)
        self.tripped = call if kind == "environment" else self.tripped
        self.troubled = True
        if len(self.row) > self.terms.retries:
            failed = ExecutorError(
                f"{name} failed {len(self.row)} times in a row ({', '.join(self.row)}), the last time when asked to "
                f"{call.method}: {faults.HELP[kind]}. Ray(retries={self.terms.retries}) is how often it is replaced"
            )
            failed.__cause__ = error
            self._give_up(failed)
        self._end()
        self._start()

    def _give_up(self, error: BaseException) -> NoReturn:
        """Ends the process for good: the error is told now, and to whoever asks later."""
        self.end = error
        self.close()
        raise error


def _unplaced(terms: Terms) -> ExecutorError:
    import ray

    free, have = ray.available_resources(), ray.cluster_resources()
    said = ", ".join(f"{free.get(n, 0.0):g} of {have.get(n, 0.0):g} {n}" for n in terms.resources.amounts())
    return ExecutorError(
        f"{terms.name} asks for {terms.resources} and did not start within {terms.patience:g} s; free in the cluster: "
        f"{said}. Close states no longer used, or lower Ray({terms.kind}=Resources(...))"
    )


def _kill(handle: Any, session: str) -> None:
    import ray

    with contextlib.suppress(Exception):
        if ray.is_initialized() and ray.get_runtime_context().get_session_name() == session:
            ray.kill(handle)
