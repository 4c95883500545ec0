"""Five environments that isolate one thing each, with their known values: what fails first says what is wrong.

After Andy Jones, "Debugging RL, Without the Agonizing Pain" (andyljones.com/posts/rl-debugging.html), as in rejax. Each
has an observation `[N, 1]` and, by `continuous`, an action of [-1, 1] in place of the discrete ones.

| probe | if it fails |
|---|---|
| ConstantReward | the value's loss or optimiser |
| ObservationReward | the value does not see the observation |
| DiscountedReward | discounting, or the value of a successor |
| ActionReward | the policy's loss, or the advantage |
| ActionObservationReward | the policy does not see the observation |
"""

import torch
from torch import Tensor

from fnrl import random
from fnrl.component import component, option, setting
from fnrl.envs.base import EnvState, PureEnvironment, Step
from fnrl.spaces import Box, Discrete, EnvSpec


@component
class Probe(PureEnvironment):
    """Base: N episodes of one step, observations of -1 or 1 at random, no reward; the observation is all the state."""

    num_envs: int = setting(default=16, help="environments stepped together")
    continuous: bool = option(default=False, help="actions of [-1, 1] instead of discrete ones")

    @property
    def spec(self) -> EnvSpec:
        """One number in, one action out: of [-1, 1], or of `actions` choices."""
        action = Box((1,), -1.0, 1.0) if self.continuous else Discrete(self.actions)
        return EnvSpec(type(self).__name__, Box((1,), -1.0, 1.0), action)

    @property
    def actions(self) -> int:
        """Discrete choices: one, where the action does not matter."""
        return 1

    @property
    def observations(self) -> Tensor:
        """Every observation on which the policy acts `[M, 1]`."""
        return torch.tensor([[-1.0], [1.0]])

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """The value of the best policy `[...]` at observations `[..., 1]`."""
        return torch.zeros(obs.shape[:-1])

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """The reward `[N]`; `push` is the action as a number of [-1, 1] `[N]`."""
        return torch.zeros_like(push)

    def first(self, sign: Tensor) -> Tensor:
        """The first observation `[N, 1]` of an episode from -1 or 1 at random."""
        return sign

    def successor(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """The next observation `[N, 1]`, and whether the episode terminated `[N]`."""
        return obs, torch.ones_like(obs[..., 0], dtype=torch.bool)

    def noise(self, key: Tensor, steps: int) -> Tensor:
        """A sign for every step at which an episode could begin `[T, N, 1]`."""
        return 2.0 * random.randint(key, (steps, self.num_envs, 1), 0, 2).float() - 1.0

    def init(self, key: Tensor) -> EnvState:
        """N fresh episodes."""
        return EnvState(self.first(self.noise(key, 1)[0]), ())

    def step(self, state: EnvState, action: Tensor, noise: Tensor) -> tuple[EnvState, Step]:
        """One step with actions `[N]`, or `[N, 1]` where continuous."""
        push = action[..., 0] if self.continuous else 2.0 * action.float() - 1.0
        next_obs, terminated = self.successor(state.obs)
        obs = torch.where(terminated[..., None], self.first(noise), next_obs)
        step = Step(next_obs, self.reward(state.obs[..., 0], push), terminated, torch.zeros_like(terminated))
        return EnvState(obs, ()), step


@component
class ConstantReward(Probe):
    """Observation 0, one step, reward 1: V(0) = 1."""

    @property
    def observations(self) -> Tensor:
        """Zero."""
        return torch.zeros(1, 1)

    def first(self, sign: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(sign)

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(push)

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """One."""
        return torch.ones(obs.shape[:-1])


@component
class ObservationReward(Probe):
    """Observation -1 or 1, one step, the observation as reward: V(s) = s."""

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """The observation."""
        return obs

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """The observation."""
        return obs[..., 0]


@component
class DiscountedReward(Probe):
    """Observation 0, then 1, and a reward of 1 at the end of the second step: V(0) = gamma, V(1) = 1."""

    @property
    def observations(self) -> Tensor:
        """Zero and one."""
        return torch.tensor([[0.0], [1.0]])

    def first(self, sign: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(sign)

    def successor(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """One, where the second step ends the episode."""
        return torch.ones_like(obs), obs[..., 0] == 1.0

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """One, at the second step."""
        return obs

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """`gamma ** (1 - s)`."""
        return torch.where(obs[..., 0] == 1.0, 1.0, gamma)


@component
class ActionReward(Probe):
    """Observation 0, one step, reward -1 to 1 by the action (action 1 pays 1, action 0 pays -1): V(0) = 1."""

    @property
    def actions(self) -> int:
        """Two."""
        return 2

    @property
    def observations(self) -> Tensor:
        """Zero."""
        return torch.zeros(1, 1)

    def first(self, sign: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(sign)

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """The action."""
        return push

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """One."""
        return torch.ones(obs.shape[:-1])


@component
class ActionObservationReward(Probe):
    """Observation -1 or 1, one step, the action times the observation as reward: V(s) = 1."""

    @property
    def actions(self) -> int:
        """Two."""
        return 2

    def reward(self, obs: Tensor, push: Tensor) -> Tensor:
        """The action if it is 1, its opposite if it is -1."""
        return obs * push

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """One."""
        return torch.ones(obs.shape[:-1])


PROBES = tuple(
    kind(continuous=continuous)
    for kind in (ConstantReward, ObservationReward, DiscountedReward, ActionReward, ActionObservationReward)
    for continuous in (False, True)
)
