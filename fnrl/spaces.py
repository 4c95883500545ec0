"""Spaces as hashable values: what an observation or an action looks like, before any environment runs."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fnrl.errors import CompositionError


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays of one shape and dtype; `low` and `high` are one number, or one per element in row-major order."""

    shape: tuple[int, ...]
    low: tuple[float, ...] | float = -math.inf
    high: tuple[float, ...] | float = math.inf
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> torch.dtype:
        """The dtype kept in storage: uint8 stays uint8, everything else becomes float32."""
        return torch.uint8 if self.dtype == "uint8" else torch.float32

    @property
    def integer(self) -> bool:
        """Whether its elements are whole numbers."""
        return np.dtype(self.dtype).kind in "iu"

    @property
    def nbytes(self) -> int:
        """Bytes of one value, as stored."""
        return self.size * self.stored.itemsize

    def bounds(self) -> tuple[Tensor, Tensor]:
        """`low` and `high` as float32 tensors of the space's shape."""
        return self._full(self.low), self._full(self.high)

    @cached_property
    def limited(self) -> tuple[bool, ...]:
        """Which elements have two bounds, so near each other that float32 holds their distance."""
        low, high = (np.broadcast_to(x, self.size) for x in (self.low, self.high))
        with np.errstate(over="ignore", invalid="ignore"):
            return tuple((high - low <= np.finfo(np.float32).max).tolist())  # of the host: no graph asks a tensor

    @cached_property
    def bounded(self) -> bool:
        """Whether all have."""
        return all(self.limited)

    def cast(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Values `[..., *shape]` within the bounds, in the space's own dtype: what float32 makes of its bounds can lie
        beside them, and a number that an integer type doesn't hold would become any other.
        """
        kind = np.dtype(self.dtype)
        if kind == np.float32:
            return x.astype(kind)
        return np.clip(x.astype(np.float64), *self._ends).astype(kind)

    @cached_property
    def _ends(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        kind = np.dtype(self.dtype)
        ends = (np.broadcast_to(np.asarray(x, np.float64), self.size) for x in (self.low, self.high))
        low, high = (x.reshape(self.shape) for x in ends)
        if self.integer:  # 2^63 is not an int64, and the float64 next to its greatest
            high = np.where(high >= float(np.iinfo(kind).max) + 1.0, np.nextafter(high, 0.0), high)
        return low, high

    def _full(self, x: tuple[float, ...] | float) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32).expand(self.size).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers `start, ..., start + n - 1`; fnrl counts from 0 and adds `start` on the way to the environment."""

    n: int
    start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """A scalar."""
        return ()

    @property
    def stored(self) -> torch.dtype:
        """int64."""
        return torch.int64

    @property
    def nbytes(self) -> int:
        """Bytes of one value, as stored."""
        return self.stored.itemsize


Space = Box | Discrete


@dataclasses.dataclass(frozen=True)
class Goal:
    """How the flat observation `[O]` of a goal environment is laid out: `obs` numbers of observation, `goal` of the
    goal that was achieved, and `goal` of the one desired.
    """

    obs: int
    goal: int

    NAMES: ClassVar[tuple[str, ...]] = ("observation", "achieved_goal", "desired_goal")

    def achieved(self, obs: Tensor) -> Tensor:
        """`[..., G]` of observations `[..., O]`."""
        return obs[..., self.obs : self.obs + self.goal]

    def desired(self, obs: Tensor) -> Tensor:
        """`[..., G]` of observations `[..., O]`."""
        return obs[..., self.obs + self.goal :]

    def with_desired(self, obs: Tensor, goal: Tensor) -> Tensor:
        """Observations `[..., O]` that say the goal `[..., G]`."""
        return torch.cat([obs[..., : self.obs + self.goal], goal], -1)

    def join(self, obs: Any, name: str) -> np.ndarray[Any, Any]:
        """One array of the three of gymnasium's Dict. Errors: ValueError for anything else."""
        sizes = dict(zip(self.NAMES, (self.obs, self.goal, self.goal), strict=True))
        found = {n: np.asarray(x) for n, x in obs.items()} if isinstance(obs, Mapping) else obs
        if not isinstance(found, dict) or {n: x.shape[-1:] for n, x in found.items()} != {
            n: (size,) for n, size in sizes.items()
        }:
            got = {n: list(x.shape) for n, x in found.items()} if isinstance(found, dict) else type(obs).__name__
            raise ValueError(f"an observation of {name} is a dict of {sizes} numbers, got {got}")
        return np.concatenate([found[n] for n in self.NAMES], -1)


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What the other parts need to know of an environment; `goal` where its observations hold goals."""

    name: str
    obs: Space
    action: Space
    goal: Goal | None = None


def with_goals(space: Any, what: str) -> tuple[Box, Goal] | None:
    """The flat space of a gymnasium Dict of `observation, achieved_goal, desired_goal`, and its layout; None for any
    other space.

    Errors: CompositionError where one of them is not a vector of floats, or the two goals differ in size.
    """
    if type(space).__name__ != "Dict" or set(space.spaces) != set(Goal.NAMES):
        return None
    parts = [from_gymnasium(space[n], f"{n} in {what}") for n in Goal.NAMES]
    vectors = [p for p in parts if isinstance(p, Box) and len(p.shape) == 1 and p.dtype.startswith("float")]
    if len(vectors) < len(parts) or vectors[1].shape != vectors[2].shape:
        raise CompositionError(f"{what} has goals, so it takes three vectors of floats, two of one size; it is {space}")
    low, high = (np.concatenate([getattr(space[n], end) for n in Goal.NAMES]) for end in ("low", "high"))
    flat = Box(low.shape, _ends(low), _ends(high), str(low.dtype))
    return flat, Goal(vectors[0].size, vectors[1].size)


def from_gymnasium(space: Any, what: str) -> Space:
    """The fnrl space of a gymnasium space.

    Errors: CompositionError naming any space that is neither Box nor Discrete, or that is empty.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return Discrete(int(space.n), int(space.start))
    if kind != "Box":
        raise CompositionError(
            f"{what} is a {kind} space ({space}); fnrl takes Box, Discrete, and a Dict of {', '.join(Goal.NAMES)}: "
            "flatten it with a wrapper"
        )
    if math.prod(space.shape) == 0:
        raise CompositionError(f"{what} is an empty Box of shape {space.shape}")
    return Box(tuple(space.shape), _ends(space.low), _ends(space.high), str(space.dtype))


def _ends(x: np.ndarray[Any, Any]) -> tuple[float, ...] | float:
    flat = x.astype(np.float64).ravel()
    return float(flat[0]) if bool((flat == flat[0]).all()) else tuple(flat.tolist())
