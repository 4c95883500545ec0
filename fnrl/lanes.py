"""Lanes of seeds: who they are, whether so many fit, and how some are taken out of a state."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.component import PerLane, Schedule
from fnrl.errors import CompositionError
from fnrl.lift import Run
from fnrl.spaces import Space
from fnrl.storages.replay import memory
from fnrl.types import Tree

_COPIES = 3  # of parameters (old, new, gradient) and of a rollout (steps, stacked, samples) that live at once


def seeds(which: int | Sequence[int] | Tensor) -> Tensor:
    """The keys `[S, 2]` of seeds 0, 1, ... S - 1, or of the seeds that are named: for `scheme.init`.

    Errors: ValueError for none. A seed that comes twice is warned of: its lanes are equal.
    """
    return torch.stack([random.key(s) for s in named(which)])


def named(which: int | Sequence[int] | Tensor, repeated: bool = False) -> tuple[int, ...]:
    """The same as numbers; keys `[S, 2]` are those of the seeds that they belong to."""
    if isinstance(which, Tensor):
        if which.dim() != 2 or which.shape[1] != 2:
            raise ValueError(f"seeds: expected a count, seeds, or keys [S, 2], got a tensor {list(which.shape)}")
        words = (which.long() & 0xFFFFFFFF).tolist()
        found = tuple(high << 32 | low for high, low in words)
    elif isinstance(which, bool) or not isinstance(which, int | Sequence):
        raise ValueError(f"seeds={which!r}: expected a count, a sequence of seeds, or keys [S, 2]")
    else:
        found = tuple(range(which)) if isinstance(which, int) else tuple(which)
    if not found:
        raise ValueError(f"seeds={which!r}: expected at least one seed")
    twice = sorted({s for s in found if found.count(s) > 1})
    if twice and not repeated:
        warnings.warn(f"seeds that come more than once: {twice}; such lanes are equal", UserWarning, stacklevel=3)
    return found


def check(run: Run, topology: Any) -> None:
    """Refuses lanes that don't fit the sweep in the parts, or the memory of the machine (CompositionError)."""
    for name, value in run.parts.hypers().items():
        if isinstance(value, PerLane) and len(value.values) != len(set(run.numbers)):
            have = "one seed" if run.lanes is None else f"{len(set(run.numbers))} lanes"
            raise CompositionError(f"{name} has values for {len(value.values)} lanes, the run has {have}")
    if run.lanes is not None:
        need, have = run.lanes * lane_bytes(run.parts, topology), available(run.device)
        if need > have:
            raise CompositionError(
                f"{run.lanes} lanes need about {need / 1e9:.1f} GB, there are {have / 1e9:.1f} GB: at most "
                f"{have * run.lanes // need} lanes of {need / run.lanes / 1e6:.1f} MB fit. Train them in several runs, "
                "or make rollouts, ring or networks smaller"
            )


def available(device: str) -> int:
    """Bytes of memory to be had on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else memory()


def lane_bytes(parts: Any, topology: Any) -> int:
    """About how many bytes a lane takes: parameters, targets and optimiser, rollouts, and its ring."""
    params, target, opt = parts.algo.init(parts.actor, parts.actor.init(random.key(0)))
    held = sum(x.numel() * x.element_size() for x in tree.leaves((params, target, opt)))
    collectors, storages = _replicas(topology)
    n, spec = parts.env.num_envs, parts.actor.spec
    step = 2 * _size(spec.obs) + _size(spec.action) + 4 * 4 + 2 + 4 * parts.actor.memory(1).shape[-1]
    rollout = parts.storage.steps * n * step * collectors
    ring = parts.storage.nbytes(parts.actor, topology.envs(parts)) if hasattr(parts.storage, "nbytes") else 0
    return _COPIES * (held + rollout) + ring * storages


def _replicas(node: Any) -> tuple[int, int]:
    """Collectors and storages of a topology."""
    collectors = storages = 1
    while node is not None:
        workers = getattr(node, "workers", 1)
        collectors *= workers
        storages *= workers if getattr(node, "produces", None) != "rollouts" else 1
        node = getattr(node, "child", None)
    return collectors, storages


def _size(space: Space) -> int:
    return math.prod(space.shape) * torch.empty(0, dtype=space.stored).element_size()


def each(name: str, value: Any, lanes: int | None) -> Sequence[float]:
    """A number for all lanes, or one for each, as a sequence. Errors: ValueError."""
    if isinstance(value, Schedule):
        raise ValueError(f"set({name}={value!r}): expected a number; a schedule belongs into the parts")
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, int | float):
        return [value]
    if lanes is None or not isinstance(value, Sequence) or len(value) != lanes:
        raise ValueError(f"set({name}={value!r}): expected a number{f', or {lanes} of them' if lanes else ''}")
    return value


def numbers(state: Any) -> tuple[int, ...]:
    """The lanes of a state by their numbers; a lane that is another's shadow isn't told."""
    return tuple(dict.fromkeys(order(state)))


def order(state: Any) -> tuple[int, ...]:
    """The number of each lane as they lie in a state, shadows as well."""
    return state.which or tuple(range(state.lanes or 0))


def shown(state: Any) -> dict[int, int]:
    """Where the lanes of a state lie, by their numbers; of a lane and its shadow, the first."""
    return {n: order(state).index(n) for n in numbers(state)}


def swept(parts: Any) -> bool:
    """Whether lanes differ in more than their seeds."""
    return any(isinstance(x, PerLane) for x in parts.hypers().values())


def places(state: Any, wanted: Iterable[int]) -> tuple[list[int], tuple[int, ...]]:
    """Where the lanes of some numbers lie in a state, at least two of them; and their numbers.

    Errors: ValueError for none, or one that isn't there.
    """
    have, found = numbers(state), list(dict.fromkeys(wanted))
    missing = [i for i in found if i not in have]
    if not found or missing:
        raise ValueError(f"lanes {missing or found}: the state has {list(have) or 'no lanes: it is of one seed'}")
    found = found * 2 if len(found) == 1 else found
    where = shown(state)
    return [where[i] for i in found], tuple(found)


def pick(node: Tree, where: Sequence[int], lanes: int) -> Tree:
    """Those lanes of a gathered state."""
    for path, x in tree.paths(node):
        assert x.shape[:1] == (lanes,), f"{path} has no lanes: {list(x.shape)}"
    index = torch.tensor(where)
    return tree.map(lambda x: x.index_select(0, index.to(x.device)), node)


def iqm(scores: Sequence[float]) -> float:
    """The interquartile mean: of what is left without the lowest and the highest quarter, rounded down (arXiv
    2108.13264).
    """
    cut = len(scores) // 4
    kept = sorted(scores)[cut : len(scores) - cut]
    return math.fsum(kept) / len(kept)
