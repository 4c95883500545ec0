"""What the predecessor got wrong about replay, SAC and DQN stays right."""

import dataclasses

import pytest
import torch

import fnrl
from fnrl import tree
from fnrl.testing import probes

ENV = probes.ActionObservationReward(num_envs=2, continuous=True)
POLE = fnrl.envs.CartPole(num_envs=3, time_limit=9)
SMALL = fnrl.MLP((8,))
SIMPLE = fnrl.centralised(fnrl.gradients(fnrl.collect))
WIDE = fnrl.centralised(fnrl.synchronous(fnrl.gradients(fnrl.synchronous(fnrl.collect, 2)), 2))


def scheme(topology, algo=None, **options):
    env = ENV if algo is None else POLE
    actor = fnrl.OffPolicyActorCritic(env.spec, options.pop("policy", SMALL), SMALL, **options)
    storage = fnrl.Replay(capacity=60, steps=2, warmup=12)
    return fnrl.Scheme(fnrl.Parts(env, actor, algo or fnrl.SAC(batch=4, ratio=0.5), storage), topology)


def test_rewards_are_what_the_environment_gave_however_often_they_are_drawn():
    """nappo scaled the stored reward in place, at each use: 5, 25, 125."""
    s = scheme(SIMPLE)
    state, _ = s.step(s.init(fnrl.key(0)), 3)
    ring = state.node.child.storage.token.owner
    before, size = ring.rows.reward[: ring.size].clone(), ring.size
    state, _ = s.step(state, 6)
    assert ring.size > size
    assert torch.equal(ring.rows.reward[:size], before)
    batch = state.node.child.batches
    if not isinstance(batch, tuple):
        assert bool(torch.isin(batch.data.batch.reward, ring.rows.reward).all())
    with pytest.raises(fnrl.CompositionError, match="leave it out with off-policy parts"):
        dataclasses.replace(s.parts, scale_reward=fnrl.ScaleReward())


@pytest.mark.parametrize("algo", [None, fnrl.DQN(batch=4, ratio=0.5, target_every=3)])
def test_targets_begin_as_copies_and_every_worker_learns_with_the_same(algo):
    """nappo's remote workers had targets of another random network, and temperatures of their own."""
    options = {} if algo is None else {"policy": None, "critics": 1, "explore": fnrl.EpsilonGreedy()}
    s = scheme(WIDE, algo, **options)
    state = s.init(fnrl.key(0))
    params, target = state.weights.params, state.weights.target
    for name in target.layout.names:
        assert torch.equal(params[name], target[name])
    state, _ = s.step(state, 5)
    assert not hasattr(state.node.child.workers[0], "algo")  # targets and temperature live in one place
    saved = s.gather(state)
    assert tree.same_bits(s.gather(s.restore(saved)), saved)
    if algo is None:
        log_temperature = state.weights.params["algo.log_temperature"]
        assert not torch.equal(log_temperature, params["algo.log_temperature"])


def test_epsilon_follows_the_steps_in_every_collector():
    """nappo's epsilon decayed where updates were applied only: collectors elsewhere explored at 1 for ever."""
    epsilon = fnrl.Linear(1.0, 0.0, steps=200)
    algo = fnrl.DQN(batch=4, ratio=0.25)
    s = scheme(WIDE, algo, policy=None, critics=1, explore=fnrl.EpsilonGreedy(epsilon=epsilon))
    state, seen = s.init(fnrl.key(0)), []
    for _ in range(12):
        state, _ = s.step(state)
        seen.append((state.settled, state.env_steps, float(state.weights.hyper["epsilon"])))
    settled = [(steps, value) for whole, steps, value in seen if whole]
    assert len(settled) > 2
    assert all(value == pytest.approx(epsilon(steps)) for steps, value in settled)


def test_a_ring_holds_no_memory_of_actors_without_one_and_no_observation_twice():
    """nappo's held 512 zeros of a recurrent state for each transition, and each observation twice."""
    s = scheme(SIMPLE)
    state, _ = s.step(s.init(fnrl.key(0)), 20)
    ring = state.node.child.storage.token.owner
    held = {n: x for n, x in ((n, getattr(ring.rows, n)) for n in type(ring.rows).__fields__.data) if len(x)}
    assert set(held) == {"obs", "action", "reward", "terminated", "truncated", "final_at", "finals"}
    rows = ring.whole * 2
    assert sum(x.nbytes for n, x in held.items() if n != "finals") == rows * (4 + 4 + 4 + 1 + 1 + 4)


@pytest.mark.parametrize("num_envs", [1, 5])
def test_dqn_takes_any_number_of_environments_and_evaluates_without_exploring(num_envs):
    """nappo's was broken for vectors, and its tests ran epsilon-greedily."""
    env = fnrl.envs.CartPole(num_envs=num_envs, time_limit=9)
    actor = fnrl.OffPolicyActorCritic(env.spec, None, SMALL, critics=1, explore=fnrl.EpsilonGreedy(epsilon=1.0))
    storage = fnrl.Replay(capacity=60, steps=2, warmup=12)
    s = fnrl.Scheme(fnrl.Parts(env, actor, fnrl.DQN(batch=4), storage), SIMPLE)
    state, _ = s.step(s.init(fnrl.key(0)), 3)
    params = state.weights.params
    obs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    action, *_ = actor.act(params, obs, actor.memory(50), None)
    assert torch.equal(action, actor.q(params, actor.features(params, obs))[0].argmax(-1))
