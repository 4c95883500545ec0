"""Hypothesis strategies of what components take: keys, spaces, rollouts, records and trees.

Sizes, probabilities and one seed are drawn; tensors are made of the seed, so that a failing example shrinks fast and
reads well.
"""

import functools
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random
from fnrl.record import host, record, static
from fnrl.spaces import Box, Discrete, EnvSpec, Space
from fnrl.types import Rollout, Transition

seeds = functools.partial(st.integers, 0, 2**32 - 1)


def keys() -> st.SearchStrategy[Tensor]:
    """Keys `[2]`."""
    return st.integers(0, 2**64 - 1).map(random.key)


# -- spaces ---------------------------------------------------------------------------------------------------------


@st.composite
def box(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float64", "uint8"), max_dims: int = 3) -> Box:
    """Box spaces of up to `max_dims` axes: unbounded, bounded by two numbers, or by two for each element."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=max_dims)))
    dtype = draw(st.sampled_from(dtypes))
    if dtype == "uint8":
        return Box(shape, 0.0, 255.0, dtype)
    bounds = draw(st.sampled_from(["none", "unit", "below", "each"]))
    if bounds == "each":
        ends = st.tuples(st.integers(-8, 0), st.integers(1, 8))
        size = int(np.prod(shape))
        low, high = zip(*draw(st.lists(ends, min_size=size, max_size=size)), strict=True)
        return Box(shape, tuple(map(float, low)), tuple(map(float, high)), dtype)
    return {
        "none": Box(shape, dtype=dtype),
        "unit": Box(shape, -1.0, 1.0, dtype),
        "below": Box(shape, low=-2.5, dtype=dtype),
    }[bounds]


def discrete() -> st.SearchStrategy[Discrete]:
    """Discrete spaces, of one choice too, counted from anywhere."""
    return st.builds(Discrete, st.integers(1, 5), st.integers(-2, 3))


def spaces() -> st.SearchStrategy[Space]:
    """Any space."""
    return st.one_of(discrete(), box())


def specs(obs: st.SearchStrategy[Space] | None = None, action: st.SearchStrategy[Space] | None = None) -> Any:
    """Specs of environments; of the observations and actions given, or of any."""
    actions = action if action is not None else st.one_of(discrete(), box(dtypes=("float32", "float64"), max_dims=2))
    return st.builds(EnvSpec, st.just("an environment"), obs if obs is not None else spaces(), actions)


# -- tensors of a space ---------------------------------------------------------------------------------------------


def observations(space: Space, lead: tuple[int, ...], seed: int) -> Tensor:
    """Random observations `[*lead, ...]` as they are stored."""
    rng = np.random.default_rng(seed)
    if isinstance(space, Discrete):
        return torch.from_numpy(rng.integers(0, space.n, lead))
    if space.stored == torch.uint8:
        return torch.from_numpy(rng.integers(0, 256, (*lead, *space.shape), dtype=np.uint8))
    low, high = (b.numpy() for b in space.bounds())
    return torch.from_numpy(np.clip(rng.normal(size=(*lead, *space.shape)), low, high).astype(np.float32))


def env_actions(space: Space, lead: tuple[int, ...], seed: int) -> Tensor:
    """Random actions `[*lead, ...]` as an environment takes them: inside the bounds, counted from `start`."""
    rng = np.random.default_rng(seed)
    if isinstance(space, Discrete):
        return torch.from_numpy(rng.integers(space.start, space.start + space.n, lead))
    low, high = (b.numpy() for b in space.bounds())
    free = rng.normal(size=(*lead, *space.shape))
    both = np.isfinite(low) & np.isfinite(high)
    first, last = np.where(both, low, 0.0), np.where(both, high, 1.0)
    inside = np.where(both, first + (last - first) * rng.random(free.shape), np.clip(free, low, high))
    return torch.from_numpy(inside.astype(np.float32))


def stored_actions(space: Space, lead: tuple[int, ...], seed: int) -> Tensor:
    """Random actions as on-policy storage keeps them: Discrete from 0 `[*lead]`, Box flat, unclipped `[*lead, A]`."""
    rng = np.random.default_rng(seed)
    if isinstance(space, Discrete):
        return torch.from_numpy(rng.integers(0, space.n, lead))
    return torch.from_numpy(rng.normal(size=(*lead, space.size)).astype(np.float32))


# -- rollouts -------------------------------------------------------------------------------------------------------


def make_rollout(
    spec: EnvSpec, steps: int, envs: int, seed: int, terminated: float, truncated: float, memory: int = 0
) -> Transition:
    """Transitions `[T, N]` whose episodes end with these chances, in either way or both at once.

    `next_obs[t]` is `obs[t + 1]` inside an episode and an observation of its own where one ends. `logp` is different
    in every step, so that it names a sample. `memory` `[T, N, memory]` is zero where an episode begins.
    """
    rng = np.random.default_rng(seed)
    lead = steps, envs
    end, cut = (torch.from_numpy(rng.random(lead) < p) for p in (terminated, truncated))
    done = end | cut
    inside = torch.cat([~done[:-1], torch.zeros_like(done[:1])])
    obs, last = observations(spec.obs, lead, seed), observations(spec.obs, lead, seed + 1)
    next_obs = torch.where(inside.reshape(*lead, *(1,) * (obs.dim() - 2)), obs.roll(-1, 0), last)
    first = torch.cat([torch.ones_like(done[:1]), done[:-1]])
    remembered = torch.from_numpy(rng.uniform(-1.0, 1.0, (*lead, memory)).astype(np.float32))
    return Transition(
        obs,
        stored_actions(spec.action, lead, seed + 2),
        -0.1 - 3.0 * torch.from_numpy(rng.permutation(steps * envs).reshape(lead)).float() / (steps * envs),
        torch.from_numpy(rng.normal(size=lead).astype(np.float32)),
        end,
        cut,
        next_obs,
        torch.where(first[..., None], 0.0, remembered),
    )


def chances() -> st.SearchStrategy[float]:
    """The chance that an episode ends at a step: never, at times, always."""
    return st.sampled_from([0.0, 0.2, 0.5, 1.0])


def rollouts(
    spec: EnvSpec,
    steps: st.SearchStrategy[int] | None = None,
    envs: st.SearchStrategy[int] | None = None,
    memory: int = 0,
) -> st.SearchStrategy[Rollout]:
    """Rollouts `[T, N]` of an environment, with terminations, truncations, both at once, and neither."""

    def rollout(steps: int, envs: int, seed: int, terminated: float, truncated: float) -> Rollout:
        made = make_rollout(spec, steps, envs, seed, terminated, truncated, memory)
        return Rollout(made, (), version=0, env_steps=made.reward.numel())

    lengths = steps if steps is not None else st.integers(1, 6)
    widths = envs if envs is not None else st.integers(1, 3)
    return st.builds(rollout, lengths, widths, seeds(), chances(), chances())


# -- records and trees ----------------------------------------------------------------------------------------------


@record
class Sample:
    """A record with a field of every kind."""

    left: Any
    right: Any
    label: str = static(default="")
    count: int = host(default=0)


_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def tensors(dtypes: tuple[torch.dtype, ...] = _DTYPES, max_dims: int = 3) -> st.SearchStrategy[Tensor]:
    """Tensors of any dtype and shape, empty ones and views among them."""

    def make(shape: list[int], dtype: torch.dtype, seed: int, turned: bool) -> Tensor:
        x = torch.tensor(10.0 * np.random.default_rng(seed).normal(size=tuple(shape))).to(dtype)
        return x.movedim(0, -1) if turned and shape else x

    shapes = st.lists(st.integers(0, 3), max_size=max_dims)
    return st.builds(make, shapes, st.sampled_from(dtypes), seeds(), st.booleans())


def _records_of(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(Sample, children, children, label=st.text("ab", max_size=2), count=st.integers(0, 9))


def trees(leaves: st.SearchStrategy[Any] | None = None, max_leaves: int = 6) -> st.SearchStrategy[Any]:
    """Trees of tensors: records, tuples, lists and dicts in each other; `()` is one."""

    def inner(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        few = st.lists(children, max_size=3)
        named = st.dictionaries(st.sampled_from(["a", "b", "c.d"]), children, max_size=3)
        return st.one_of(few, few.map(tuple), named, _records_of(children))

    return st.recursive(leaves if leaves is not None else tensors(), inner, max_leaves=max_leaves)


def records(leaves: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """Records with trees for fields, a static field and a host field."""
    return _records_of(trees(leaves))
