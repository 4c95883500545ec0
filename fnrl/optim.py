"""Optimisers as pure functions on one flat vector `[P]`.

An optimiser is a frozen value with `init(params) -> state` and `update(grads, state, params, lr, mask) -> (params,
state)`. `lr` is 0-d, or one per group `[G]`. `mask` is `()`, a 0-d bool, or one per group: where it is false neither
the parameters nor the optimiser's memory move (a zero gradient would still move Adam).
"""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fnrl.autodiff import under_transform
from fnrl.component import component, setting
from fnrl.record import fields_of, record
from fnrl.types import Layout, Params, Tree


@runtime_checkable
class Optimiser(Protocol):
    """What every optimiser here can do."""

    def init(self, params: Params) -> Tree: ...

    def update(
        self, grads: Tensor, state: Tree, params: Params, lr: Tensor, mask: Tree = ()
    ) -> tuple[Params, Tree]: ...


@record
class AdamState:
    """First and second moments `[P]`, and the number of updates of each group `[G]`."""

    mean: Tensor
    var: Tensor
    count: Tensor


@component
class Adam:
    """Adam, with decoupled weight decay: arXiv 1412.6980 and 1711.05101, step for step as `torch.optim.AdamW`.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """

    b1: float = setting(default=0.9, low=0.0, high=1.0, open_high=True, help="decay of the first moment")
    b2: float = setting(default=0.999, low=0.0, high=1.0, open_high=True, help="decay of the second moment")
    eps: float = setting(default=1e-5, low=0.0, help="added to the denominator")
    decay: float = setting(default=0.0, low=0.0, help="decoupled weight decay")

    def init(self, params: Params) -> AdamState:
        """Nothing seen yet."""
        zeros = torch.zeros_like(params.vector)
        return AdamState(zeros, zeros.clone(), zeros.new_zeros(len(params.layout.groups)))

    def update(
        self, grads: Tensor, state: AdamState, params: Params, lr: Tensor, mask: Tree = ()
    ) -> tuple[Params, AdamState]:
        """One step; the learning rate multiplies the bias-corrected ratio."""
        layout = params.layout
        count = state.count + 1.0
        if not under_transform():
            return _masked(mask, layout, *self._fused(grads, state, params, lr, count), params, state)
        mean = torch.lerp(state.mean, grads, 1.0 - self.b1)
        var = (state.var * self.b2).addcmul(grads, grads, value=1.0 - self.b2)
        first, second = _one_minus_power(self.b1, count), _one_minus_power(self.b2, count)
        # in place where it is nobody else's: vectors of many lanes are large
        denominator = layout.scale_(var.sqrt(), _apart(second.rsqrt())).add_(self.eps)
        change = layout.scale_(mean / denominator, _apart(_per_group(lr, layout) / first))
        del denominator
        old = params.vector if self.decay == 0.0 else params.vector * (1.0 - layout.spread(lr) * self.decay)
        vector = old - change
        return _masked(mask, layout, Params(vector, layout), AdamState(mean, var, count), params, state)

    def _fused(
        self, grads: Tensor, state: AdamState, params: Params, lr: Tensor, count: Tensor
    ) -> tuple[Params, AdamState]:
        """The same by torch's own kernel, which reads and writes everything once: for one seed that is not compiled."""
        layout, flat = params.layout, (params.vector.clone(), state.mean.clone(), state.var.clone())
        pieces = (x.split_with_sizes(layout.group_sizes) for x in (*flat, grads.contiguous()))  # it reads no strides
        for p, m, v, g, step, rate in zip(*pieces, count.unbind(0), _per_group(lr, layout).unbind(0), strict=True):
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [p], [g], [m], [v], [], [step], lr=rate, beta1=self.b1, beta2=self.b2, weight_decay=self.decay,
                eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        return Params(flat[0], layout), AdamState(flat[1], flat[2], count)


@record
class RMSPropState:
    """Running mean of squared gradients `[P]`."""

    var: Tensor


