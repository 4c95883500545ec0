"""The actor of off-policy algorithms: any number of critics Q(s, a), and a policy, or none."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fnrl import random
from fnrl.actors.base import Actor, Groups, fit, taken
from fnrl.actors.exploration import Exploration
from fnrl.component import component, option, setting
from fnrl.distributions import Categorical, TanhNormal
from fnrl.errors import CompositionError
from fnrl.networks import MLP, Network, Tensors, linear
from fnrl.record import record
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.types import Params

_WIDE = MLP((256, 256), torch.relu)


@record
class ActionNoise:
    """What acting draws, `[T, N, ...]`: for the policy's sample, for exploration, and actions that replace others."""

    policy: Tensor
    explore: Tensor
    replace: Tensor  # uniform; as explored, whether `action` takes the actor's place
    action: Tensor


@component
class OffPolicyActorCritic(Actor):
    """Critics `Q(s, a)` and a policy.

    Box actions (bounded, in coordinates where they span [-1, 1]): a tanh-squashed Gaussian, or, with
    `stochastic=False`, its squashed mean alone. Discrete actions: critics give a value per action, and the policy is
    categorical, or, with `policy=None`, greedy on the first critic. `torso` computes features that the critics learn
    and the policy reads. `explore` is added where the parts act to learn.
    """

    family: ClassVar[str] = "off-policy"
    recurrent: ClassVar[None] = None

    spec: EnvSpec = option(help="the environment's spaces")
    policy: Network | None = option(default=_WIDE, help="hidden layers of the policy; None for greedy actions")
    critic: Network = option(default=_WIDE, help="hidden layers of each critic")
    torso: Network | None = option(default=None, help="features shared by policy and critics, learnt by the critics")
    explore: Exploration | None = option(default=None, help="what is added to actions while learning")
    critics: int = setting(default=2, help="number of critics")
    stochastic: bool = option(default=True, help="whether the policy is a distribution")
    duelling: bool = option(default=False, help="Q = V + A - mean(A) (arXiv 1511.06581), for Discrete actions")

    def __post_init__(self) -> None:
        action = self.spec.action
        if isinstance(action, Box):
            if not action.bounded:
                raise CompositionError(f"OffPolicyActorCritic squashes actions into their bounds; {action} has none")
            if self.policy is None:
                raise CompositionError(f"policy=None is greedy over Discrete actions; {action} needs a policy network")
            if self.duelling:
                raise CompositionError(f"duelling critics are for Discrete actions, not {action}")
        elif self.policy is not None and not self.stochastic:
            raise CompositionError(f"a deterministic policy needs Box actions, not {action}: use policy=None")
        if self.explore is not None and self.explore.continuous and isinstance(action, Discrete):
            raise CompositionError(f"{self.explore!r} is for Box actions, not {action}: use EpsilonGreedy()")
        for net in (self.policy, self.critic):
            if net is not None:
                net.width(taken(net, self._torso_shape()))

    # -- parameters, memory, noise ----------------------------------------------------------------------------

    def init(self, key: Tensor) -> Params:
        """Fresh parameters in groups `torso`, `policy`, `critic0`, `critic1`, ..."""
        tensors: Tensors = {}

        def add(group: str, more: Tensors) -> None:
            tensors.update({f"{group}.{n}": v for n, v in more.items()})

        keys, shape = random.split(key, 3 + 2 * self.critics), self._torso_shape()
        if self.torso is not None:
            add("torso", self.torso.init(keys[0], taken(self.torso, self._obs_shape())))
        if self.policy is not None:
            at = taken(self.policy, shape)
            add("policy", self.policy.init(keys[1], at))
            gaussian = isinstance(self.spec.action, Box) and self.stochastic
            add("policy.head", linear(keys[2], self.policy.width(at), self.actions * (2 if gaussian else 1), 0.01))
        at = self._critic_shape()
        for i in range(self.critics):
            add(f"critic{i}", self.critic.init(keys[3 + 2 * i], at))
            add(f"critic{i}.head", linear(keys[4 + 2 * i], self.critic.width(at), self._critic_width(), 1.0))
        return Params.of(tensors)

    def memory(self, n: int) -> Tensor:
        """What exploration carries through an episode, `[n, H]`."""
        return torch.zeros(n, self.explore.memory(self.actions) if self.explore else 0)

    def placed(self, hyper: dict[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        """As the exploration has it."""
        return hyper if self.explore is None else self.explore.placed(hyper, places)

    def noise(self, key: Tensor, steps: int, n: int) -> ActionNoise:
        """What acting draws for `steps` steps of `n` environments, `[T, N, ...]`; `explored` says what of it counts."""
        keys, size, discrete = random.split(key, 4), self.actions, isinstance(self.spec.action, Discrete)
        policy = torch.zeros(steps, n, size, device=key.device)
        if self.stochastic and self.policy is not None:
            policy = (random.gumbel if discrete else random.normal)(keys[0], (steps, n, size))
        explore = torch.zeros(steps, n, 0, device=key.device)
        if not discrete and self.explore is not None:
            explore = random.normal(keys[1], (steps, n, size))
        replace = random.uniform(keys[2], (steps, n))
        if discrete:
            return ActionNoise(policy, explore, replace, random.randint(keys[3], (steps, n), 0, size))
        return ActionNoise(policy, explore, replace, random.uniform(keys[3], (steps, n, size), -1.0, 1.0))

    def explored(self, noise: ActionNoise, hyper: dict[str, Tensor], anything: bool) -> ActionNoise:
        """As far as exploration goes with these hyper-parameters; with `anything`, random actions."""
        explore, chance = noise.explore, 1.0 if anything else 0.0
        if self.explore is not None:
            explore, chance = self.explore.scale(explore, hyper), 1.0 if anything else self.explore.chance(hyper)
        return ActionNoise(noise.policy, explore, noise.replace < chance, noise.action)

    # -- acting -------------------------------------------------------------------------------------------------

    def act(
        self, params: Params, obs: Tensor, memory: Tensor, noise: ActionNoise | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`action, env_action, logp [N], memory`; the likeliest action, unexplored, where noise is None. `logp` is 0:
        nothing off-policy reads it.
        """
        x = self.features(params, obs)
        if self.policy is None:
            action = self.q(params, x)[0].argmax(-1)
        elif noise is None or not self.stochastic:
            action = self.mode(params, x)
        else:
            action = self.pi(params, x).sample(noise.policy)
        if noise is not None:
            if self.explore is not None:
                action, memory = self.explore.explore(action, noise.explore, memory)
            replace = noise.replace if action.dim() == noise.replace.dim() else noise.replace[..., None]
            action = torch.where(replace, noise.action, action)
        return action, self.env_action(action), torch.zeros(obs.shape[:1], device=obs.device), memory

    # -- what losses are made of --------------------------------------------------------------------------------

    def features(self, params: Params, obs: Tensor) -> Tensor:
        """What policy and critics read of observations `[B, ...]`."""
        return self._features(params.groups, obs)

    def pi(self, params: Params, x: Tensor) -> Categorical | TanhNormal:
        """The policy at features `[B, ...]`."""
        return self.choices(params, x) if isinstance(self.spec.action, Discrete) else self.squashed(params, x)

    def choices(self, params: Params, x: Tensor) -> Categorical:
        """The policy over Discrete actions."""
        return Categorical(self._head(params.groups, "policy", self.policy, x))

    def squashed(self, params: Params, x: Tensor) -> TanhNormal:
        """The policy over Box actions."""
        mean, log_std = self._head(params.groups, "policy", self.policy, x).split(self.actions, -1)
        return TanhNormal(mean, log_std.clamp(-20.0, 2.0))

    def mode(self, params: Params, x: Tensor) -> Tensor:
        """The policy's likeliest action `[B, A]` or `[B]` at features; that of a deterministic policy."""
        if self.stochastic:
            return self.pi(params, x).mode()
        return torch.tanh(self._head(params.groups, "policy", self.policy, x))

    def q(self, params: Params, x: Tensor, action: Tensor | None = None) -> Tensor:
        """Values of every critic at features: `[C, B]` of Box actions `[B, A]`, `[C, B, n]` of all Discrete ones."""
        if action is not None:
            x = torch.cat([fit(MLP(), x, self._torso_shape()), action], -1)
        each = [self._head(params.groups, f"critic{i}", self.critic, x) for i in range(self.critics)]
        values = torch.stack(each) if len(each) > 1 else each[0][None]
        if isinstance(self.spec.action, Box):
            return values.squeeze(-1)
        if not self.duelling:
            return values
        value, advantage = values[..., :1], values[..., 1:]
        return value + advantage - advantage.mean(-1, keepdim=True)

    # -- inside -------------------------------------------------------------------------------------------------

    def _critic_shape(self) -> tuple[int, ...]:
        if isinstance(self.spec.action, Discrete):
            return taken(self.critic, self._torso_shape())
        return (math.prod(self._torso_shape()) + self.actions,)

    def _critic_width(self) -> int:
        return 1 if isinstance(self.spec.action, Box) else self.actions + self.duelling

    def _head(self, groups: Groups, name: str, net: Network | None, x: Tensor) -> Tensor:
        assert net is not None
        if not isinstance(self.spec.action, Box) or name == "policy":
            x = fit(net, x, self._torso_shape())
        x = net.apply(groups[name], x)
        return F.linear(x, groups[name]["head.weight"], groups[name]["head.bias"])
