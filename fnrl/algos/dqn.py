"""Deep Q-learning, with its improvements as switches that compose."""

from typing import ClassVar

from torch import Tensor

from fnrl import losses
from fnrl.actors.off_policy import OffPolicyActorCritic
from fnrl.algos.base import Algorithm
from fnrl.component import Schedule, component, hyper, option, setting
from fnrl.errors import CompositionError
from fnrl.optim import Adam, Optimiser, polyak
from fnrl.spaces import Discrete, Space
from fnrl.types import Aux, OffPolicyBatch, Params, Sampling, Tree, Weights


@component
class DQN(Algorithm):
    """Deep Q-learning: arXiv 1312.5602 and Nature 2015; `double` is arXiv 1509.06461.

        y = r + discount Q'(s', argmax_a Q(s', a))    (with double=False, of Q' itself)
        L = mean(w huber(Q(s, a) - y))

    Duelling is the actor's, longer returns and priorities are the storage's. `Q'` becomes `(1 - tau) Q' + tau Q` at
    every `target_every`-th update.
    """

    family: ClassVar[str] = "off-policy"
    actions: ClassVar[tuple[type[Space], ...]] = (Discrete,)
    instead: ClassVar[str] = "SAC, TD3 or DDPG"

    lr: float | Schedule = hyper(default=1e-4, help="learning rate")
    gamma: float | Schedule = hyper(default=0.99, high=1.0, help="discount")
    tau: float | Schedule = hyper(default=1.0, high=1.0, help="how far the target follows in one move; 1 copies")
    max_grad_norm: float | Schedule | None = hyper(
        default=10.0, open_low=True, help="global gradient norm limit; None for none"
    )
    target_every: int = setting(default=1000, help="updates between two moves of the target")
    ratio: float = setting(default=0.25, low=1e-6, help="updates per environment step")
    batch: int = setting(default=32, help="samples of an update")
    double: bool = option(default=True, help="choose the next action by Q, value it by Q'")
    optimiser: Optimiser = option(default=Adam(eps=1e-8), help="the optimiser")

    @property
    def plan(self) -> Sampling:
        """`ratio` updates a step, of `batch` samples."""
        return Sampling(self.ratio, self.batch)

    def check(self, actor: OffPolicyActorCritic) -> None:
        """It needs a critic without a policy."""
        if actor.policy is not None:
            hint = "pass OffPolicyActorCritic(..., policy=None, critics=1, explore=EpsilonGreedy())"
            raise CompositionError(f"DQN acts greedily on its critic and has no use for a policy: {hint}")
        if actor.critics != 1:
            raise CompositionError(f"DQN has one critic, the actor has {actor.critics}: pass critics=1")

    def init(self, actor: OffPolicyActorCritic, params: Params) -> tuple[Params, Tree, Tree]:
        """The target is a copy."""
        return params, params, self.optimiser.init(params)

    def move_target(self, target: Params, params: Params, hyper: dict[str, Tensor], updates: Tensor) -> Params:
        """It follows by `tau`."""
        return Params(polyak(target.vector, params.vector, hyper["tau"]), params.layout)

    def loss(
        self, actor: OffPolicyActorCritic, params: Params, weights: Weights, batch: OffPolicyBatch, noise: Tree
    ) -> tuple[Tensor, Aux]:
        """The loss over a batch `[B]`; the priority of a sample is its error."""
        frozen, behind = Params(params.vector.detach(), params.layout), weights.target
        next_q = actor.q(behind, actor.features(behind, batch.next_obs))[0]
        if self.double:
            choice = actor.q(frozen, actor.features(frozen, batch.next_obs))[0].argmax(-1)
            best = next_q.gather(-1, choice[..., None]).squeeze(-1)
        else:
            best = next_q.amax(-1)
        target = (batch.reward + batch.discount * best).detach()
        q = actor.q(params, actor.features(params, batch.obs))[0]
        q = q.gather(-1, batch.action[..., None]).squeeze(-1)
        error = q - target
        return (batch.weight * losses.huber(error)).mean(), Aux({"q": q.detach().mean()}, error.detach().abs())
