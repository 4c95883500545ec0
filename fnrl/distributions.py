"""Action distributions as values: build one inside the function that uses it, from what the network gives.

The last axis is the distribution's own (n choices, or A action components), the leading axes are a batch. Randomness
comes in as `noise`, so that sampling is a pure function.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Categorical:
    """One of n choices, with probabilities softmax(logits).

    A logit of -inf forbids its choice; entropy, kl and their gradients stay finite. One logit at least must be finite.

    Args:
        logits: [..., n], of any normalisation.
    """

    logits: Tensor
    log_probs: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_probs", torch.log_softmax(self.logits, -1))

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the probability of `action` [...], int64. Raises ValueError where the shapes don't fit."""
        _fits("action", action, self.logits.shape[:-1])
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """`-sum_i p_i log p_i` [...], where 0 log 0 = 0."""
        finite = self.log_probs.clamp(min=torch.finfo(self.log_probs.dtype).min)
        return -(self.log_probs.exp() * finite).sum(-1)

    def mode(self) -> Tensor:
        """The likeliest choice [...], int64; of several the first."""
        return self.logits.argmax(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """A choice [...], int64: `argmax(logits + noise)`, for standard Gumbel noise [..., n]."""
        _fits("noise", noise, self.logits.shape)
        return (self.logits + noise).argmax(-1)

    def kl(self, other: "Categorical") -> Tensor:
        """KL(self | other) `= sum_i p_i (log p_i - log q_i)` [...]; inf where only `other` forbids a choice."""
        p = self.log_probs.exp()
        return (p * torch.where(p > 0.0, self.log_probs - other.log_probs, 0.0)).sum(-1)


@dataclass(frozen=True, eq=False)
class Normal:
    """Independent normal components, of standard deviation exp(log_std).

    Args:
        mean: [..., A].
        log_std: [..., A], or [A] where it doesn't depend on the state.
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the density at `action` [..., A], summed over the components: [...].

        Raises ValueError where the shapes don't fit.
        """
        _fits("action", action, self.mean.shape)
        z = (action - self.mean) * torch.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - (self.log_std.sum(-1) + 0.5 * self.mean.shape[-1] * math.log(2.0 * math.pi))

    def entropy(self) -> Tensor:
        """`sum_i log_std_i + log(2 pi e) / 2` [...]."""
        total = self.log_std.sum(-1) + 0.5 * self.mean.shape[-1] * math.log(2.0 * math.pi * math.e)
        return total.expand(self.mean.shape[:-1])

    def mode(self) -> Tensor:
        """The likeliest action [..., A]: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """An action [..., A], `mean + exp(log_std) * noise`, for standard normal noise [..., A]; differentiable."""
        _fits("noise", noise, self.mean.shape)
        return self.mean + torch.exp(self.log_std) * noise

    def kl(self, other: "Normal") -> Tensor:
        """KL(self | other) `= sum_i (exp(2 d_i) - 1 - 2 d_i + z_i^2) / 2` [...], never negative.

        Here d = log_std - other.log_std, and z = (mean - other.mean) / exp(other.log_std).
        """
        d = self.log_std - other.log_std
        z = (self.mean - other.mean) * torch.exp(-other.log_std)
        return 0.5 * (torch.expm1(2.0 * d) - 2.0 * d + z.square()).sum(-1)


@dataclass(frozen=True, eq=False)
class TanhNormal:
    """Normal components squashed into (-1, 1): `a = tanh(u)`, `u` normal (arXiv 1801.01290, appendix C).

    Args:
        mean, log_std: [..., A], of u.
    """

    mean: Tensor
    log_std: Tensor

    def mode(self) -> Tensor:
        """The squashed mean [..., A] (the median of each component)."""
        return torch.tanh(self.mean)

    def sample(self, noise: Tensor) -> Tensor:
        """An action [..., A] for standard normal noise [..., A]; differentiable."""
        return torch.tanh(Normal(self.mean, self.log_std).sample(noise))

    def sample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """An action [..., A] and the logarithm of its density [...], finite however close to +-1 it is.

        log p(a) = log N(u) - sum_i log(1 - tanh(u_i)^2),   log(1 - tanh(u)^2) = 2 (log 2 + u + log sigmoid(-2 u))
        """
        normal = Normal(self.mean, self.log_std)
        u = normal.sample(noise)
        squashed = 2.0 * (math.log(2.0) + u + functional.logsigmoid(-2.0 * u))
        return torch.tanh(u), normal.log_prob(u) - squashed.sum(-1)


def _fits(name: str, x: Tensor, expected: torch.Size) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)}")
