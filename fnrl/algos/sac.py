"""Soft actor-critic, for Box and for Discrete actions."""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnrl import losses, random
from fnrl.actors.off_policy import OffPolicyActorCritic
from fnrl.algos.base import Algorithm
from fnrl.component import Schedule, component, hyper, option, setting
from fnrl.errors import CompositionError
from fnrl.optim import Adam, Optimiser, polyak
from fnrl.spaces import Discrete
from fnrl.types import ALGORITHMS, Aux, Layout, OffPolicyBatch, Params, Sampling, Tree, Weights

_LOG = "log_temperature"  # in the group of the algorithm


@component
class SAC(Algorithm):
    """Soft actor-critic: arXiv 1812.05905; with Discrete actions arXiv 1910.07207.

        y = r + discount (min_i Q'_i(s', a') - alpha log pi(a' | s')),   a' ~ pi
        L = sum_i mean(w (Q_i(s, a) - y)^2) / 2 + mean(alpha log pi(b | s) - min_i Q_i(s, b)) + L_alpha,   b ~ pi
        L_alpha = -log alpha mean(log pi(b | s) + target entropy)

    One loss with stop-gradients: its gradient is that of the three apart. `Q'` follows `Q` by `tau` an update. Over
    Discrete actions the expectations are exact.
    """

    family: ClassVar[str] = "off-policy"

    lr: float | Schedule = hyper(default=3e-4, help="learning rate")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    tau: float | Schedule = hyper(default=0.005, high=1.0, help="how far the target follows in one update")
    temperature: float | Schedule | None = hyper(default=None, help="alpha; None to learn it")
    temperature_lr: float | Schedule | None = hyper(default=None, help="learning rate of alpha; None for lr")
    max_grad_norm: float | Schedule | None = hyper(
        default=None, open_low=True, help="global gradient norm limit; None for none"
    )
    first_temperature: float = setting(default=1.0, low=1e-6, help="alpha to begin with, where it is learnt")
    target_entropy: float | None = option(
        default=None, help="entropy that alpha aims at; None for -A, or 0.89 log n over n actions"
    )
    ratio: float = setting(default=1.0, low=1e-6, help="updates per environment step")
    batch: int = setting(default=256, help="samples of an update")
    optimiser: Optimiser = option(default=Adam(eps=1e-8), help="the optimiser")

    @property
    def plan(self) -> Sampling:
        """`ratio` updates a step, of `batch` samples."""
        return Sampling(self.ratio, self.batch)

    def check(self, actor: OffPolicyActorCritic) -> None:
        """It needs a stochastic policy."""
        if actor.policy is None or not actor.stochastic:
            raise CompositionError(f"SAC needs a stochastic policy, got {actor!r}: leave policy and stochastic alone")

    def init(self, actor: OffPolicyActorCritic, params: Params) -> tuple[Params, Tree, Tree]:
        """Parameters with `algo.log_temperature`, where it is learnt; the target is a copy."""
        if self.temperature is None:
            log = torch.full((1,), math.log(self.first_temperature))
            params = Params.of({**params.tree(), f"{ALGORITHMS}.{_LOG}": log})
        return params, params, self.optimiser.init(params)

    def noise(self, actor: OffPolicyActorCritic, key: Tensor, updates: int, batch: int) -> Tree:
        """Standard normals `[K, 2, B, A]`, for the next action and the present one; nothing over Discrete actions."""
        if isinstance(actor.spec.action, Discrete):
            return ()
        return random.normal(key, (updates, 2, batch, actor.actions))

    def rates(self, hyper: dict[str, Tensor], layout: Layout) -> Tensor:
        """`lr`, and `temperature_lr` for the temperature."""
        if "temperature_lr" not in hyper:
            return hyper["lr"]
        return torch.stack([hyper["temperature_lr" if g == ALGORITHMS else "lr"] for g in layout.groups])

    def move_target(self, target: Params, params: Params, hyper: dict[str, Tensor], updates: Tensor) -> Params:
        """`Q' = (1 - tau) Q' + tau Q`."""
        return Params(polyak(target.vector, params.vector, hyper["tau"]), params.layout)

    def loss(
        self, actor: OffPolicyActorCritic, params: Params, weights: Weights, batch: OffPolicyBatch, noise: Tree
    ) -> tuple[Tensor, Aux]:
        """The joint loss over a batch `[B]`; the priority of a sample is the mean of its critics' errors."""
        frozen = Params(params.vector.detach(), params.layout)
        alpha = frozen.groups[ALGORITHMS][_LOG].exp() if self.temperature is None else weights.hyper["temperature"]
        given = _Given(actor, params, frozen, weights.target, batch, noise, alpha)
        q, target, policy_loss, entropy = (_discrete if isinstance(actor.spec.action, Discrete) else _continuous)(given)
        error = q - target.detach()
        critic_loss = (batch.weight * losses.value_loss(q, target.detach().expand_as(q))).mean(-1).sum()
        info = {"critic_loss": critic_loss, "policy_loss": policy_loss, "entropy": entropy, "q": q.detach().mean()}
        total = critic_loss + policy_loss
        if self.temperature is None:
            log = params.groups[ALGORITHMS][_LOG]
            aim = self.entropy_aim(actor)
            total = total - (log * (aim - entropy.detach())).sum()
            info["temperature"] = alpha.sum()
        return total, Aux(info, error.detach().abs().mean(0))

    def entropy_aim(self, actor: OffPolicyActorCritic) -> float:
        """The entropy that the temperature aims at."""
        if self.target_entropy is not None:
            return self.target_entropy
        return 0.89 * math.log(actor.actions) if isinstance(actor.spec.action, Discrete) else -float(actor.actions)


