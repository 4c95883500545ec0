"""Losses and diagnostics, one number per sample: arrays `[B, ...]` of one shape in, the same shape out, no mean taken.

`clip` is a float or a 0-d tensor. Gradients flow through every argument; detach what should not learn.
"""

import torch
from torch import Tensor

Scalar = float | Tensor


def ppo_surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: Scalar) -> Tensor:
    """Clipped surrogate of proximal policy optimisation, to be minimised.

        loss = -min(ratio * advantage, clamp(ratio, 1 - clip, 1 + clip) * advantage),  ratio = exp(logp - old_logp)

    Source: Schulman et al., https://arxiv.org/abs/1707.06347, equation 7.

    Args:
        logp, old_logp: [B, ...], of the actions taken, by the policy that learns and by the one that acted.
        advantage: [B, ...].

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(logp=logp, old_logp=old_logp, advantage=advantage)
    ratio = torch.exp(logp - old_logp)
    return -torch.minimum(ratio * advantage, ratio.clamp(min=1.0 - clip).clamp(max=1.0 + clip) * advantage)


def policy_gradient(logp: Tensor, advantage: Tensor) -> Tensor:
    """Score-function loss, `-logp * advantage`.

    Source: REINFORCE, Williams (1992), doi:10.1007/BF00992696.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(logp=logp, advantage=advantage)
    return -logp * advantage


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, `0.5 * (value - target)^2`.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(value=value, target=target)
    return 0.5 * (value - target).square()


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: Scalar) -> Tensor:
    """Half the squared error of the value or of its clipped move from the old value, whichever is larger.

        loss = 0.5 * max((value - target)^2, (old_value + clamp(value - old_value, -clip, clip) - target)^2)

    Source: the PPO of OpenAI baselines; see Engstrom et al., https://arxiv.org/abs/2005.12729, section 3.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(value=value, old_value=old_value, target=target)
    clipped = old_value + (value - old_value).clamp(min=-clip).clamp(max=clip)
    return 0.5 * torch.maximum((value - target).square(), (clipped - target).square())


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """`0.5 e^2` where `|e| <= delta`, `delta (|e| - 0.5 delta)` beyond: its gradient is `clip(e, -delta, delta)`.

    Source: Huber (1964), doi:10.1214/aoms/1177703732.
    """
    inside = error.clamp(-delta, delta)
    return inside * (error - 0.5 * inside)


def approx_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Estimate of KL(old | new) from actions of the old policy: unbiased, and never negative.

        kl = (ratio - 1) - log ratio,  ratio = exp(logp - old_logp)

    Source: estimator k3 of Schulman, http://joschu.net/blog/kl-approx.html.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(logp=logp, old_logp=old_logp)
    log_ratio = logp - old_logp
    return torch.expm1(log_ratio) - log_ratio


def clip_fraction(logp: Tensor, old_logp: Tensor, clip: Scalar) -> Tensor:
    """Whether the ratio lies outside `[1 - clip, 1 + clip]`: 1.0 or 0.0 per sample, so that its mean is the fraction.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(logp=logp, old_logp=old_logp)
    return (torch.expm1(logp - old_logp).abs() > clip).to(logp.dtype)


def normalise(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit standard deviation over all elements: `(x - mean) / sqrt(variance + eps^2)`.

    The variance is the biased one (over B, not B - 1), so a single element is fine. `eps` is in units of x, and keeps
    the result and its gradient finite where all elements are equal.
    """
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps**2).sqrt()


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """Share of the targets' variance that the values explain, as one number [].

        1 - variance(target - value) / variance(target)

    1 is perfect, 0 no better than a constant. It is 0 where the targets are constant: there is nothing to explain.

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(value=value, target=target)
    constant = target.amax() == target.amin()
    total = target.var(correction=0).masked_fill(constant, 1.0)
    return (1.0 - (target - value).var(correction=0) / total).masked_fill(constant, 0.0)


def _same_shape(**arrays: Tensor) -> None:
    (first, expected), *rest = ((name, array.shape) for name, array in arrays.items())
    for name, shape in rest:
        if shape != expected:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(expected)}, the shape of {first}")
