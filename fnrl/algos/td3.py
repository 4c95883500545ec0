"""Deterministic policy gradients: DDPG, and TD3 as its careful relative."""

from typing import ClassVar

import torch
from torch import Tensor

from fnrl import losses, random
from fnrl.actors.off_policy import OffPolicyActorCritic
from fnrl.algos.base import Algorithm
from fnrl.component import Schedule, component, hyper, option, setting
from fnrl.errors import CompositionError
from fnrl.optim import Adam, Optimiser, polyak
from fnrl.spaces import Box, Space
from fnrl.types import Aux, Layout, OffPolicyBatch, Params, Sampling, Tree, Weights


class _DeterministicPolicyGradient(Algorithm):
    """What DDPG and TD3 share."""

    actions: ClassVar[tuple[type[Space], ...]] = (Box,)
    instead: ClassVar[str] = "DQN or SAC"
    ratio: float
    batch: int
    critic_lr: float | Schedule | None

    @property
    def plan(self) -> Sampling:
        """`ratio` updates a step, of `batch` samples."""
        return Sampling(self.ratio, self.batch)

    def check(self, actor: OffPolicyActorCritic) -> None:
        """It needs a deterministic policy."""
        if actor.stochastic:
            name = type(self).__name__
            hint = "OffPolicyActorCritic(..., stochastic=False, explore=Gaussian())"
            raise CompositionError(f"{name} needs a deterministic policy, and noise to explore by: {hint}")

    def init(self, actor: OffPolicyActorCritic, params: Params) -> tuple[Params, Tree, Tree]:
        """The target is a copy."""
        return params, params, self.optimiser.init(params)

    def rates(self, hyper: dict[str, Tensor], layout: Layout) -> Tensor:
        """`lr`, and `critic_lr` for all but the policy."""
        if "critic_lr" not in hyper:
            return hyper["lr"]
        return torch.stack([hyper["lr" if g == "policy" else "critic_lr"] for g in layout.groups])

    def mask(self, updates: Tensor, layout: Layout) -> Tree:
        """The policy moves at every so many updates."""
        if self._every == 1:
            return ()
        due = self._due(updates)
        return torch.stack([due if g == "policy" else torch.ones_like(due) for g in layout.groups])

    def move_target(self, target: Params, params: Params, hyper: dict[str, Tensor], updates: Tensor) -> Params:
        """`Q' = (1 - tau) Q' + tau Q`, and the policy's alike, whenever the policy moves."""
        tau = hyper["tau"]
        if self._every > 1:
            tau = torch.where(self._due(updates), tau, 0.0)
        return Params(polyak(target.vector, params.vector, tau), params.layout)

    def _due(self, updates: Tensor) -> Tensor:
        return (updates + 1) % self._every == 0

    @property
    def _every(self) -> int:
        return 1

    def loss(
        self, actor: OffPolicyActorCritic, params: Params, weights: Weights, batch: OffPolicyBatch, noise: Tree
    ) -> tuple[Tensor, Aux]:
        """The joint loss over a batch `[B]`; the priority of a sample is the mean of its critics' errors."""
        frozen, behind = Params(params.vector.detach(), params.layout), weights.target
        x, after = actor.features(params, batch.obs), actor.features(behind, batch.next_obs)
        next_action = self._smooth(actor.mode(behind, after), weights.hyper, noise)
        target = (batch.reward + batch.discount * actor.q(behind, after, next_action).amin(0)).detach()
        q = actor.q(params, x, batch.action)
        critic_loss = (batch.weight * losses.value_loss(q, target.expand_as(q))).mean(-1).sum()
        policy_loss = -actor.q(frozen, x.detach(), actor.mode(params, x.detach()))[0].mean()
        info = {"critic_loss": critic_loss, "policy_loss": policy_loss, "q": q.detach().mean()}
        return critic_loss + policy_loss, Aux(info, (q.detach() - target).abs().mean(0))

    def _smooth(self, action: Tensor, hyper: dict[str, Tensor], noise: Tree) -> Tensor:
        return action


@component
class TD3(_DeterministicPolicyGradient):
    """Twin delayed deterministic policy gradient: arXiv 1802.09477.

        y = r + discount min_i Q'_i(s', clip(pi'(s') + clip(smooth n, -c, c), -1, 1)),   n normal
        L = sum_i mean(w (Q_i(s, a) - y)^2) / 2 - mean(Q_0(s, pi(s)))

    Policy and targets move at every `delay`-th update.
    """

    family: ClassVar[str] = "off-policy"

    lr: float | Schedule = hyper(default=1e-3, help="learning rate")
    critic_lr: float | Schedule | None = hyper(default=None, help="learning rate of the critics; None for lr")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    tau: float | Schedule = hyper(default=0.005, high=1.0, help="how far the targets follow in one move")
    smooth: float | Schedule = hyper(default=0.2, help="deviation of the noise on the target's action")
    smooth_clip: float | Schedule = hyper(default=0.5, help="limit of that noise")
    max_grad_norm: float | Schedule | None = hyper(
        default=None, open_low=True, help="global gradient norm limit; None for none"
    )
    delay: int = setting(default=2, help="critic updates per move of policy and targets")
    ratio: float = setting(default=1.0, low=1e-6, help="updates per environment step")
    batch: int = setting(default=256, help="samples of an update")
    optimiser: Optimiser = option(default=Adam(eps=1e-8), help="the optimiser")

    @property
    def _every(self) -> int:
        return self.delay

    def noise(self, actor: OffPolicyActorCritic, key: Tensor, updates: int, batch: int) -> Tensor:
        """Standard normals `[K, B, A]`, that smooth the target's action."""
        return random.normal(key, (updates, batch, actor.actions))

    def _smooth(self, action: Tensor, hyper: dict[str, Tensor], noise: Tree) -> Tensor:
        limit = hyper["smooth_clip"]
        return (action + torch.minimum(torch.maximum(hyper["smooth"] * noise, -limit), limit)).clamp(-1.0, 1.0)


@component
class DDPG(_DeterministicPolicyGradient):
    """Deep deterministic policy gradient: arXiv 1509.02971; with several critics, the least of them.

    y = r + discount min_i Q'_i(s', pi'(s'));   L = sum_i mean(w (Q_i(s, a) - y)^2) / 2 - mean(Q_0(s, pi(s)))
    """

    family: ClassVar[str] = "off-policy"

    lr: float | Schedule = hyper(default=1e-3, help="learning rate")
    critic_lr: float | Schedule | None = hyper(default=None, help="learning rate of the critics; None for lr")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    tau: float | Schedule = hyper(default=0.005, high=1.0, help="how far the targets follow in one update")
    max_grad_norm: float | Schedule | None = hyper(
        default=None, open_low=True, help="global gradient norm limit; None for none"
    )
    ratio: float = setting(default=1.0, low=1e-6, help="updates per environment step")
    batch: int = setting(default=256, help="samples of an update")
    optimiser: Optimiser = option(default=Adam(eps=1e-8), help="the optimiser")