class _Given(NamedTuple):
    """What a loss is made of; `frozen` are the parameters without a gradient."""

    actor: OffPolicyActorCritic
    params: Params
    frozen: Params
    target: Params
    batch: OffPolicyBatch
    noise: Tree
    alpha: Tensor


def _continuous(g: _Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Q [C, B]`, their target `[B]`, the policy's loss, and its entropy."""
    actor, batch = g.actor, g.batch
    x = actor.features(g.params, batch.obs)
    after = actor.squashed(g.frozen, actor.features(g.frozen, batch.next_obs))
    next_action, next_logp = after.sample_and_log_prob(g.noise[0])
    next_q = actor.q(g.target, actor.features(g.target, batch.next_obs), next_action).amin(0)
    target = batch.reward + batch.discount * (next_q - g.alpha * next_logp)
    action, logp = actor.squashed(g.params, x.detach()).sample_and_log_prob(g.noise[1])
    policy_loss = (g.alpha * logp - actor.q(g.frozen, x.detach(), action).amin(0)).mean()
    return actor.q(g.params, x, batch.action), target, policy_loss, -logp.mean()


def _discrete(g: _Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, with expectations over the actions."""
    actor, batch = g.actor, g.batch
    x = actor.features(g.params, batch.obs)
    after = actor.choices(g.frozen, actor.features(g.frozen, batch.next_obs))
    next_q = actor.q(g.target, actor.features(g.target, batch.next_obs)).amin(0)
    value = (after.log_probs.exp() * next_q).sum(-1) + g.alpha * after.entropy()
    target = batch.reward + batch.discount * value
    qs = actor.q(g.params, x)
    pi = actor.choices(g.params, x.detach())
    entropy = pi.entropy()
    policy_loss = -((pi.log_probs.exp() * qs.detach().amin(0)).sum(-1) + g.alpha * entropy).mean()
    q = qs.gather(-1, batch.action.expand(qs.shape[:-1])[..., None]).squeeze(-1)
    return q, target, policy_loss, entropy.mean()
