"""A GPU, where there is one: the same program there gives what it gives on the CPU, to rounding, and is as exact."""

import dataclasses
import warnings

import pytest
import torch
from learner_cases import bits, quiet

import fnrl
from fnrl import random, tree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
SMALL = fnrl.MLP((16,))
TOPOLOGY = fnrl.centralised(fnrl.gradients(fnrl.collect))


def ppo(env, normalised=False, **networks):
    actor = fnrl.OnPolicyActorCritic(env.spec, **{"policy": SMALL, "value": SMALL, **networks})
    extras = {"normalise_obs": fnrl.NormaliseObs(), "scale_reward": fnrl.ScaleReward()} if normalised else {}
    return fnrl.Parts(env, actor, fnrl.PPO(epochs=2, minibatches=2), fnrl.GAE(steps=16), **extras)


def off_policy(env, algo, replay=None, **options):
    actor = fnrl.OffPolicyActorCritic(env.spec, options.pop("policy", SMALL), SMALL, **options)
    return fnrl.Parts(env, actor, algo, replay or fnrl.Replay(capacity=256, warmup=32))


def parts_of(name):
    pole = fnrl.envs.CartPole(num_envs=4, time_limit=9)
    pendulum = fnrl.envs.gym("Pendulum-v1", num_envs=2, max_episode_steps=7)
    flips = fnrl.envs.BitFlipping(4, num_envs=2)
    choose = {"policy": None, "critics": 1, "explore": fnrl.EpsilonGreedy()}
    return {
        "ppo": lambda: ppo(pole),
        "ppo with memory": lambda: ppo(pole, recurrent=fnrl.GRU(5)),
        "ppo, normalised, of a simulator": lambda: ppo(pendulum, normalised=True),
        "sac": lambda: off_policy(pendulum, fnrl.SAC(batch=16)),
        "td3": lambda: off_policy(pendulum, fnrl.TD3(batch=16), stochastic=False, explore=fnrl.Gaussian()),
        "dqn by priority": lambda: off_policy(
            pole,
            fnrl.DQN(batch=16),
            fnrl.Replay(capacity=256, warmup=32, n_step=2, prioritised=fnrl.Prioritised()),
            duelling=True,
            **choose,
        ),
        "dqn in hindsight": lambda: off_policy(
            flips, fnrl.DQN(batch=16), fnrl.Replay(capacity=256, warmup=32, hindsight=fnrl.Hindsight()), **choose
        ),
    }[name]()


NAMES = (
    "ppo", "ppo with memory", "ppo, normalised, of a simulator", "sac", "td3", "dqn by priority", "dqn in hindsight",
)  # fmt: skip
named = pytest.mark.parametrize("name", NAMES)


def run(scheme, key, updates):
    """The state after so many updates, on the CPU, and the means of their metrics."""
    state = scheme.init(key)
    try:
        state, info = scheme.step(state, updates)
        return tree.to(scheme.gather(state), "cpu"), info
    finally:
        scheme.close(state)


def same(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert tree.same_bits(x, y)


def keys(n):
    return torch.stack([fnrl.key(i) for i in range(n)])


def weights(state):
    return state.weights.params.vector


def test_draws_are_those_of_the_cpu():
    key = random.key(3)
    there = key.to(DEVICE)
    assert torch.equal(random.split(there, 5).cpu(), random.split(key, 5))
    assert torch.equal(random.bits(there, (1000,)).cpu(), random.bits(key, (1000,)))
    assert torch.equal(random.uniform(there, (1000,)).cpu(), random.uniform(key, (1000,)))
    assert torch.equal(random.permutation(there, 1000).cpu(), random.permutation(key, 1000))
    torch.testing.assert_close(
        random.normal(there, (10_000,)).cpu(), random.normal(key, (10_000,)), rtol=1e-6, atol=1e-6
    )


@named
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lanes", [None, 3], ids=["solo", "lanes"])
def test_a_run_is_that_of_the_cpu(name, lanes, compiled):
    """While no action is another: afterwards rounding may part them."""
    scheme = fnrl.Scheme(parts_of(name), TOPOLOGY)
    key = fnrl.key(1) if lanes is None else keys(lanes)
    here, _ = run(scheme, key, 4)
    there, _ = run(dataclasses.replace(scheme, device=DEVICE, compile=compiled), key, 4)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-4, atol=2e-5)


@named
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_has_the_same_bits_each_time(name, compiled):
    scheme = fnrl.Scheme(parts_of(name), TOPOLOGY, compile=compiled, device=DEVICE)
    first, second = (run(scheme, fnrl.key(1), 24)[0] for _ in range(2))
    same(first, second)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lanes_hardly_depend_on_how_many_they_are(compiled):
    """On a GPU kernels are chosen by the size of the whole, so that the last bits may differ; compiled, they do."""
    scheme = fnrl.Scheme(parts_of("ppo"), TOPOLOGY, compile=compiled, device=DEVICE)
    two, eight = (run(scheme, keys(n), 12)[0] for n in (2, 8))
    torch.testing.assert_close(weights(eight)[:2], weights(two), rtol=1e-4, atol=2e-5)


def test_what_a_graph_has_given_stays_as_it_was():
    scheme = fnrl.Scheme(parts_of("ppo"), TOPOLOGY, compile=True, device=DEVICE)
    state, _ = scheme.step(scheme.init(fnrl.key(0)))
    kept = tree.map(torch.clone, state)
    later, _ = scheme.step(state, 9)
    again, _ = scheme.step(state, 9)
    same(state, kept)
    same(later, again)


def test_a_lane_that_is_not_finite_stands_still_alone():
    parts = parts_of("ppo")
    swept = dataclasses.replace(parts, algo=dataclasses.replace(parts.algo, lr=fnrl.PerLane((1e-3, 3e38, 1e-3))))
    scheme = fnrl.Scheme(swept, TOPOLOGY, device=DEVICE)
    with pytest.warns(fnrl.DeadLaneWarning, match="lane 1"):
        state, _ = run(scheme, keys(3), 8)
    assert torch.isfinite(weights(state)).all()
    assert not torch.equal(weights(state)[0], weights(state)[2])


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_a_learner_resumes_exactly_on_the_gpu_and_goes_on_without_one(tmp_path, name):
    scheme = fnrl.Scheme(parts_of(name), TOPOLOGY, device=DEVICE)
    with quiet(scheme, 4096, tmp_path / "whole") as learner:
        learner.step(60)
        whole = bits(learner)
    with quiet(scheme, 4096, tmp_path / "parts") as learner:
        learner.step(33)
        learner.save()
    with fnrl.Learner.resume(tmp_path / "parts", scheme) as learner:
        learner.step(27)
        resumed = bits(learner)
        learner.save()
    same(whole, resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elsewhere = fnrl.Learner.resume(tmp_path / "parts", dataclasses.replace(scheme, device="cpu"))
    with elsewhere:
        elsewhere.step(5)


def test_evaluation_and_a_saved_policy(tmp_path):
    scheme = fnrl.Scheme(ppo(fnrl.envs.CartPole(num_envs=4)), TOPOLOGY, device=DEVICE)
    with quiet(scheme, 256, tmp_path, evaluation=None) as learner:
        learner.train()
    policy = fnrl.load_policy(tmp_path)
    assert policy(torch.zeros(4)).shape == ()
