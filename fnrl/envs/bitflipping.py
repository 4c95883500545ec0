"""Bit flipping, from the paper of hindsight experience replay: arXiv 1707.01495, section 3.1."""

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.component import component, setting
from fnrl.envs.base import EnvState, PureEnvironment, Step
from fnrl.record import record
from fnrl.spaces import Box, Discrete, EnvSpec, Goal


@record
class BitFlippingState:
    """The observation `[N, 2n]`, and steps taken `[N]`."""

    obs: Tensor
    steps: Tensor


@component
class BitFlipping(PureEnvironment):
    """N times n bits; action i flips the i-th. The goal is another n bits, drawn with the first state.

    r = 0 where the bits are the goal, which terminates the episode, and -1 else; truncated after n steps. All there is
    to observe is the goal achieved: observations are `[achieved, desired]`, of zeros and ones.
    """

    n: int = setting(default=20, help="bits, and steps of an episode at most")
    num_envs: int = setting(default=4, help="environments stepped together")

    @property
    def spec(self) -> EnvSpec:
        """2n numbers in, n actions out."""
        return EnvSpec(f"BitFlipping({self.n})", Box((2 * self.n,), 0.0, 1.0), Discrete(self.n), Goal(0, self.n))

    def noise(self, key: Tensor, steps: int) -> Tensor:
        """A first state and its goal for every step at which an episode could begin, `[T, N, 2n]`."""
        words = random.bits(key, (steps, self.num_envs, -(-2 * self.n // 32)))
        every = torch.arange(32, dtype=torch.int32, device=key.device)
        return (words[..., None] >> every & 1).flatten(-2)[..., : 2 * self.n].float()

    def init(self, key: Tensor) -> EnvState:
        """N fresh episodes."""
        obs = self.noise(key, 1)[0]
        return EnvState(obs, BitFlippingState(obs, torch.zeros(self.num_envs, dtype=torch.int64, device=key.device)))

    def step(self, state: EnvState, action: Tensor, noise: Tensor) -> tuple[EnvState, Step]:
        """Flips one bit of each, of actions `[N]`."""
        old: BitFlippingState = state.inside
        flip = torch.arange(2 * self.n, device=action.device) == action[..., None]
        obs = torch.where(flip, 1.0 - old.obs, old.obs)
        reward, terminated = self.judge(obs[..., : self.n], obs[..., self.n :])
        steps = old.steps + 1
        truncated = steps >= self.n
        new = BitFlippingState(obs, steps)
        after = tree.where(terminated | truncated, BitFlippingState(noise, torch.zeros_like(steps)), new)
        return EnvState(after.obs, after), Step(obs, reward, terminated, truncated)

    def judge(self, achieved: Tensor, desired: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and termination `[...]` of goals achieved `[..., n]` where others were desired."""
        reached = (achieved == desired).all(-1)
        return reached.float() - 1.0, reached
