"""Assertions on shapes, dtypes and finiteness: documentation that can't rot.

They run when `FNRL_CHECK=1` is in the environment (the test suite sets it) and cost one branch otherwise. Shapes are
checked by chex, which is imported only then; what chex can't do on torch tensors (dtypes, finiteness) is done here.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fnrl import tree

ACTIVE = os.environ.get("FNRL_CHECK", "0") not in ("", "0")


def shape(x: Tensor, *dims: int | None) -> None:
    """Asserts a shape; None fits any size. Errors: AssertionError with both shapes."""
    if ACTIVE and not torch.compiler.is_compiling():
        import chex

        chex.assert_shape(x, dims)


def same_shape(*xs: Tensor) -> None:
    """Asserts that all have one shape. Errors: AssertionError with the shapes."""
    if ACTIVE and not torch.compiler.is_compiling():
        import chex

        chex.assert_equal_shape(xs)


def dtype(x: Tensor, expected: torch.dtype) -> None:
    """Asserts a dtype. Errors: AssertionError with both."""
    if ACTIVE and x.dtype != expected:
        raise AssertionError(f"expected dtype {expected}, got {x.dtype} (shape {list(x.shape)})")


def finite(x: Any, name: str) -> None:
    """Asserts that every float leaf is finite; outside transforms only. Errors: AssertionError naming the leaves."""
    if ACTIVE:
        bad = tree.non_finite(x)
        if bad:
            raise AssertionError(f"{name} is not finite in: {', '.join(p or 'itself' for p in bad)}")
