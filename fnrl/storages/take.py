"""Rows of a ring at many places: one call of numpy where it can be, for a small batch costs little but its calls."""

from typing import Any

import torch
from torch import Tensor

from fnrl.storages.ring import Rows, successors


def transitions(rows: Rows, place: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Observations and actions at some places `[B]` (row x N + environment), and what truly followed other places."""
    obs, action = rows.obs.flatten(0, 1), rows.action.flatten(0, 1)
    if place.is_cpu and not torch.compiler.is_compiling():
        return _take(obs, action, rows.final_at.flatten(), rows.finals, place, last, rows.reward.shape[1])
    return obs.index_select(0, place), action.index_select(0, place), successors(rows, last)


def _numpy(
    obs: Tensor, action: Tensor, final_at: Tensor, finals: Tensor, place: Tensor, last: Tensor, envs: int
) -> tuple[Tensor, Tensor, Tensor]:
    whole, at, then = obs.numpy(), place.numpy(), last.numpy()
    following = whole.take((then + envs) % len(whole), 0)
    final = final_at.numpy().take(then)
    ended = final >= 0
    if ended.any():
        following[ended] = finals.numpy()[final[ended]]
    return tuple(torch.from_numpy(x) for x in (whole.take(at, 0), action.numpy().take(at, 0), following))  # type: ignore


def _lanes(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, int, int]]:
    lanes = [[x] * info.batch_size if d is None else x.unbind(d) for x, d in zip(args, in_dims, strict=True)]
    return tuple(map(torch.stack, zip(*(_take(*lane) for lane in zip(*lanes, strict=True)), strict=True))), (0, 0, 0)


_LIBRARY = torch.library.Library("fnrl", "FRAGMENT")
_LIBRARY.define(
    "ring_take(Tensor obs, Tensor action, Tensor final_at, Tensor finals, Tensor place, Tensor last, int envs) -> "
    "(Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("ring_take", _numpy, "CPU")
_take = torch.ops.fnrl.ring_take.default
torch.library.register_vmap("fnrl::ring_take", _lanes, lib=_LIBRARY)
