"""Environments with one fault each."""

import dataclasses
import random as python_random
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from fnrl import random
from fnrl.envs import CartPole, GymVector
from fnrl.record import host, record


class TorchDraws(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward + torch.rand(()))


class NumpyDraws(CartPole):
    def noise(self, key, steps):
        return super().noise(key, steps) * float(np.random.rand())


class PythonDraws(CartPole):
    def init(self, key):
        python_random.random()
        return super().init(key)


class WritesItsInput(CartPole):
    def step(self, state, action, noise):
        state.inside.steps.add_(0)
        return super().step(state, action, noise)


class ChangesItsInput(CartPole):
    def step(self, state, action, noise):
        action.fill_(1)
        return super().step(state, action, noise)


class Counts(CartPole):
    calls: ClassVar[list[int]] = []

    def step(self, state, action, noise):
        self.calls.append(1)
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward * len(self.calls))


class ResetIsSuccessor(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, next_obs=state.obs)


class GoesOnFromElsewhere(CartPole):
    def step(self, state, action, noise):
        after, step = super().step(state, action, noise)
        return after, dataclasses.replace(step, next_obs=state.obs)


class OneNoiseForAll(CartPole):
    def noise(self, key, steps):
        return super().noise(key, steps)[:, :1].expand(-1, self.num_envs, -1)


class AlwaysTheSameStart(CartPole):
    def noise(self, key, steps):
        return torch.full((steps, self.num_envs, 4), 0.01)


class IgnoresItsKey(CartPole):
    def init(self, key):
        return super().init(random.key(0))


class DoubleReward(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward.double())


class NoReward(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward / (~step.truncated).float())


class ReadsATensor(CartPole):
    def step(self, state, action, noise):
        return super().step(state, action + int(action.sum()) * 0, noise)


class LaneCount(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x + 1e-6 * info.batch_size, in_dims[0]


class FeelsOtherLanes(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=LaneCount.apply(step.reward))


class OtherwiseInAGraph(CartPole):
    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward * (2.0 if torch.compiler.is_compiling() else 1.0))


@record
class Noted:
    physics: torch.Tensor
    steps: torch.Tensor
    note: object = host(default=None)


NOTE = object()


class HidesAnObject(CartPole):
    def init(self, key):
        state = super().init(key)
        return dataclasses.replace(state, inside=Noted(state.inside.physics, state.inside.steps, NOTE))

    def step(self, state, action, noise):
        after, step = super().step(state, action, noise)
        inside = Noted(after.inside.physics, after.inside.steps, NOTE)
        return dataclasses.replace(after, inside=inside), step


class Thawed(CartPole):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


def local():
    class Local(CartPole):
        """A class that no other process can find."""

    return Local


class Random(gymnasium.Env):
    """Its numbers are its own affair."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action):
        self.steps += 1
        return self.obs(), 0.0, False, self.steps >= 4, {}

    def obs(self):
        return self.np_random.normal(size=2).astype(np.float32)


class Unseeded(Random):
    def obs(self):
        return np.random.normal(size=2).astype(np.float32)


class Restarts(GymVector):
    def restore(self, pure):
        return self.init(pure.keys[0])


class NeverCloses(GymVector):
    def close(self, state):
        pass


class StepsTheStale(GymVector):
    def step(self, state, action, noise=()):
        return state.token.owner.step(action)
