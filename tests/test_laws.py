"""A table: every component that fnrl ships, times the laws of `fnrl.testing`. Add a row for a new one."""

import pytest
import torch
from torch import nn

import fnrl
from fnrl import (
    A2C,
    CNN,
    GAE,
    GRU,
    MLP,
    PPO,
    SGD,
    Adam,
    OnPolicyActorCritic,
    Parts,
    Returns,
    collect,
    gradients,
    synchronous,
)
from fnrl.envs import CartPole, gym
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.testing import check_actor, check_algorithm, check_environment, check_node, check_storage, probes


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return x + torch.relu(self.second(x))


def actor(obs=None, action=None, **networks):
    small = {"policy": MLP((8,)), "value": MLP((7,))}
    return OnPolicyActorCritic(EnvSpec("made up", obs or Box((3,)), action or Discrete(3)), **{**small, **networks})


IMAGE = Box((9, 9, 2), 0, 255, "uint8")
TINY = CNN(filters=(4, 5), kernels=(4, 2), strides=(2, 1), hidden=12)
ACTORS = {
    "discrete": actor(),
    "discrete from -1": actor(action=Discrete(2, start=-1)),
    "one choice": actor(action=Discrete(1)),
    "free box": actor(action=Box((2,))),
    "unit box": actor(action=Box((2,), -1.0, 1.0)),
    "box with bounds of its own": actor(action=Box((2, 2), (-1.0, 0.0, -2.0, -3.0), (2.0, 1.0, 0.5, 4.0))),
    "half-bounded box": actor(action=Box((2,), low=-0.5)),
    "scalar boxes": actor(Box(()), Box((), -2.0, 2.0)),
    "free scalar action": actor(action=Box(())),
    "discrete observations": actor(Discrete(4)),
    "matrix observations": actor(Box((3, 2)), torso=MLP((5,), torch.relu)),
    "bytes": actor(Box((3, 2), 0, 255, "uint8")),
    "images": actor(IMAGE, policy=MLP(()), value=MLP(()), torso=TINY),
    "a network of one's own": actor(torso=fnrl.module(Residual, width=6)),
    "memory": actor(recurrent=GRU(5)),
    "memory over images": actor(IMAGE, Box((3,), -1.0, 1.0), torso=TINY, recurrent=GRU(5)),
}

ALGORITHMS = {
    "ppo": (PPO(),),
    "every option of ppo": (
        PPO(target_kl=0.01, clip_value=True, entropy_coef=0.01, normalise_advantage=False, max_grad_norm=None),
        actor(action=Box((2,), -1.0, 1.0)),
        Returns(steps=5),
    ),
    "ppo with memory": (PPO(minibatches=1), actor(recurrent=GRU(4)), GAE(steps=3)),
    "a2c": (A2C(),),
    "a2c with sgd and memory": (A2C(optimiser=SGD(momentum=0.9)), actor(Discrete(3), recurrent=GRU(3)), GAE(steps=4)),
    "weight decay": (A2C(optimiser=Adam(decay=0.1), normalise_advantage=True),),
}
STORAGES = {"gae": GAE(steps=6), "one step": GAE(steps=1, gae_lambda=0.0), "returns": Returns(steps=5)}
PURE = {"cartpole": CartPole(num_envs=3, time_limit=17)} | {repr(p): p for p in probes.PROBES}
RANDOM_FIRST = (CartPole, probes.ObservationReward, probes.ActionObservationReward)


@pytest.mark.parametrize("name", ACTORS)
def test_actors(name):
    check_actor(ACTORS[name], max_examples=2, compiled=name == "a network of one's own")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name):
    check_algorithm(*ALGORITHMS[name], max_examples=2, compiled=name == "every option of ppo")


@pytest.mark.parametrize("name", STORAGES)
def test_storages(name):
    check_storage(STORAGES[name], max_examples=2)


def test_a_storage_compiles():
    check_storage(GAE(steps=3), actor(), max_examples=1, compiled=True)


@pytest.mark.parametrize("name", PURE)
def test_pure_environments(name):
    env = PURE[name]
    first = isinstance(env, RANDOM_FIRST)
    steps = 64 if isinstance(env, CartPole) else 16
    check_environment(env, steps=steps, random_resets=first, max_examples=1, compiled=isinstance(env, CartPole))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Pendulum-v1", {"num_envs": 3, "max_episode_steps": 9}),
        ("CartPole-v1", {"num_envs": 2, "processes": True, "max_episode_steps": 9}),
        ("FrozenLake-v1", {"num_envs": 2, "max_episode_steps": 9}),
    ],
)
def test_hosted_environments(name, options):
    check_environment(gym(name, **options), steps=64, random_resets=name != "FrozenLake-v1", max_examples=1)


def parts(env, recurrent=None, **extras):
    networks = {"policy": MLP((5,)), "value": MLP((5,)), "recurrent": recurrent}
    who = OnPolicyActorCritic(env.spec, **networks)
    return Parts(env, who, PPO(epochs=2, minibatches=2), GAE(steps=8), **extras)


POLE = CartPole(num_envs=2, time_limit=6)
NORMALISED = {"normalise_obs": fnrl.NormaliseObs(), "scale_reward": fnrl.ScaleReward()}
NODES = {
    "collect": (collect, parts(POLE)),
    "collectors": (gradients(synchronous(collect, 2)), parts(POLE, **NORMALISED)),
    "gradient workers": (synchronous(gradients(collect), 2), parts(POLE, GRU(3), **NORMALISED)),
    "a simulator": (collect, parts(gym("Pendulum-v1", num_envs=2, max_episode_steps=7), **NORMALISED)),
    "simulators": (synchronous(gradients(synchronous(collect, 2)), 2), parts(gym("CartPole-v1", 2), GRU(3))),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes(name):
    check_node(*NODES[name], max_examples=1 if "simulators" in name else 2)
