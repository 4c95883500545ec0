"""The ring behind a replay: tensors that are written in place, which is why a state of it can be used once.

Row r holds one step of N environments. The successor of an observation is the next row's, so it isn't stored again;
where an episode ended, the true successor lies among `finals`. One row more than the capacity holds the newest
successors; where observations are stacks of k frames, a row holds the newest one, and k - 1 rows more those before the
oldest row. With lanes every tensor has `[S]` in front.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnrl import tree
from fnrl.errors import EnvironmentFault
from fnrl.record import cached, host, record, replace
from fnrl.storages.frames import Frames
from fnrl.storages.priorities import as_many, no_priorities, write_priority
from fnrl.storages.spans import Spans
from fnrl.token import Owner, Token
from fnrl.types import Transition


@record
class Rows:
    """The ring's tensors: `[C + k, N, ...]`, `finals [E, ...]`, and priorities, or `()`."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_at: Tensor  # int32: where among `finals` the successor lies; -1 where it is the next row
    finals: Tensor
    priority: Any  # [M], to the power alpha; 0 where a row can't be drawn; M is a multiple of 128
    sums: Any  # [M / 128]
    top: Any  # [], the greatest priority so far

    @cached
    def arrays(self) -> tuple[Any, ...]:
        """`arrays_of` the columns that a transition is read from."""
        return arrays_of(self.obs, self.action, self.reward, self.terminated, self.final_at, self.finals)


def arrays_of(*columns: Tensor) -> tuple[Any, ...]:
    """The memory of some columns for numpy, row below row `[C N, ...]` (the last is `finals`), and N."""
    return *(x.flatten(0, 1).numpy() for x in columns[:-1]), columns[-1].numpy(), columns[0].shape[1]


