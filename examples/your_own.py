"""An environment, a network and an algorithm of your own, trained, saved, resumed and used.

python examples/your_own.py

The environment is any gymnasium class; the network any `nn.Module` without hidden state, named by its class and
arguments; the algorithm a component with a loss. All of it can be replaced by a part of fnrl, and the other way round.
"""

import tempfile
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import fnrl
from fnrl import losses
from fnrl.component import Schedule
from fnrl.optim import Adam, Optimiser
from fnrl.types import Aux, Plan

torch.set_num_threads(1)


class Reach(gymnasium.Env):
    """A point on a line that is to be at a goal; an episode is 30 steps."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-0.2, 0.2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """The point and the goal, drawn from the seed."""
        super().reset(seed=seed)
        self.steps, self.at = 0, self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self.at.copy(), {}

    def step(self, action):
        """Moves the point; pays what is left of the way."""
        self.steps += 1
        self.at[0] = np.clip(self.at[0] + action[0], -2.0, 2.0)
        return self.at.copy(), -abs(float(self.at[0] - self.at[1])), False, self.steps >= 30, {}


class Residual(nn.Module):
    """A layer, and another that corrects it."""

    def __init__(self, features: int, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[..., width]`."""
        x = torch.tanh(self.first(x))
        return x + torch.tanh(self.second(x))


@fnrl.component
class Vanilla(fnrl.Algorithm):
    """The policy gradient, and a value function beside it: L = mean(-logp A) + mean((V - G)^2) / 2."""

    family: ClassVar[str] = "on-policy"

    lr: float | Schedule = fnrl.hyper(default=3e-3, help="learning rate")
    gamma: float | Schedule = fnrl.hyper(default=0.95, high=1.0, help="discount")
    optimiser: Optimiser = fnrl.option(default=Adam(), help="the optimiser")

    @property
    def plan(self) -> Plan:
        """Each rollout once, in one piece."""
        return Plan(epochs=1, minibatches=1)

    def loss(self, actor, params, weights, batch, noise):
        """The loss over a batch `[T, B]`."""
        logp, _, value, _ = actor.evaluate(params, batch.obs, batch.memory, batch.starts, batch.action)
        policy = losses.policy_gradient(logp, losses.normalise(batch.advantage)).mean()
        return policy + losses.value_loss(value, batch.target).mean(), Aux({"policy_loss": policy})


def main(env_steps: int = 60_000) -> float:
    """Trains in two sittings, and gives the mean of 20 episodes."""
    env, net = fnrl.envs.gym(Reach, num_envs=8), fnrl.module(Residual, features=2)
    actor = fnrl.OnPolicyActorCritic(env.spec, policy=net, value=net, log_std=-0.5)
    parts = fnrl.Parts(env, actor, Vanilla(), fnrl.GAE(steps=32))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    with tempfile.TemporaryDirectory() as runs:
        with fnrl.Learner(scheme, env_steps // 2, runs) as learner:
            learner.train(progress=False)
        with fnrl.Learner.resume(runs, scheme, env_steps) as learner:  # exactly where it was
            learner.train(progress=False)
            result = learner.evaluate(episodes=20)
        policy = fnrl.load_policy(runs, actor)  # a network of your own is built by you, not from a file
    print(result)
    print("from 1 to -1:", policy(np.array([1.0, -1.0], np.float32)), "of a batch:", policy(np.zeros((3, 2))).shape)
    return result.mean


if __name__ == "__main__":
    main()
