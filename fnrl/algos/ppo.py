"""Proximal policy optimisation, and advantage actor-critic as its unclipped, single-pass relative."""

from typing import ClassVar

from torch import Tensor

from fnrl import losses
from fnrl.actors.on_policy import OnPolicyActorCritic
from fnrl.algos.base import Algorithm
from fnrl.component import Schedule, component, hyper, option, setting
from fnrl.optim import Adam, Optimiser, RMSProp
from fnrl.storages.rollout import OnPolicyBatch
from fnrl.types import Aux, Params, Plan, Tree, Weights


@component
class PPO(Algorithm):
    """PPO with clipped ratios: arXiv 1707.06347.

        L = mean(-min(r A, clip(r, 1 - c, 1 + c) A)) + value_coef mean(L_V) - entropy_coef mean(H),   r = pi / pi_old

    Advantages are normalised per minibatch. `clip_value` clips the value's move as well, by the same range.
    """

    family: ClassVar[str] = "on-policy"

    lr: float | Schedule = hyper(default=3e-4, help="learning rate")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    clip: float | Schedule = hyper(
        default=0.2, open_low=True, help="how far the ratio may move before its gradient is cut"
    )
    entropy_coef: float | Schedule = hyper(default=0.0, help="weight of the entropy bonus")
    value_coef: float | Schedule = hyper(default=0.5, help="weight of the value loss")
    max_grad_norm: float | Schedule | None = hyper(
        default=0.5, open_low=True, help="global gradient norm limit; None for none"
    )
    target_kl: float | Schedule | None = hyper(
        # type: ignore[assignment]
        default=None,
        open_low=True,
        help="stop a plan once the KL exceeds 1.5 times this; None for never",
    )
    epochs: int = setting(default=4, help="passes over a rollout")
    minibatches: int = setting(default=4, help="updates in one pass")
    clip_value: bool = option(default=False, help="clip the value's move by the same range")
    normalise_advantage: bool = option(default=True, help="zero mean and unit deviation in each minibatch")
    optimiser: Optimiser = option(default=Adam(), help="the optimiser")

    @property
    def plan(self) -> Plan:
        """`epochs` passes in `minibatches` pieces."""
        return Plan(self.epochs, self.minibatches)

    def loss(
        self, actor: OnPolicyActorCritic, params: Params, weights: Weights, batch: OnPolicyBatch, noise: Tree
    ) -> tuple[Tensor, Aux]:
        """The loss over a batch `[T, B]`."""
        h = weights.hyper
        logp, entropy, value, _ = actor.evaluate(params, batch.obs, batch.memory, batch.starts, batch.action)
        advantage = losses.normalise(batch.advantage) if self.normalise_advantage else batch.advantage
        policy_loss = losses.ppo_surrogate(logp, batch.logp, advantage, h["clip"]).mean()
        if self.clip_value:
            value_loss = losses.clipped_value_loss(value, batch.value, batch.target, h["clip"]).mean()
        else:
            value_loss = losses.value_loss(value, batch.target).mean()
        entropy = entropy.mean()
        total = policy_loss + h["value_coef"] * value_loss - h["entropy_coef"] * entropy
        now = logp.detach()
        info = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": losses.approx_kl(now, batch.logp).mean(),
            "clip_fraction": losses.clip_fraction(now, batch.logp, h["clip"]).mean(),
        }
        return total, Aux(info, ())


@component
class A2C(Algorithm):
    """Advantage actor-critic, arXiv 1602.01783: one update a rollout.

    L = mean(-logp A) + value_coef mean(L_V) - entropy_coef mean(H)
    """

    family: ClassVar[str] = "on-policy"

    lr: float | Schedule = hyper(default=7e-4, help="learning rate")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    entropy_coef: float | Schedule = hyper(default=0.0, help="weight of the entropy bonus")
    value_coef: float | Schedule = hyper(default=0.5, help="weight of the value loss")
    max_grad_norm: float | Schedule | None = hyper(
        default=0.5, open_low=True, help="global gradient norm limit; None for none"
    )
    normalise_advantage: bool = option(default=False, help="zero mean and unit deviation in each batch")
    optimiser: Optimiser = option(default=RMSProp(), help="the optimiser")

    @property
    def plan(self) -> Plan:
        """The whole rollout, once."""
        return Plan(1, 1)

    def loss(
        self, actor: OnPolicyActorCritic, params: Params, weights: Weights, batch: OnPolicyBatch, noise: Tree
    ) -> tuple[Tensor, Aux]:
        """The loss over a batch `[T, B]`."""
        h = weights.hyper
        logp, entropy, value, _ = actor.evaluate(params, batch.obs, batch.memory, batch.starts, batch.action)
        advantage = losses.normalise(batch.advantage) if self.normalise_advantage else batch.advantage
        policy_loss = losses.policy_gradient(logp, advantage).mean()
        value_loss = losses.value_loss(value, batch.target).mean()
        entropy = entropy.mean()
        total = policy_loss + h["value_coef"] * value_loss - h["entropy_coef"] * entropy
        return total, Aux({"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}, ())
