"""Spaces as hashable values: what an observation or an action looks like, before any environment runs."""

import dataclasses
import math
from functools import cached_property
from typing import Any

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

    def bounds(self) -> tuple[Tensor, Tensor]:
        """`low` and `high` as float32 tensors of the space's shape."""
        return self._full(self.low), self._full(self.high)

    @cached_property
    def bounded(self) -> bool:
        """Whether every element has a finite lower and upper bound."""
        return all(bool(torch.isfinite(b).all()) for b in self.bounds())

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


Space = Box | Discrete


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What the other parts need to know of an environment."""

    name: str
    obs: Space
    action: Space


def from_gymnasium(space: Any, what: str) -> Space:
    """The fnrl space of a gymnasium space.

    Errors: CompositionError naming any space that is neither Box nor Discrete, or that is empty.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return Discrete(int(space.n), int(space.start))
    if kind != "Box":
        raise CompositionError(
            f"{what} is a {kind} space ({space}); fnrl takes Box and Discrete: flatten it with a wrapper"
        )
    if math.prod(space.shape) == 0:
        raise CompositionError(f"{what} is an empty Box of shape {space.shape}")
    return Box(tuple(space.shape), _ends(space.low), _ends(space.high), str(space.dtype))


def _ends(x: np.ndarray[Any, Any]) -> tuple[float, ...] | float:
    flat = x.astype(np.float64).ravel()
    return float(flat[0]) if bool((flat == flat[0]).all()) else tuple(flat.tolist())
