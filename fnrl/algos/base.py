"""What all algorithms share: state, gradients, and the application of an update."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnrl.autodiff import value_and_grad
from fnrl.optim import Optimiser, clip_by_global_norm
from fnrl.record import record
from fnrl.types import Aux, Params, Plan, Tree, Weights


@record
class AlgoState:
    """Weights, and what stays at home: the optimiser's memory, and whether the rest of this plan is skipped."""

    weights: Weights
    opt: Tree
    stopped: Tensor


class Algorithm:
    """Base of algorithms: a component with `loss`, `plan` and an optimiser inherits the rest.

    A subclass is a component with a hyper-parameter `lr`, and `max_grad_norm` and `target_kl` if it has them.
    """

    family: ClassVar[str]
    optimiser: Optimiser

    @property
    def plan(self) -> Plan:
        """How a rollout is used."""
        raise TypeError(f"{type(self).__name__} must define plan")

    def loss(self, actor: Any, params: Params, weights: Weights, batch: Any, key: Tensor) -> tuple[Tensor, Aux]:
        """A 0-d loss, and what it says besides."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def init(self, actor: Any, params: Params) -> tuple[Tree, Tree]:
        """`(target, optimiser state)` for fresh parameters."""
        return (), self.optimiser.init(params)

    def grad(self, actor: Any, weights: Weights, batch: Any, key: Tensor) -> tuple[Tensor, Aux]:
        """The gradient `[P]` of the loss at the weights, and what the loss says; `info` gains `loss`."""
        layout = weights.params.layout

        def loss(vector: Tensor) -> tuple[Tensor, Aux]:
            return self.loss(actor, Params(vector, layout), weights, batch, key)

        (value, aux), grads = value_and_grad(loss)(weights.params.vector)
        return grads, Aux({"loss": value, **aux.info}, aux.priority)

    def apply(self, state: AlgoState, grads: Tensor, info: dict[str, Tensor]) -> tuple[AlgoState, dict[str, Tensor]]:
        """One optimiser step from a merged gradient `[P]`; `info` gains `grad_norm`.

        With `target_kl`, once the merged KL exceeds 1.5 times it, this and the other updates of the plan change
        nothing.
        """
        hyper = state.weights.hyper
        stopped: Tensor = state.stopped
        if "max_grad_norm" in hyper:
            grads, norm = clip_by_global_norm(grads, hyper["max_grad_norm"])
        else:
            norm = grads.square().sum().sqrt()
        if "target_kl" in hyper:
            stopped = stopped | (info["approx_kl"] > 1.5 * hyper["target_kl"])
            mask: Tree = ~stopped
        else:
            mask = ()
        params, opt = self.optimiser.update(grads, state.opt, state.weights.params, hyper["lr"], mask)
        weights = dataclasses.replace(state.weights, params=params)
        return AlgoState(weights, opt, stopped), {**info, "grad_norm": norm}


def not_stopped() -> Tensor:
    """The `stopped` of a fresh plan."""
    return torch.zeros((), dtype=torch.bool)
