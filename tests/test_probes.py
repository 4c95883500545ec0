"""The five probing environments: their known values follow from their steps, and PPO finds them."""

import dataclasses

import pytest
import torch

import fnrl
from fnrl import random
from fnrl.envs import EnvState
from fnrl.testing.probes import PROBES

named = pytest.mark.parametrize("env", PROBES, ids=repr)


@named
def test_values_solve_bellmans_equation(env):
    gamma = 0.7
    obs = env.observations
    choices = torch.linspace(-1.0, 1.0, 5)[:, None] if env.continuous else torch.arange(env.spec.action.n)
    best = torch.full((len(obs),), -torch.inf)
    for choice in choices:
        vector = dataclasses.replace(env, num_envs=len(obs))
        action = choice.expand(len(obs), *choice.shape)
        _, step = vector.step(EnvState(obs, ()), action, vector.noise(random.key(0), 1)[0])
        after = torch.where(step.terminated, 0.0, gamma * env.value(step.next_obs, gamma))
        best = torch.maximum(best, step.reward + after)
    torch.testing.assert_close(best, env.value(obs, gamma))


@named
def test_observations_are_all_that_are_acted_on(env):
    state, seen = env.init(random.key(0)), set()
    noise = env.noise(random.key(1), 12)
    for t in range(12):
        seen.update(state.obs.flatten().tolist())
        action = torch.zeros(env.num_envs, 1) if env.continuous else torch.zeros(env.num_envs, dtype=torch.int64)
        state, _ = env.step(state, action, noise[t])
    assert seen == set(env.observations.flatten().tolist())


def error(env, activation=torch.tanh, **options):
    """The largest error of the values that 70 updates learn."""
    actor = fnrl.OnPolicyActorCritic(env.spec, fnrl.MLP((16,), activation), fnrl.MLP((16,)))
    algo = fnrl.PPO(**{"lr": 0.03, "gamma": 0.5, "clip": 0.3, "epochs": 2, "minibatches": 1, **options})
    parts = fnrl.Parts(env, actor, algo, fnrl.GAE(steps=4))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state, _ = scheme.step(scheme.init(fnrl.key(0)), updates=70)
    obs = env.observations
    starts = torch.zeros(1, len(obs), dtype=torch.bool)
    value, _ = actor.values(state.weights.params, obs[None], actor.memory(len(obs)), starts)
    return float((value[0] - env.value(obs, 0.5)).abs().max())


@named
def test_ppo_finds_the_values(env):
    assert error(env) < 0.05


@pytest.mark.parametrize(
    ("probe", "fault"),
    [
        (0, {"value_coef": 0.0}),
        (4, {"gamma": 0.9}),
        (6, {"lr": 0.0}),
        (8, {"activation": torch.zeros_like}),  # a policy that does not see
    ],
)
def test_a_fault_is_found_by_its_probe(probe, fault):
    assert error(PROBES[probe], **fault) > 0.05