@component
class RMSProp:
    """RMSProp as `torch.optim.RMSprop` without momentum: `v = d v + (1 - d) g^2;  p = p - lr g / (sqrt(v) + eps)`."""

    decay: float = setting(default=0.99, low=0.0, high=1.0, help="decay of the running mean of squares")
    eps: float = setting(default=1e-5, low=0.0, help="added to the denominator")

    def init(self, params: Params) -> RMSPropState:
        """Nothing seen yet."""
        return RMSPropState(torch.zeros_like(params.vector))

    def update(
        self, grads: Tensor, state: RMSPropState, params: Params, lr: Tensor, mask: Tree = ()
    ) -> tuple[Params, RMSPropState]:
        """One step."""
        var = (state.var * self.decay).addcmul(grads, grads, value=1.0 - self.decay)
        vector = params.vector - params.layout.spread(lr) * (grads / (var.sqrt() + self.eps))
        return _masked(mask, params.layout, Params(vector, params.layout), RMSPropState(var), params, state)


@record
class SGDState:
    """The velocity `[P]`."""

    velocity: Tensor


@component
class SGD:
    """Gradient descent as `torch.optim.SGD`: `u = momentum u + g;  p = p - lr u`."""

    momentum: float = setting(default=0.0, low=0.0, high=1.0, help="decay of the velocity")

    def init(self, params: Params) -> SGDState:
        """At rest."""
        return SGDState(torch.zeros_like(params.vector))

    def update(
        self, grads: Tensor, state: SGDState, params: Params, lr: Tensor, mask: Tree = ()
    ) -> tuple[Params, SGDState]:
        """One step."""
        velocity = self.momentum * state.velocity + grads
        vector = params.vector - params.layout.spread(lr) * velocity
        return _masked(mask, params.layout, Params(vector, params.layout), SGDState(velocity), params, state)


def clip_by_global_norm(grads: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """`g min(1, limit / ||g||)` and `||g||` before clipping (arXiv 1211.5063); a gradient `[P]`, a 0-d limit."""
    norm = global_norm(grads)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    if not under_transform() and grads.is_cpu and float(scale) == 1.0:
        return grads, norm  # the same bits, and a pass over all of them less
    return grads * _apart(scale), norm


def global_norm(grads: Tensor) -> Tensor:
    """`||g||` of a gradient `[P]`; outside a transform in one pass."""
    return grads.square().sum().sqrt() if under_transform() else torch.linalg.vector_norm(grads)


def clip_by_group_norm(grads: Tensor, layout: Layout, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The same, group by group: `limit` is 0-d or `[G]`; returns the clipped `[P]` and the norms `[G]`."""
    norms = torch.stack([g.square().sum().sqrt() for g in grads.split(list(layout.group_sizes))])
    return grads * layout.spread(_apart((limit / (norms + 1e-6)).clamp(max=1.0))), norms


def polyak(target: Tensor, online: Tensor, tau: Tensor) -> Tensor:
    """`(1 - tau) target + tau online` (arXiv 1509.02971); by torch's formula exactly `target` at tau = 0 and `online`
    at tau = 1.
    """
    return torch.lerp(target, online, _apart(tau))


def _apart(x: Tensor) -> Tensor:
    """A few numbers that whole vectors are multiplied by, as a result of their own in a graph (a sum that runs over one
    element each): inductor would compute them again for every vector register of the loop that reads them.
    """
    return x[..., None].cumsum(-1).squeeze(-1) if torch.compiler.is_compiling() else x


def _one_minus_power(base: float, exponent: Tensor) -> Tensor:
    """`1 - base^exponent`. Not by torch.pow, which rounds by where an element lies (lanes would differ), and which
    leaves few digits of a small difference.
    """
    return -torch.expm1(exponent * (math.log(base) if base > 0.0 else -math.inf))


def _per_group(x: Tensor, layout: Layout) -> Tensor:
    return x.expand(len(layout.groups)) if x.dim() == 0 else x


def _masked(
    mask: Tree, layout: Layout, params: Params, state: Tree, old_params: Params, old_state: Tree
) -> tuple[Params, Tree]:
    if isinstance(mask, tuple):
        return params, state
    by_group = mask.expand(len(layout.groups)) if mask.dim() == 0 else mask
    by_element = layout.spread(by_group)

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(by_element if new.shape == by_element.shape else by_group, new, old)

    fields = {n: keep(getattr(state, n), getattr(old_state, n)) for n in fields_of(type(state)).data}
    return Params(keep(params.vector, old_params.vector), layout), type(state)(**fields)
