"""Observations that are stacks of frames: one frame a row is stored, and the stack is made again when it is drawn."""

import torch
from torch import Tensor

from fnrl.component import component, option, setting
from fnrl.errors import CompositionError
from fnrl.spaces import Box, Space


@component
class Frames:
    """Observations `[k, ...]` of the k newest frames, the newest last: gymnasium's `FrameStackObservation` makes them.

    o_t = (f_{t-k+1}, ..., f_t); before an episode's first frame stands that frame again, or `padding`.
    """

    count: int = setting(default=4, low=2, help="frames of an observation, along its first axis")
    padding: float | None = option(default=None, help="stands before the first frame; None for that frame again")

    def check(self, space: Space) -> None:
        """Refuses a space that can't hold such stacks (CompositionError)."""
        if isinstance(space, Box) and space.shape[:1] == (self.count,):
            low, high = space.bounds()
            whole = space.stored.is_floating_point or self.padding is None or float(self.padding).is_integer()
            if self.padding is not None and not (
                whole and bool((low <= self.padding).all() & (high >= self.padding).all())
            ):
                raise CompositionError(
                    f"Replay(frames={self!r}): a frame of {space} can't be filled with {self.padding}"
                )
            if bool((low == low[:1]).all() & (high == high[:1]).all()):
                return
        raise CompositionError(
            f"Replay(frames={self!r}) needs an observation whose first axis is {self.count} frames of equal bounds, "
            f"as gymnasium.wrappers.FrameStackObservation makes it, not {space}: pass frames=None, or its count"
        )

    def first(self, obs: Tensor, axis: int) -> Tensor:
        """The stack that an episode begins with if its newest frame is that of `obs`, whose frames lie along `axis`."""
        newest = obs.narrow(axis, self.count - 1, 1)
        before = newest if self.padding is None else torch.full_like(newest, self.padding)
        return torch.cat([*[before] * (self.count - 1), newest], axis)

    def stack(self, frames: Tensor, final_at: Tensor, place: Tensor, envs: int) -> Tensor:
        """The stacks `[B, k, ...]` whose newest frames lie at `place` `[B]` of `frames [R * N, ...]`: back to the first
        frame after one where an episode ended, `final_at [R * N]` >= 0.
        """
        at, within = [place], [torch.ones_like(place, dtype=torch.bool)]
        for _ in range(self.count - 1):
            before = (at[-1] - envs) % final_at.shape[0]
            within.append(within[-1] & (final_at.index_select(0, before) < 0))
            at.append(torch.where(within[-1], before, at[-1]))
        found = frames.index_select(0, torch.stack(at[::-1], -1).flatten()).reshape(
            *place.shape, self.count, *frames.shape[1:]
        )
        if self.padding is None:
            return found
        inside = torch.stack(within[::-1], -1)
        return torch.where(inside.reshape(*inside.shape, *[1] * (found.dim() - 2)), found, self.padding).to(found.dtype)