@record
class RingRecord:
    """A ring as a pure record: the rows that are filled, and where it stands."""

    rows: Rows
    cursor: int = host()
    size: int = host()

    def apart(self) -> tuple["RingRecord", list[Callable[[], dict[str, Tensor]]]]:
        """What is small, and the rows in pieces: a checkpoint writes those that have changed since the one before."""
        length = self.rows.reward.shape[self._axis]
        each = sum(self._column(n).nbytes for n in _COLUMNS) // length
        step = 1 << max(0, (_PIECE // each).bit_length() - 1)
        cut = [functools.partial(self._piece, i, min(step, length - i)) for i in range(0, length, step)]
        rows: Any = replace(self.rows, **dict.fromkeys((*_COLUMNS, "final_at", "finals"), ()))
        return replace(self, rows=rows), cut

    def together(self, pieces: Sequence[Callable[[], dict[str, Tensor]]]) -> "RingRecord":
        """The record of such a small one and its pieces, in memory of its own."""
        first, last = pieces[0](), pieces[-1]()
        axis = first["reward"].dim() - 2
        step = first["reward"].shape[axis]
        length = (len(pieces) - 1) * step + last["reward"].shape[axis]
        columns = {
            n: x.new_empty(*x.shape[:axis], length, *x.shape[axis + 1 :]) for n, x in first.items() if n != "finals"
        }
        finals: list[Sequence[Tensor]] = []
        for i, piece in enumerate(pieces):
            cut = piece()
            for name, x in columns.items():
                x.narrow(axis, i * step, cut[name].shape[axis]).copy_(cut[name])
            ended = _lanes(cut["terminated"] | cut["truncated"], axis)
            finals.append(cut["finals"].split(ended.sum((1, 2)).tolist()))
        kept = [torch.cat(lane) for lane in zip(*finals, strict=True)]
        ended = _lanes(columns["terminated"] | columns["truncated"], axis)
        count = ended.flatten(1).cumsum(1).to(torch.int32).reshape(ended.shape)
        at, places = torch.where(ended, count - 1, -1), max(map(len, kept))
        padded = torch.stack([torch.cat([x, x.new_zeros(places - len(x), *x.shape[1:])]) for x in kept])
        at, padded = (at, padded) if axis else (at[0], padded[0])
        return replace(self, rows=replace(self.rows, **columns, final_at=at, finals=padded))

    @property
    def _axis(self) -> int:
        return self.rows.reward.dim() - 2

    def _column(self, name: str) -> Tensor:
        return getattr(self.rows, name)

    def _piece(self, start: int, length: int) -> dict[str, Tensor]:
        """Some rows, and the successors where an episode ended, lane by lane in the order of rows."""
        axis, tip = self._axis, self.cursor - start
        cut = {n: self._column(n).narrow(axis, start, length) for n in (*_COLUMNS, "final_at")}
        if 0 <= tip < length:  # of the row of newest successors only the observation means anything
            for name, x in cut.items():
                if name != "obs":
                    cut[name] = x.clone()
                    cut[name].select(axis, tip).fill_(-1 if name == "final_at" else 0)
        at = _lanes(cut.pop("final_at"), axis)
        lanes = zip(_lanes(self.rows.finals, axis).unbind(0), at.unbind(0), strict=True)
        return cut | {"finals": torch.cat([x.index_select(0, i[i >= 0].long()) for x, i in lanes])}


_COLUMNS = ("obs", "action", "reward", "terminated", "truncated")
_PIECE = 2**22  # bytes of a piece of a saved ring, about


def _lanes(x: Any, axis: int) -> Any:
    """With one axis of lanes in front."""
    return x if axis else x[None]


def _array(x: Tensor) -> Any:
    """The same memory as a numpy array, where there can be one: it is indexed in a tenth of the time."""
    return x.numpy() if x.is_cpu else x


def _some(x: Any) -> bool:
    """Whether anything is True: of an array of one element in a tenth of `any`'s time, of more in a third."""
    if isinstance(x, np.ndarray):
        return bool(x.item() if x.size == 1 else np.count_nonzero(x))
    return bool(x.any())


class Ring(Owner):
    """The last `capacity` rows, in the order of their coming from `start` on."""

    def __init__(self, capacity: int, rows: Rows, cursor: int, size: int, frames: Frames | None) -> None:
        self.capacity, self.rows, self.cursor, self.size, self.frames = capacity, rows, cursor, size, frames
        self.axis, self.whole = rows.reward.dim() - 2, rows_of(capacity, frames)
        self._lead = (slice(None),) * self.axis
        self._columns = [_array(getattr(rows, n)) for n in _COLUMNS]
        self._final_at = _lanes(_array(rows.final_at), self.axis)
        self.free = self._unused()
        self.spans: Spans | None = None
        self._where = np.array((self.start, size))
        self.where = torch.from_numpy(self._where)  # the oldest row, and how many: as a lifted method takes them
        self._restored = False  # whether what comes may be of other episodes than the newest row

    @staticmethod
    def empty(capacity: int, steps: Transition, prioritised: bool, frames: Frames | None = None) -> "Ring":
        """A ring for rollouts `[T, N, ...]` such as this one (`[S, T, N, ...]` with lanes)."""
        axis, length = steps.reward.dim() - 2, rows_of(capacity, frames)
        lead, n = steps.reward.shape[:axis], steps.reward.shape[-1]
        obs = steps.obs if frames is None else steps.obs.select(axis + 2, -1)

        def room(x: Tensor, length: int = length) -> Tensor:
            return _empty(x, (*lead, length, *x.shape[axis + 1 :]), axis)

        finals = room(obs.select(axis + 1, 0), _finals(length, n))
        priority: Any = ()
        if prioritised:
            priority = (*no_priorities(steps.reward, axis, length), steps.reward.new_ones(lead))
        at = room(steps.reward.int()).fill_(-1)
        flags = room(steps.terminated), room(steps.truncated)
        made = Rows(room(obs), room(steps.action), room(steps.reward), *flags, at, finals, *(priority or ((), (), ())))
        ring = Ring(capacity, made, length - capacity - 1, 0, frames)
        if frames is not None:  # what the first stack holds besides its newest frame goes before the first row
            before = steps.obs.select(axis, 0).narrow(axis + 1, 0, ring.cursor).movedim(axis + 1, axis)
            ring._write(ring._columns[0], _array(before), 0)
            for flag in (*flags, made.action, made.reward):
                flag.narrow(axis, 0, ring.cursor).zero_()
        return ring

    @property
    def start(self) -> int:
        """The oldest row."""
        return (self.cursor - self.size) % self.whole

    # -- writing --------------------------------------------------------------------------------------------------

    def append(self, steps: Transition, sound: Any = ()) -> Token:
        """Takes in T <= capacity rows, the oldest giving way, and returns the token of the ring that holds them; of a
        lane that is not `sound` `[S]`, whatever it is.

        Errors: EnvironmentFault where frames are not stacked as they should be; nothing is taken in.
        """
        if self._restored:
            self._end_what_was_restarted(steps.obs)
        length, rows = steps.reward.shape[self.axis], self.rows
        whole, first = self.whole, self.cursor
        if self.frames is not None:
            self._check_stacks(self.frames, steps, sound)
            newest = steps.obs.select(self.axis + 2, -1), steps.next_obs.select(self.axis + 2, -1)
            steps = replace(steps, obs=newest[0], next_obs=newest[1])
        token = self.advance()
        self._forget(first, length)
        held = steps.__dict__
        given = [held[n].numpy() if held[n].is_cpu else held[n] for n in _COLUMNS]
        if first + length <= whole:
            at = (*self._lead, slice(first, first + length))
            for column, x in zip(self._columns, given, strict=True):
                column[at] = x
        else:
            for column, x in zip(self._columns, given, strict=True):
                self._write(column, x, first)
        self.cursor = (first + length) % whole
        newest = _array(steps.next_obs)[(*self._lead, length - 1)]
        self._columns[0][(*self._lead, self.cursor)] = newest
        before, self.size = self.size, min(self.size + length, self.capacity)
        self._where[0], self._where[1] = (self.cursor - self.size) % whole, self.size
        if _some(given[-1]) or _some(given[-2]):
            self._keep_finals(steps, first)
        if self.spans is not None:
            self.spans.follow(steps.terminated | steps.truncated, first, before)
        if isinstance(rows.priority, Tensor):
            n = steps.reward.shape[-1]
            index = (first + torch.arange(length, device=rows.priority.device)) % whole
            flat = (index[:, None] * n + torch.arange(n, device=index.device)).flatten()
            write_priority(rows.priority, rows.sums, flat, rows.top[..., None].expand(*rows.top.shape, len(flat)))
            rest = (self.cursor + torch.arange(whole - self.capacity, device=index.device)) % whole
            tip = (rest[:, None] * n + torch.arange(n, device=index.device)).flatten()
            write_priority(rows.priority, rows.sums, tip, rows.top.new_zeros(*rows.top.shape, len(tip)))
        return token

    def prioritise(self, index: Tensor, priority: Tensor) -> None:
        """Sets the priorities `[B]` (to the power alpha) of the samples at `index` `[B]`; of one drawn twice, the
        greater.
        """
        write_priority(self.rows.priority, self.rows.sums, index, priority)
        torch.maximum(self.rows.top, priority.amax(-1), out=self.rows.top)

    def _check_stacks(self, frames: Frames, steps: Transition, sound: Any) -> None:
        """The older frames of an observation are the newer ones of the observation before, or those of a first one."""
        axis, k, rows = self.axis, frames.count, self.rows
        obs, following = steps.obs, steps.next_obs
        ended = steps.terminated | steps.truncated
        shifted = (following.narrow(axis + 2, 0, k - 1) == obs.narrow(axis + 2, 1, k - 1)).flatten(axis + 2).all(-1)
        before, begins = following.narrow(axis, 0, obs.shape[axis] - 1), ended.narrow(axis, 0, obs.shape[axis] - 1)
        given = obs.narrow(axis, 1, obs.shape[axis] - 1)
        if self.size > 0:
            n, newest = obs.shape[axis + 1], (self.cursor - 1) % self.whole
            at, tip = rows.final_at, self.cursor * n + torch.arange(n, device=obs.device)
            lanes = zip(_lanes(rows.obs, axis).unbind(0), _lanes(at, axis).unbind(0), strict=True)
            stacks = torch.stack([frames.stack(x.flatten(0, 1), i.flatten(), tip, n) for x, i in lanes])
            before = torch.cat([(stacks if axis == 1 else stacks[0]).unsqueeze(axis), before], axis)
            begins, given = torch.cat([at.narrow(axis, newest, 1) >= 0, begins], axis), obs
        first = frames.first(given, axis + 2)
        begins_ = begins.reshape(*begins.shape, *[1] * (obs.dim() - axis - 2))
        follows = (torch.where(begins_, first, before) == given).flatten(axis + 2).all(-1)
        for wrong, what in ((~shifted, "a successor"), (~follows, "an observation")):
            wrong = wrong & sound[:, None, None] if isinstance(sound, Tensor) and axis else wrong
            if bool(wrong.any()):
                where = wrong.nonzero()[0].tolist()
                raise EnvironmentFault(
                    f"{what} of environment {where[-1]} is not a stack of frames as Replay(frames={frames!r}) has it: "
                    "its older frames are not the newer ones of the one before, nor those an episode begins with. "
                    "Stack as gymnasium.wrappers.FrameStackObservation does, with the same padding, or pass frames=None"
                )

    def _write(self, column: Any, x: Any, first: int) -> None:
        lead, over = self._lead, first + x.shape[self.axis] - self.whole
        if over > 0:
            column[(*lead, slice(over))] = x[(*lead, slice(-over, None))]
            x = x[(*lead, slice(-over))]
        column[(*lead, slice(first, first + x.shape[self.axis]))] = x

    # -- the ends of episodes -------------------------------------------------------------------------------------

    def _unused(self) -> list[list[int]]:
        at, places = _lanes(self.rows.final_at, self.axis), self.rows.finals.shape[self.axis]
        return [sorted(set(range(places)) - set(lane[lane >= 0].tolist()), reverse=True) for lane in at.unbind(0)]

    def _forget(self, first: int, length: int) -> None:
        end = first + length
        for rows in (slice(first, end), *([slice(end - self.whole)] if end > self.whole else ())):
            gone = self._final_at[:, rows]
            if _some(gone >= 0):
                for free, lane in zip(self.free, gone, strict=True):
                    free.extend(lane[lane >= 0].tolist())
                gone[...] = -1

    def _keep_finals(self, steps: Transition, first: int) -> None:
        ended = steps.terminated | steps.truncated
        self._put_finals(_lanes(ended, self.axis), _lanes(steps.next_obs, self.axis), first)

    def _put_finals(self, ended: Tensor, successors: Tensor, first: int) -> None:
        """Keeps `successors` `[S, T, N, ...]` where episodes ended `[S, T, N]`, of the rows from `first` on."""
        ends = ended.nonzero().tolist()
        needed = max(sum(e[0] == lane for e in ends) - len(free) for lane, free in enumerate(self.free))
        if needed > 0:
            self._grow(needed)
        at, finals = _lanes(self.rows.final_at, self.axis), _lanes(self.rows.finals, self.axis)
        for lane, t, env in ends:
            place = self.free[lane].pop()
            finals[lane, place] = successors[lane, t, env]
            at[lane, (first + t) % self.whole, env] = place

    def _end_what_was_restarted(self, obs: Tensor) -> None:
        """Of a ring that was restored, and simulators that weren't: where what comes first `[T, N, ...]` isn't what
        followed the newest row, another episode has begun, and that one counts as truncated.
        """
        axis, newest, self._restored = self.axis, (self.cursor - 1) % self.whole, False
        first, followed = obs.select(axis, 0), self.rows.obs.select(axis, self.cursor)
        first = first if self.frames is None else first.select(axis + 1, -1)
        other = (first != followed).reshape(*followed.shape[: axis + 1], -1).any(-1)
        ended = other & (self.rows.final_at.select(axis, newest) < 0)
        if self.size == 0 or not bool(ended.any()):
            return
        self.rows.truncated.select(axis, newest).logical_or_(ended)
        self._put_finals(_lanes(ended, axis)[:, None], _lanes(followed, axis)[:, None], newest)
        if self.spans is not None:
            self.mark_episodes()

    def _grow(self, needed: int) -> None:
        old = self.rows.finals
        places = old.shape[self.axis]
        more = max(places, needed)
        shape = list(old.shape)
        shape[self.axis] = more
        fields = {n: getattr(self.rows, n) for n in Rows.__fields__.data}  # type: ignore[attr-defined]
        self.rows = Rows(**{**fields, "finals": torch.cat([old, old.new_zeros(shape)], self.axis)})
        self.free = [[*range(places + more - 1, places - 1, -1), *free] for free in self.free]

    def mark_episodes(self) -> None:
        """Keeps `spans` from now on: of the rows there are, and of those to come."""
        self.spans = Spans.of(self.rows.terminated | self.rows.truncated, self.start, self.size)

    # -- to and from records --------------------------------------------------------------------------------------

    def view(self) -> RingRecord:
        """What is filled, in the ring's own memory: to be read before the next append."""
        filled = self.size + self.whole - self.capacity
        names = *_COLUMNS, "final_at"
        rows: Any = {n: getattr(self.rows, n).narrow(self.axis, 0, filled) for n in names}
        return RingRecord(replace(self.rows, **rows), self.cursor, self.size)

    def gather(self) -> RingRecord:
        """A copy of what is filled, `finals` in the order of their rows: two rings of one history give one record."""
        small, pieces = self.view().apart()
        return tree.map(torch.clone, small).together(pieces)

    @staticmethod
    def restore(capacity: int, pure: RingRecord, frames: Frames | None = None, copy: bool = True) -> "Ring":
        """A ring from a record: of its own, or (`copy=False`) in the record's memory where that has the size."""
        given = pure.rows
        axis = given.reward.dim() - 2

        def room(x: Tensor, length: int, fill: int | None = 0) -> Tensor:
            shape = [*x.shape]
            shape[axis] = length
            if not copy and x.shape[axis] == length and x.is_contiguous():
                return x
            out = _empty(x, shape, axis)
            if fill is not None:
                out.fill_(fill)
            out.narrow(axis, 0, x.shape[axis]).copy_(x)
            return out

        length = rows_of(capacity, frames)
        fields: dict[str, Any] = {n: room(getattr(given, n), length) for n in _COLUMNS}
        fields["final_at"] = room(given.final_at, length, -1)
        ends = max(given.finals.shape[axis], _finals(length, given.reward.shape[-1]))
        fields["finals"] = room(given.finals, ends, None)
        fields.update(priority=(), sums=(), top=())
        if isinstance(given.priority, Tensor):
            new = no_priorities(given.reward, axis, length)
            priority, sums = as_many(given.priority, given.sums, new)
            fields.update(priority=priority, sums=sums, top=given.top.clone())
        ring = Ring(capacity, Rows(**fields), pure.cursor, pure.size, frames)
        ring._restored = True
        return ring


def _empty(x: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """As `x.new_empty(shape)`, of numpy's memory where rows fill it in their order: it asks for large pages, and a
    batch from all over a ring finds its rows in four fifths of the time.
    """
    return torch.from_numpy(np.empty(shape, x.numpy().dtype)) if x.is_cpu and axis == 0 else x.new_empty(shape)


def _finals(rows: int, envs: int) -> int:
    """Places for the ends of episodes, so many that few rings outgrow them: a graph is of one size. Where nothing was
    written an operating system has no memory for it yet.
    """
    return min(rows * envs, max(1024, rows * envs // 16))


def rows_of(capacity: int, frames: Frames | None) -> int:
    """Rows of a ring: those that can be drawn, the newest successors, and frames before the oldest."""
    return capacity + 1 + (0 if frames is None else frames.count - 1)


def successors(rows: Rows, place: Tensor) -> Tensor:
    """The observations `[B, ...]` that truly followed the steps at some places `[B]` (row x N + environment)."""
    whole, n = rows.reward.shape
    obs = rows.obs.flatten(0, 1)
    following = obs.index_select(0, (place + n) % (whole * n))
    at = rows.final_at.flatten().index_select(0, place)
    ended = (at >= 0).reshape(-1, *[1] * (obs.dim() - 1))
    return torch.where(ended, rows.finals.index_select(0, at.clamp(min=0)), following)
