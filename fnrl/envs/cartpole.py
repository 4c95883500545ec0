"""CartPole-v1 on tensors: Barto, Sutton and Anderson 1983, with the constants and the order of operations of
gymnasium's.
"""

import math

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.component import component, setting
from fnrl.envs.base import EnvState, PureEnvironment, Step
from fnrl.record import record
from fnrl.spaces import Box, Discrete, EnvSpec

_SPEC = EnvSpec(
    "CartPole-v1",
    Box(
        (4,),
        (-4.800000190734863, -math.inf, -0.41887903213500977, -math.inf),
        (4.800000190734863, math.inf, 0.41887903213500977, math.inf),
    ),
    Discrete(2),
)


@record
class CartPoleState:
    """Position, velocity, angle, angular velocity `[N, 4]`, and steps taken `[N]`."""

    physics: Tensor
    steps: Tensor


@component
class CartPole(PureEnvironment):
    """N cart-poles: reward 1 a step, terminated when the pole or the cart leaves its range, truncated after
    `time_limit` steps.
    """

    num_envs: int = setting(default=4, help="environments stepped together")
    time_limit: int = setting(default=500, help="steps after which an episode is truncated")

    @property
    def spec(self) -> EnvSpec:
        """Four numbers in, two actions out."""
        return _SPEC

    def noise(self, key: Tensor, steps: int) -> Tensor:
        """A first state for every step at which an episode could begin `[T, N, 4]`."""
        return random.uniform(key, (steps, self.num_envs, 4), -0.05, 0.05)

    def init(self, key: Tensor) -> EnvState:
        """N fresh episodes."""
        physics = self.noise(key, 1)[0]
        return EnvState(physics, CartPoleState(physics, torch.zeros(self.num_envs, dtype=torch.int64)))

    def step(self, state: EnvState, action: Tensor, noise: Tensor) -> tuple[EnvState, Step]:
        """One Euler step of 0.02 s; actions `[N]` push left (0) or right (1) with 10 N."""
        old: CartPoleState = state.inside
        x, v, theta, w = old.physics.unbind(-1)
        force = torch.where(action == 1, 10.0, -10.0)
        cos, sin = torch.cos(theta), torch.sin(theta)
        temp = (force + 0.05 * w.square() * sin) / 1.1
        alpha = (9.8 * sin - cos * temp) / (0.5 * (4.0 / 3.0 - 0.1 * cos.square() / 1.1))
        a = temp - 0.05 * alpha * cos / 1.1
        physics = torch.stack([x + 0.02 * v, v + 0.02 * a, theta + 0.02 * w, w + 0.02 * alpha], -1)
        steps = old.steps + 1
        terminated = (physics[..., 0].abs() > 2.4) | (physics[..., 2].abs() > 12 * 2 * math.pi / 360)
        truncated = steps >= self.time_limit
        done = terminated | truncated
        after = tree.where(done, CartPoleState(noise, torch.zeros_like(steps)), CartPoleState(physics, steps))
        return EnvState(after.physics, after), Step(physics, torch.ones_like(x), terminated, truncated)
