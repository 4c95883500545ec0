"""The laws of fnrl run on components of your own: `pytest examples/test_your_component.py`.

An environment, and the three lines that check it. Then the mistake most often made in one: at a time limit it shows the
observation after the reset as the successor, so that values are learnt from the next episode. No curve would tell.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

import fnrl
from fnrl import random
from fnrl.envs import EnvState, Step
from fnrl.envs.base import PureEnvironment
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.testing import LawError, check_algorithm, check_environment


@fnrl.record
class Walker:
    """Where each walker is `[N]`, and the steps it has taken `[N]`."""

    position: Tensor
    steps: Tensor


@fnrl.component
class Walk(PureEnvironment):
    """N walkers on a line, who are paid for nearness to 0, fall off at +-4 and are called back after 20 steps."""

    num_envs: int = fnrl.setting(default=8, help="walkers")

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec("walk", Box((1,), -5.0, 5.0), Discrete(3))

    def noise(self, key: Tensor, steps: int) -> Tensor:
        return random.uniform(key, (steps, self.num_envs), -2.0, 2.0)

    def init(self, key: Tensor) -> EnvState:
        position = self.noise(key, 1)[0]
        return EnvState(position[:, None], Walker(position, torch.zeros(self.num_envs, dtype=torch.int64)))

    def step(self, state: EnvState, action: Tensor, noise: Tensor) -> tuple[EnvState, Step]:
        walked, steps = state.inside.position + 0.5 * (action - 1), state.inside.steps + 1
        terminated, truncated = walked.abs() > 4.0, steps >= 20
        done = terminated | truncated
        walker = Walker(torch.where(done, noise, walked), torch.where(done, 0, steps))
        return EnvState(walker.position[:, None], walker), Step(walked[:, None], -walked.abs(), terminated, truncated)


def test_my_environment():
    check_environment(Walk())


class Amnesiac(Walk):
    """Gives the first observation of the next episode for the last of this one."""

    def step(self, state: EnvState, action: Tensor, noise: Tensor) -> tuple[EnvState, Step]:
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, next_obs=state.obs)


def test_the_mistake_is_caught():
    with pytest.raises(LawError, match="not the next episode's first observation"):
        check_environment(Amnesiac())


@fnrl.component
class Reinforce(fnrl.A2C):
    """An algorithm of your own is its loss; here that of A2C, with the surprise of an action for a bonus."""

    surprise: float = fnrl.hyper(default=0.01, help="weight of -logp of the actions taken")

    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        logp, *_ = actor.evaluate(params, batch.obs, batch.memory, batch.starts, batch.action)
        return loss + weights.hyper["surprise"] * logp.mean(), aux


def test_my_algorithm():
    check_algorithm(Reinforce())
