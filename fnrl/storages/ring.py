"""The ring behind a replay: tensors that are written in place, which is why a state of it can be used once.

Row r holds one step of N environments. The successor of an observation is the next row's, so it isn't stored again;
where an episode ended, the true successor lies among `finals`. One row more than the capacity holds the newest
successors. With lanes every tensor has `[S]` in front.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fnrl.record import host, record
from fnrl.token import Owner
from fnrl.types import Transition

_BLOCK = 1024  # priorities summed at once


@record
class Rows:
    """The ring's tensors: `[C + 1, N, ...]`, `finals [E, ...]`, and priorities, or `()`."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    final_at: Tensor  # int32: where among `finals` the successor lies; -1 where it is the next row
    finals: Tensor
    priority: Any  # [M], to the power alpha; 0 where a row can't be drawn; M is a multiple of 1024
    sums: Any  # [M / 1024]
    top: Any  # [], the greatest priority so far


@record
class RingRecord:
    """A ring as a pure record: the rows that are filled, and where it stands."""

    rows: Rows
    cursor: int = host()
    size: int = host()


class Ring(Owner):
    """The last `capacity` rows, in the order of their coming from `start` on."""

    def __init__(self, capacity: int, rows: Rows, cursor: int = 0, size: int = 0) -> None:
        self.capacity, self.rows, self.cursor, self.size = capacity, rows, cursor, size
        self.axis = rows.reward.dim() - 2
        self.free = self._unused()

    @staticmethod
    def empty(capacity: int, steps: Transition, prioritised: bool) -> "Ring":
        """A ring for rollouts `[T, N, ...]` such as this one (`[S, T, N, ...]` with lanes)."""
        axis = steps.reward.dim() - 2
        lead, n = steps.reward.shape[:axis], steps.reward.shape[-1]

        def room(x: Tensor, length: int = capacity + 1) -> Tensor:
            return x.new_empty(*lead, length, *x.shape[axis + 1 :])

        finals = room(steps.obs.select(axis + 1, 0), 16)
        priority: Any = ()
        if prioritised:
            priority = (*_blocks(steps.reward, axis, capacity + 1), steps.reward.new_ones(lead))
        at = torch.full((*lead, capacity + 1, n), -1, dtype=torch.int32, device=steps.reward.device)
        flags = room(steps.terminated), room(steps.truncated)
        made = Rows(
            room(steps.obs), room(steps.action), room(steps.reward), *flags, at, finals, *(priority or ((), (), ()))
        )
        return Ring(capacity, made)

    @property
    def start(self) -> int:
        """The oldest row."""
        return (self.cursor - self.size) % (self.capacity + 1)

    # -- writing --------------------------------------------------------------------------------------------------

    def append(self, steps: Transition) -> None:
        """Takes in T <= capacity rows, the oldest giving way."""
        length, rows = steps.reward.shape[self.axis], self.rows
        whole, first = self.capacity + 1, self.cursor
        self._forget(first, length)
        for name in ("obs", "action", "reward", "terminated", "truncated"):
            self._write(getattr(rows, name), getattr(steps, name), first)
        self.cursor = (first + length) % whole
        self._write(rows.obs, steps.next_obs.narrow(self.axis, length - 1, 1), self.cursor)
        self.size = min(self.size + length, self.capacity)
        self._keep_finals(steps, first)
        if isinstance(rows.priority, Tensor):
            n = steps.reward.shape[-1]
            index = (first + torch.arange(length, device=rows.priority.device)) % whole
            flat = (index[:, None] * n + torch.arange(n, device=index.device)).flatten()
            tip = self.cursor * n + torch.arange(n, device=index.device)
            self._set_priority(flat, rows.top[..., None].expand(*rows.top.shape, len(flat)))
            self._set_priority(tip, rows.top.new_zeros(*rows.top.shape, n))

    def prioritise(self, index: Tensor, priority: Tensor) -> None:
        """Sets the priorities `[B]` (to the power alpha) of the samples at `index` `[B]`; of one drawn twice, the
        greater.
        """
        rows = self.rows
        fresh = torch.zeros_like(rows.priority).scatter_reduce_(-1, index, priority, "amax", include_self=False)
        self._set_priority(index, fresh.gather(-1, index))
        torch.maximum(rows.top, priority.amax(-1), out=rows.top)

    def _set_priority(self, index: Tensor, priority: Tensor) -> None:
        rows = self.rows
        index = index.expand(priority.shape)
        rows.priority.scatter_(-1, index, priority)
        blocks = index // _BLOCK
        table = rows.priority.reshape(*rows.sums.shape, _BLOCK)
        picked = torch.take_along_dim(table, blocks[..., None], -2)
        rows.sums.scatter_(-1, blocks, picked.sum(-1))

    def _write(self, ring: Tensor, x: Tensor, first: int) -> None:
        length = x.shape[self.axis]
        before = min(length, self.capacity + 1 - first)
        ring.narrow(self.axis, first, before).copy_(x.narrow(self.axis, 0, before))
        if before < length:
            ring.narrow(self.axis, 0, length - before).copy_(x.narrow(self.axis, before, length - before))

    # -- the ends of episodes -------------------------------------------------------------------------------------

    def _lanes(self, x: Tensor) -> Tensor:
        """With one axis of lanes in front."""
        return x if self.axis == 1 else x[None]

    def _unused(self) -> list[list[int]]:
        at, places = self._lanes(self.rows.final_at), self.rows.finals.shape[self.axis]
        return [sorted(set(range(places)) - set(lane[lane >= 0].tolist()), reverse=True) for lane in at.unbind(0)]

    def _forget(self, first: int, length: int) -> None:
        at, whole = self._lanes(self.rows.final_at), self.capacity + 1
        index = torch.arange(first, first + length, device=at.device) % whole
        gone = at.index_select(1, index)
        if bool((gone >= 0).any()):
            for free, lane in zip(self.free, gone.unbind(0), strict=True):
                free.extend(lane[lane >= 0].tolist())
        at.index_fill_(1, index, -1)

    def _keep_finals(self, steps: Transition, first: int) -> None:
        done = self._lanes(steps.terminated | steps.truncated)
        if not bool(done.any()):
            return
        ends = done.nonzero().tolist()
        needed = max(sum(e[0] == lane for e in ends) - len(free) for lane, free in enumerate(self.free))
        if needed > 0:
            self._grow(needed)
        at, finals = self._lanes(self.rows.final_at), self._lanes(self.rows.finals)
        successors = self._lanes(steps.next_obs)
        for lane, t, env in ends:
            place = self.free[lane].pop()
            finals[lane, place] = successors[lane, t, env]
            at[lane, (first + t) % (self.capacity + 1), env] = place

    def _grow(self, needed: int) -> None:
        old = self.rows.finals
        places = old.shape[self.axis]
        more = max(places, needed)
        shape = list(old.shape)
        shape[self.axis] = more
        fields = {n: getattr(self.rows, n) for n in Rows.__fields__.data}  # type: ignore[attr-defined]
        self.rows = Rows(**{**fields, "finals": torch.cat([old, old.new_zeros(shape)], self.axis)})
        self.free = [[*range(places + more - 1, places - 1, -1), *free] for free in self.free]

    # -- to and from records --------------------------------------------------------------------------------------

    def gather(self) -> RingRecord:
        """A copy of what is filled, `finals` in the order of their rows: two rings of one history give one record."""
        filled = min(self.size, self.capacity) + 1
        fields: dict[str, Any] = {}
        for name in ("obs", "action", "reward", "terminated", "truncated", "final_at"):
            x: Tensor = getattr(self.rows, name).narrow(self.axis, 0, filled)
            fields[name] = x.clone()
        tip = self.cursor  # of the row of newest successors only the observation means anything
        for name in ("action", "reward", "terminated", "truncated"):
            fields[name].select(self.axis, tip).zero_()
        at, finals = self._lanes(fields["final_at"]), self._lanes(self.rows.finals)
        places = max(int((lane >= 0).sum()) for lane in at.unbind(0))
        kept = finals.new_zeros(finals.shape[0], places, *finals.shape[2:])
        for lane in range(at.shape[0]):
            used = at[lane] >= 0
            count = int(used.sum())
            kept[lane, :count] = finals[lane].index_select(0, at[lane][used].long())
            at[lane][used] = torch.arange(count, dtype=torch.int32, device=at.device)
        fields["finals"] = kept if self.axis == 1 else kept[0]
        for name in ("priority", "sums", "top"):
            x = getattr(self.rows, name)
            fields[name] = x.clone() if isinstance(x, Tensor) else ()
        return RingRecord(Rows(**fields), self.cursor, self.size)

    @staticmethod
    def restore(capacity: int, pure: RingRecord) -> "Ring":
        """A ring of its own from a record."""
        given = pure.rows
        axis = given.reward.dim() - 2
        filled = given.reward.shape[axis]

        def room(x: Tensor, length: int, fill: int = 0) -> Tensor:
            shape = [*x.shape]
            shape[axis] = length
            out = x.new_full(shape, fill)
            out.narrow(axis, 0, x.shape[axis]).copy_(x)
            return out

        whole = capacity + 1
        names = ("obs", "action", "reward", "terminated", "truncated")
        fields: dict[str, Any] = {n: room(getattr(given, n), whole) for n in names}
        fields["final_at"] = room(given.final_at, whole, -1)
        fields["finals"] = room(given.finals, max(16, given.finals.shape[axis]))
        fields.update(priority=(), sums=(), top=())
        if isinstance(given.priority, Tensor):
            priority, sums = _blocks(given.reward, axis, whole)
            length = min(priority.shape[-1], given.priority.shape[-1])
            priority[..., :length] = given.priority[..., :length]
            sums[..., : length // _BLOCK] = given.sums[..., : length // _BLOCK]
            fields.update(priority=priority, sums=sums, top=given.top.clone())
        assert filled <= whole
        return Ring(capacity, Rows(**fields), pure.cursor, pure.size)


def _blocks(reward: Tensor, axis: int, rows: int) -> tuple[Tensor, Tensor]:
    """Priorities of so many rows, and their sums, all 0."""
    blocks = math.ceil(rows * reward.shape[-1] / _BLOCK)
    zeros = reward.new_zeros(*reward.shape[:axis], blocks * _BLOCK)
    return zeros, zeros.new_zeros(*reward.shape[:axis], blocks)


def by_priority(priority: Tensor, sums: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Places `[K, B]` drawn in proportion to `priority [M]`, stratified over each batch, and their probabilities."""
    batch = uniform.shape[-1]
    ends = sums.cumsum(0)
    total = ends[-1]
    aim = (torch.arange(batch, device=uniform.device) + uniform) / batch * total
    # rounding can carry an aim to the very end, past the last block and place that hold anything: then it is those
    last_block = (torch.arange(len(sums), device=sums.device) * (sums > 0.0)).amax()
    block = torch.minimum((ends <= aim[..., None]).sum(-1), last_block)
    inside = (aim - (ends - sums)[block]).clamp(min=0.0)
    table = priority.reshape(-1, _BLOCK)[block]
    offset = (table.cumsum(-1) <= inside[..., None]).sum(-1).clamp(max=_BLOCK - 1)
    last = _BLOCK - 1 - (table.flip(-1) > 0.0).int().argmax(-1)
    offset = torch.minimum(offset, last)
    return block * _BLOCK + offset, table.gather(-1, offset[..., None]).squeeze(-1) / total
