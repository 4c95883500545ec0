"""Places of a ring, and its rows at many places: in numpy where that can be, for a small batch costs but its calls.

Operators hide numpy from a vmap, as in `fnrl.random`; elsewhere (on a device, in a graph) the same is done in torch.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnrl.autodiff import under_transform
from fnrl.storages.ring import Rows, arrays_of, successors


def places(words: Tensor, where: Tensor, envs: int, whole: int) -> Tensor:
    """Places `[K * B]` (row x N + environment) drawn alike from the filled rows, by random words `[K, B]` of 32 bits;
    `where` `[2]` are the oldest row and their number, of `whole`.

    (start N + floor(size N w / 2^32)) mod (whole N)
    """
    if _on_numpy(words):
        return (_places if under_transform() else _numpy_places)(words, where, envs, whole)
    start, size = where.unbind(0)
    return ((words.flatten() * (size * envs) >> 32) + start * envs) % (whole * envs)


def ones(place: Tensor) -> Tensor:
    """A weight of 1 for each place `[K * B]`: made once, where it needn't be of a graph."""
    return _ones(len(place)) if _on_numpy(place) else torch.ones_like(place, dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _ones(count: int) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, a loss can use it
        return torch.ones(count)


def transitions(rows: Rows, place: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Observation, action, reward and termination at some places `[B]`, and what truly followed other places."""
    if _on_numpy(place):
        if not under_transform():
            return _taken(rows.arrays, place, last)
        return _take(rows.obs, rows.action, rows.reward, rows.terminated, rows.final_at, rows.finals, place, last)
    found = [getattr(rows, n).flatten(0, 1).index_select(0, place) for n in ("obs", "action", "reward", "terminated")]
    return found[0], found[1], found[2], found[3], successors(rows, last)


def _on_numpy(x: Tensor) -> bool:
    return x.is_cpu and not torch.compiler.is_compiling()


def _numpy_places(words: Tensor, where: Tensor, envs: int, whole: int) -> Tensor:
    start, size = where.tolist()
    place = words.numpy().reshape(*words.shape[:-2], -1) * (size * envs)
    place >>= 32
    place += start * envs
    if start + size > whole:
        place %= whole * envs
    return torch.from_numpy(place)


def _taken(arrays: tuple[Any, ...], place: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    obs, action, reward, terminated, final_at, finals, envs = arrays
    at, then = place.numpy(), last.numpy()
    following, final = obs.take(then + envs, 0, mode="wrap"), final_at.take(then)
    if final.max(initial=-1) >= 0:
        ended = np.flatnonzero(final >= 0)
        following[ended] = finals[final[ended]]
    found = obs.take(at, 0), action.take(at, 0), reward.take(at), terminated.take(at), following
    return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]


def _numpy_take(*args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _taken(arrays_of(*args[:-2]), args[-2], args[-1])


def _vmap_places(
    info: Any, in_dims: tuple[Any, ...], words: Tensor, where: Tensor, envs: int, whole: int
) -> tuple[Tensor, int]:
    alike = where.select(in_dims[1], 0) if in_dims[1] is not None else where  # lanes are filled together
    return _places(words.movedim(in_dims[0], 0), alike, envs, whole), 0


def _vmap_take(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, tuple[int, ...]]:
    lanes = [[x] * info.batch_size if d is None else x.unbind(d) for x, d in zip(args, in_dims, strict=True)]
    each = [_take(*lane) for lane in zip(*lanes, strict=True)]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * 5


_LIBRARY = torch.library.Library("fnrl", "FRAGMENT")
_LIBRARY.define("ring_places(Tensor words, Tensor where, int envs, int whole) -> Tensor")
_LIBRARY.define(
    "ring_take(Tensor obs, Tensor action, Tensor reward, Tensor terminated, Tensor final_at, Tensor finals, "
    "Tensor place, Tensor last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("ring_places", _numpy_places, "CPU")
_LIBRARY.impl("ring_take", _numpy_take, "CPU")
_places, _take = torch.ops.fnrl.ring_places.default, torch.ops.fnrl.ring_take.default
torch.library.register_vmap("fnrl::ring_places", _vmap_places, lib=_LIBRARY)
torch.library.register_vmap("fnrl::ring_take", _vmap_take, lib=_LIBRARY)
