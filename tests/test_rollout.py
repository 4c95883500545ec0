"""On-policy storage against plain loops written from the papers; NAPPO's defects of the rollout as regression tests."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fnrl
from fnrl import random
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.storages.rollout import GAE, Returns, RolloutState, RolloutStorage, VTrace, _values
from fnrl.types import Moments, Normaliser, Params, Plan, Rollout, Transition, Weights

SPEC = EnvSpec("test", Box((3,)), Discrete(2))
GAMMA, LAMBDA = 0.9, 0.8


def actor_of(recurrent: bool) -> fnrl.OnPolicyActorCritic:
    small = fnrl.MLP((8,))
    return fnrl.OnPolicyActorCritic(SPEC, policy=small, value=small, recurrent=fnrl.GRU(5) if recurrent else None)


def weights_of(actor: fnrl.OnPolicyActorCritic, normaliser: object = ()) -> Weights:
    params = actor.init(random.key(1))
    noise = random.normal(random.key(2), tuple(params.vector.shape))  # heads of gain 0.01 would hide mistakes
    params = Params(params.vector + 0.3 * noise, params.layout)
    hyper = {"gamma": GAMMA, "gae_lambda": LAMBDA, "trace_lambda": LAMBDA, "rho_clip": 1.1, "c_clip": 0.8}
    return Weights(params, (), {n: torch.tensor(x) for n, x in hyper.items()}, normaliser, 0, 0)


def rollout_of(actor: fnrl.OnPolicyActorCritic, steps: int, envs: int, seed: int = 0, see=lambda x: x) -> Transition:
    """Observations run on from one step to the next, except where an episode ends; memories are what acting leaves."""
    keys = random.split(random.key(seed), 6)
    obs = random.normal(keys[0], (steps, envs, 3))
    ends = random.uniform(keys[1], (steps, envs))
    terminated, truncated = ends < 0.2, (ends > 0.1) & (ends < 0.35)  # alone, together, and neither
    done = terminated | truncated
    own = random.normal(keys[2], (steps, envs, 3))
    last = torch.ones(steps, dtype=torch.bool)
    last[:-1] = False
    next_obs = torch.where((done | last[:, None])[..., None], own, torch.roll(obs, -1, 0))
    action = random.randint(keys[3], (steps, envs), 0, 2)
    memory = random.normal(keys[5], tuple(actor.memory(envs).shape))
    memories, params = [], weights_of(actor).params
    for t in range(steps):
        memories.append(memory)
        _, _, _, memory = actor.act(params, see(obs[t]), memory, None)
        memory = torch.where(done[t][:, None], 0.0, memory)
    reward = random.normal(keys[4], (steps, envs))
    logp = -random.uniform(random.key(seed + 1), (steps, envs))
    return Transition(obs, action, logp, reward, terminated, truncated, next_obs, torch.stack(memories))


def held(steps: Transition) -> RolloutState:
    return GAE(steps=steps.reward.shape[0]).append(GAE().init(), Rollout(steps, (), 0, steps.reward.numel()))


def loop_values(actor, weights, steps: Transition) -> tuple[np.ndarray, np.ndarray]:
    """V(s) and V(true successor) one at a time, with the memory acting had."""
    count, envs = steps.reward.shape
    value, after = np.zeros((count, envs)), np.zeros((count, envs))
    see = (lambda x: x) if isinstance(weights.normaliser, tuple) else weights.normaliser
    no = torch.zeros(1, 1, dtype=torch.bool)
    for t in range(count):
        for n in range(envs):
            memory = steps.memory[t, n : n + 1]
            v, left = actor.values(weights.params, see(steps.obs[t, n])[None, None], memory, no)
            w, _ = actor.values(weights.params, see(steps.next_obs[t, n])[None, None], left[0], no)
            value[t, n], after[t, n] = float(v), float(w)
    return value, after


def loop_logp(actor, weights, steps: Transition) -> np.ndarray:
    """The log probability of each action one at a time, with the memory acting had."""
    no, found = torch.zeros(1, 1, dtype=torch.bool), np.zeros(steps.reward.shape)
    for t, n in np.ndindex(found.shape):
        one = steps.obs[t, n][None, None], steps.memory[t, n : n + 1], no, steps.action[t, n][None, None]
        found[t, n] = float(actor.evaluate(weights.params, *one)[0])
    return found


def loop_gae(steps: Transition, value: np.ndarray, after: np.ndarray) -> np.ndarray:
    """arXiv 1506.02438, backwards, one number at a time."""
    advantage = np.zeros_like(value)
    for n in range(value.shape[1]):
        carried = 0.0
        for t in reversed(range(value.shape[0])):
            terminated, truncated = bool(steps.terminated[t, n]), bool(steps.truncated[t, n])
            if terminated or truncated:
                carried = 0.0
            bootstrap = 0.0 if terminated else after[t, n]
            carried = float(steps.reward[t, n]) + GAMMA * bootstrap - value[t, n] + GAMMA * LAMBDA * carried
            advantage[t, n] = carried
    return advantage


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("recurrent", "piece"), [(False, 128), (True, 128), (False, 8), (False, 3)])
def test_prepare_is_the_paper_one_number_at_a_time(recurrent, piece, normalised, monkeypatch):
    monkeypatch.setattr("fnrl.storages.rollout._PIECE", piece)
    actor = actor_of(recurrent)
    normaliser = ()
    if normalised:
        normaliser = Normaliser(Moments.of(3.0 * random.normal(random.key(9), (50, 3)) + 1.0, 1), 10.0)
    steps = rollout_of(actor, 9, 4, see=normaliser or (lambda x: x))
    flags = steps.terminated.int() + 2 * steps.truncated.int()
    assert set(flags.flatten().tolist()) == {0, 1, 2, 3}
    weights = weights_of(actor, normaliser)
    batch = GAE(steps=9).prepare(held(steps), actor, weights)
    value, after = loop_values(actor, weights, steps)
    advantage = loop_gae(steps, value, after)

    def as_given(x: torch.Tensor) -> np.ndarray:
        assert x.shape[:2] == ((9, 4) if recurrent else (1, 36))
        return x.reshape(9, 4, *x.shape[2:]).numpy()

    np.testing.assert_allclose(as_given(batch.value), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(as_given(batch.advantage), advantage, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(as_given(batch.target), advantage + value, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(as_given(batch.action), steps.action.numpy())
    np.testing.assert_array_equal(as_given(batch.logp), steps.logp.numpy())
    seen = steps.obs if isinstance(normaliser, tuple) else normaliser(steps.obs)
    np.testing.assert_array_equal(as_given(batch.obs), seen.numpy())
    done = (steps.terminated | steps.truncated).numpy()
    np.testing.assert_array_equal(as_given(batch.starts), np.concatenate([np.zeros((1, 4), bool), done[:-1]]))
    if recurrent:
        np.testing.assert_array_equal(batch.memory.numpy(), steps.memory[0].numpy())
    else:
        assert batch.memory.shape == (36, 0)


def test_returns_bootstrap_where_time_runs_out():
    actor = actor_of(False)
    steps = rollout_of(actor, 9, 4)
    weights = weights_of(actor)
    batch = Returns(steps=9).prepare(held(steps), actor, weights)
    value, after = loop_values(actor, weights, steps)
    target = np.zeros_like(value)
    for n in range(4):
        carried = after[-1, n]
        for t in reversed(range(9)):
            if steps.truncated[t, n]:
                carried = after[t, n]
            if steps.terminated[t, n]:
                carried = 0.0
            carried = float(steps.reward[t, n]) + GAMMA * carried
            target[t, n] = carried
    np.testing.assert_allclose(batch.target.reshape(9, 4).numpy(), target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.advantage.reshape(9, 4).numpy(), target - value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recurrent", [False, True])
def test_vtrace_is_the_paper_one_number_at_a_time(recurrent):
    actor = actor_of(recurrent)
    steps, weights = rollout_of(actor, 9, 4), weights_of(actor)
    batch = VTrace(steps=9).prepare(held(steps), actor, weights)
    (value, after), logp = loop_values(actor, weights, steps), loop_logp(actor, weights, steps)
    ratio = np.exp(logp - steps.logp.numpy())
    assert (ratio > 1.1).any()
    assert (ratio < 0.8).any()
    target, advantage = np.zeros_like(value), np.zeros_like(value)
    for n in range(4):
        error = 0.0
        for t in reversed(range(9)):
            over = bool(steps.terminated[t, n] | steps.truncated[t, n]) or t == 8
            bootstrap = 0.0 if steps.terminated[t, n] else after[t, n]
            rho, c = min(1.1, ratio[t, n]), LAMBDA * min(0.8, ratio[t, n])
            reward = float(steps.reward[t, n])
            follows = bootstrap if over else LAMBDA * target[t + 1, n] + (1.0 - LAMBDA) * bootstrap
            error = rho * (reward + GAMMA * bootstrap - value[t, n]) + (0.0 if over else GAMMA * c * error)
            target[t, n], advantage[t, n] = value[t, n] + error, rho * (reward + GAMMA * follows - value[t, n])
    np.testing.assert_allclose(batch.target.reshape(9, 4).numpy(), target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.advantage.reshape(9, 4).numpy(), advantage, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.logp.reshape(9, 4).numpy(), logp, rtol=1e-4, atol=1e-5)  # a loss's ratio is 1


def test_values_of_a_large_rollout_are_computed_in_pieces(monkeypatch):
    """Of about 128 samples: whole steps where there are several, else as many as fit."""
    actor, weights = actor_of(False), weights_of(actor_of(False))
    values, sizes = fnrl.OnPolicyActorCritic.values, []

    def seen(self, params, obs, *rest):
        sizes.append(tuple(obs.shape[:2]))
        return values(self, params, obs, *rest)

    monkeypatch.setattr(fnrl.OnPolicyActorCritic, "values", seen)
    for shape, pieces in {
        (32, 4): [(32, 4)],
        (33, 4): [(32, 4), (1, 4)],
        (2, 100): [(1, 100), (1, 100)],
        (3, 200): [(1, 200)] * 3,
        (1, 300): [(1, 128), (1, 128), (1, 44)],
        (1, 128): [(1, 128)],
    }.items():
        obs, starts = random.normal(random.key(0), (*shape, 3)), torch.zeros(shape, dtype=torch.bool)
        sizes.clear()
        found, memories = _values(actor, weights.params, obs, actor.memory(shape[1]), starts)
        assert sizes == pieces
        assert memories.shape == (*shape, 0)
        torch.testing.assert_close(found, values(actor, weights.params, obs, actor.memory(shape[1]), starts)[0])
    whole = actor_of(True)
    obs, starts = random.normal(random.key(0), (40, 8, 3)), torch.zeros(40, 8, dtype=torch.bool)
    sizes.clear()
    _values(whole, weights_of(whole).params, obs, whole.memory(8), starts)
    assert sizes == [(40, 8)]  # a memory runs through


@given(valid=st.lists(st.booleans(), min_size=24, max_size=24).filter(any), seed=st.integers(0, 99))
def test_only_valid_samples_are_used_alike_and_in_the_order_they_would_have_had(valid, seed):
    plan, actor = Plan(2, 3), actor_of(False)
    mask = torch.tensor(valid).reshape(4, 6)
    rows = GAE(steps=4).order(actor, plan, 6, random.key(seed), mask).reshape(2, 24).tolist()
    without = GAE(steps=4).order(actor, plan, 6, random.key(seed)).reshape(2, 24).tolist()
    for epoch, every in zip(rows, without, strict=True):
        good = [i for i in every if valid[i]]
        assert epoch == [good[i % len(good)] for i in range(24)]


def test_batches_leave_out_what_is_not_valid():
    actor, valid = actor_of(False), torch.ones(5, 2, dtype=torch.bool)
    valid[3:] = False
    rollout = Rollout(rollout_of(actor, 5, 2), (), 0, 6, valid)
    facts = actor, weights_of(actor), Plan(1, 2), 2, random.key(0)
    _, _, rows = GAE(steps=5).batches(lambda method: method, RolloutState(rollout), *facts)
    assert set(rows.flatten().tolist()) == set(range(6))


def test_a_memory_needs_rollouts_of_one_length():
    VTrace().check_unequal(actor_of(False))
    with pytest.raises(fnrl.CompositionError, match="takes whole columns of a rollout; leave quorum out"):
        VTrace().check_unequal(actor_of(True))


@given(
    epochs=st.integers(1, 3),
    minibatches=st.sampled_from([1, 2, 3, 6]),
    recurrent=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_sample_is_used_once_an_epoch(epochs, minibatches, recurrent, seed):
    plan, total = Plan(epochs, minibatches), 6 if recurrent else 24
    rows = GAE(steps=4).order(actor_of(recurrent), plan, 6, random.key(seed))
    assert rows.shape == (epochs * minibatches, total // minibatches)
    for epoch in rows.reshape(epochs, total).tolist():
        assert sorted(epoch) == list(range(total))
    again = GAE(steps=4).order(actor_of(recurrent), plan, 6, random.key(seed))
    assert torch.equal(rows, again)


def test_orders_differ_between_epochs_and_keys():
    storage, actor = GAE(steps=16), actor_of(False)
    rows = storage.order(actor, Plan(2, 1), 4, random.key(0))
    other = storage.order(actor, Plan(2, 1), 4, random.key(1))
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows, other)


@pytest.mark.parametrize("recurrent", [False, True])
def test_take_takes_the_rows(recurrent):
    actor = actor_of(recurrent)
    storage, steps = GAE(steps=5), rollout_of(actor, 5, 4)
    data = storage.prepare(held(steps), actor, weights_of(actor))
    rows = torch.tensor([3, 1])
    batch = storage.take(data, rows)
    for name in ("obs", "action", "logp", "advantage", "target", "value", "starts"):
        assert torch.equal(getattr(batch, name), getattr(data, name)[:, rows]), name
    assert torch.equal(batch.memory, data.memory[rows])


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_taken_batch_has_ratio_one_under_the_weights_it_was_made_with(recurrent):
    actor, weights = actor_of(recurrent), weights_of(actor_of(recurrent))
    steps = rollout_of(actor, 7, 4)
    logps, memory = [], steps.memory[0]
    done = steps.terminated | steps.truncated
    for t in range(7):  # acting, step by step
        one = steps.action[t][None], torch.zeros(1, 4, dtype=torch.bool)
        logp, _, _, left = actor.evaluate(weights.params, steps.obs[t][None], memory, one[1], one[0])
        logps.append(logp[0])
        memory = torch.where(done[t][:, None], 0.0, left[0])
    steps = dataclasses.replace(steps, logp=torch.stack(logps))
    storage = GAE(steps=7)
    batch = storage.take(storage.prepare(held(steps), actor, weights), torch.tensor([2, 0]))
    logp, _, _, _ = actor.evaluate(weights.params, batch.obs, batch.memory, batch.starts, batch.action)
    torch.testing.assert_close(logp, batch.logp, rtol=1e-5, atol=1e-6)


def test_life_of_a_rollout():
    storage = GAE(steps=5)
    state = storage.init()
    assert not storage.ready(state, Plan(1, 2), 2)
    full = storage.append(state, Rollout(rollout_of(actor_of(False), 5, 2), (), 0, 10))
    assert storage.ready(full, Plan(1, 2), 2)
    assert not storage.ready(state, Plan(1, 2), 2)
    with pytest.raises(ValueError, match="already holds a rollout"):
        storage.append(full, full.rollout)
    actor = actor_of(False)
    facts = actor, weights_of(actor), Plan(1, 2), 2, random.key(0)
    after, data, rows = storage.batches(lambda method: method, full, *facts)
    assert not storage.ready(after, Plan(1, 2), 2)
    assert storage.ready(full, Plan(1, 2), 2)
    assert rows.shape == (2, 5)
    assert storage.feedback(after, data, rows[0], ()) is after
    assert storage.restore(storage.gather(full)) is full


def test_minibatches_that_do_not_divide_are_refused_with_those_that_would():
    GAE(steps=10).check(Plan(1, 5), actor_of(False), 3)
    GAE(steps=10).check(Plan(1, 3), actor_of(True), 3)
    with pytest.raises(
        fnrl.CompositionError, match=r"minibatches=4 does not divide 10 steps x 3 environments = 30 sam"
    ):
        GAE(steps=10).check(Plan(1, 4), actor_of(False), 3)
    with pytest.raises(fnrl.CompositionError, match=r"near values that do: \[2, 3, 5\]"):
        GAE(steps=10).check(Plan(1, 4), actor_of(False), 3)
    with pytest.raises(fnrl.CompositionError, match=r"near values that do: \[1, 7\]"):
        GAE(steps=7).check(Plan(1, 2), actor_of(False), 1)
    with pytest.raises(fnrl.CompositionError, match=r"4 does not divide 6 environments.*: \[2, 3, 6\]"):
        GAE(steps=10).check(Plan(1, 4), actor_of(True), 6)


def test_defaults():
    assert (GAE().steps, GAE().gae_lambda, Returns().steps) == (128, 0.95, 128)
    vtrace = VTrace()
    assert (vtrace.steps, vtrace.rho_clip, vtrace.c_clip, vtrace.trace_lambda) == (128, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="out of range"):
        VTrace(trace_lambda=1.1)
    assert (RolloutStorage.warmup, RolloutStorage.fixed, RolloutStorage.corrects) == (0, True, False)
    for bad in ({"gae_lambda": 1.1}, {"gae_lambda": -0.1}, {"steps": 0}):
        with pytest.raises(ValueError, match="out of range"):
            GAE(**bad)
    with pytest.raises(ValueError, match="out of range"):
        Returns(steps=0)
    GAE(gae_lambda=1.0, steps=1)


def test_the_bootstrap_is_at_the_end_of_the_rollout():
    """NAPPO 4.1.1: V of the last successor was written over V of the first state, and the end counted as 0.

    With reward 0, gamma = lambda = 1 and V = 7 everywhere, every target is 7 and every advantage 0.
    """
    actor = actor_of(False)
    blank = actor.init(random.key(0))
    vector = torch.zeros_like(blank.vector)
    vector[-1] = 7.0  # the bias of the value head
    hyper = {"gamma": torch.tensor(1.0), "gae_lambda": torch.tensor(1.0)}
    steps = rollout_of(actor, 6, 2)
    never = torch.zeros(6, 2, dtype=torch.bool)
    steps = dataclasses.replace(steps, reward=torch.zeros(6, 2), terminated=never, truncated=never)
    batch = GAE(steps=6).prepare(held(steps), actor, Weights(Params(vector, blank.layout), (), hyper, (), 0, 0))
    assert torch.equal(batch.target, torch.full((1, 12), 7.0))
    assert torch.equal(batch.advantage, torch.zeros(1, 12))


def test_no_observation_of_a_rollout_is_blank():
    """NAPPO 4.1.2: the first observation of every rollout was zeros. Here each continues from the one before."""
    env = fnrl.envs.CartPole(num_envs=3, time_limit=7)
    small = fnrl.MLP((8,))
    parts = fnrl.Parts(
        env, fnrl.OnPolicyActorCritic(env.spec, small, small), fnrl.PPO(minibatches=1), fnrl.GAE(steps=5)
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.key(0))
    first = state.node.child.child.env.obs
    for _ in range(3):
        state, _ = scheme.step(state)
        rows = state.node.child.batches.data.obs.reshape(5, 3, 4)
        assert torch.equal(rows[0], first)
        first = state.node.child.child.env.obs
        state, _ = scheme.step(state, updates=3)


def test_minibatches_are_as_many_as_asked():
    """NAPPO 4.1.15: ten samples in four minibatches gave five. Here four are refused, and five are five of two."""
    with pytest.raises(fnrl.CompositionError, match="does not divide"):
        GAE(steps=10).check(Plan(1, 4), actor_of(False), 1)
    rows = GAE(steps=10).order(actor_of(False), Plan(1, 5), 1, random.key(0))
    assert rows.shape == (5, 2)
