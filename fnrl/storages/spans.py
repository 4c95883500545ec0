"""Where the episode of each row of a ring begins and ends: what hindsight needs to know of it besides its rows."""

import torch
from torch import Tensor

from fnrl.record import record


@record
class Spans:
    """How far each row is from the ends of its episode, int32 `[C + 1, N]` (`[S, C + 1, N]` with lanes), written in
    place as the ring is. It follows from the rows, so that no record of a ring holds it.
    """

    since: Tensor  # steps since its first row, or since the oldest there was
    left: Tensor  # steps until its last row; -1 while it goes on

    @staticmethod
    def of(done: Tensor, start: int, size: int) -> "Spans":
        """Of a ring whose episodes ended where `done` `[C + 1, N]` says, with `size` rows from `start` on."""
        whole = done.shape[-2]
        made = Spans(*(torch.full_like(done, -1, dtype=torch.int32) for _ in range(2)))
        rows = (start + torch.arange(size, device=done.device)) % whole
        made.follow(done.index_select(-2, rows), start, 0)
        return made

    def follow(self, done: Tensor, first: int, before: int) -> None:
        """Takes in `done` `[T, N]` of the rows from `first` on, written over the oldest; `before` rows were there."""
        since, left, ends = (x if x.dim() == 3 else x[None] for x in (self.since, self.left, done))
        whole, length = since.shape[1], ends.shape[1]
        back = first - 1
        running = torch.full_like(since[:, 0], -1)
        if before > 0:
            last = left[:, back % whole]
            running = torch.where(last == 0, -1, since[:, back % whole])
        for t in range(length):
            row = (first + t) % whole
            running = running + 1
            since[:, row], left[:, row] = running, -1
            running = torch.where(ends[:, t], -1, running)
        lane, t, env = ends.nonzero(as_tuple=True)
        if not len(t):
            return
        kept = min(before, whole - 1 - length) + t  # older rows that are still there
        row = (first + t) % whole
        reach = torch.minimum(since[lane, row, env].long(), kept)
        steps = torch.arange(int(reach.amax()) + 1, device=t.device)
        inside = steps <= reach[:, None]
        rows = ((row[:, None] - steps) % whole)[inside]
        lanes, envs = (x[:, None].expand(inside.shape)[inside] for x in (lane, env))
        left[lanes, rows, envs] = steps.expand(inside.shape)[inside].to(left.dtype)
