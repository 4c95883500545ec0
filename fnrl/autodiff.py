"""Gradients: `torch.func` under a transform, plain autograd outside, where it costs half and gives the same bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from fnrl import tree


def under_transform() -> bool:
    """Whether a torch.func transform (vmap, grad) is running, or a graph is being compiled."""
    return torch.compiler.is_compiling() or _functorch.maybe_current_level() is not None


def _only_mapped() -> bool:
    """Whether nothing but vmap is running: then what a gradient was made of is let go while it is made."""
    return not torch.compiler.is_compiling() and all(
        level.key() == _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack()
    )


def value_and_grad(f: Callable[[Tensor], tuple[Tensor, Any]]) -> Callable[[Tensor], tuple[tuple[Tensor, Any], Tensor]]:
    """`x -> ((f(x), aux), df/dx)` for `f(x) -> (0-d loss, aux)`; aux comes back detached."""

    def run(x: Tensor) -> tuple[tuple[Tensor, Any], Tensor]:
        if under_transform():
            if not _only_mapped():
                grads, (loss, aux) = torch.func.grad(lambda v: _twice(f(v)), has_aux=True)(x)
                return (loss, aux), grads
            loss, back, aux = torch.func.vjp(f, x, has_aux=True)  # pyright: ignore[reportAssignmentType]
            (grads,) = back(torch.ones_like(loss), retain_graph=False, create_graph=False)
            return (loss.detach(), tree.map(torch.Tensor.detach, aux)), grads
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss, aux = f(leaf)
            (grads,) = torch.autograd.grad(loss, leaf)
        return (loss.detach(), tree.map(torch.Tensor.detach, aux)), grads

    return run


def _twice(pair: tuple[Tensor, Any]) -> tuple[Tensor, tuple[Tensor, Any]]:
    return pair[0], (pair[0], pair[1])
