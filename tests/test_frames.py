"""Stacks of frames stored one frame a row, against the ring that stores them whole."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import SIDE, Pictures, lanes, mapped

import fnrl
from fnrl import random, tree
from fnrl.actors import OffPolicyActorCritic
from fnrl.errors import CheckpointError, CompositionError, EnvironmentFault
from fnrl.networks import MLP
from fnrl.record import replace
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.storages import Frames, Prioritised, Replay
from fnrl.types import Params, Sampling, Weights

WEIGHTS = Weights(
    Params(torch.zeros(0), ()), (), {"gamma": torch.tensor(0.9), "priority_beta": torch.tensor(0.4)}, (), 0, 0
)


def drawn(storage, state, key, envs, batch=16):
    lift = mapped if key.dim() == 2 else lambda method: method
    return storage.batches(lift, state, None, WEIGHTS, Sampling(1.0, batch), envs, key)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    frames=st.sampled_from([Frames(2), Frames(4), Frames(3, padding=0.0), Frames(4, padding=7.0)]),
    sizes=st.tuples(st.integers(3, 9), st.integers(1, 3)),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
    n_step=st.integers(1, 3),
    prioritised=st.sampled_from([None, Prioritised()]),
    count=st.sampled_from([None, 2]),
    moves=st.integers(0, 2**9 - 1),
)
def test_samples_are_those_of_the_ring_that_stores_stacks_whole(
    seed, frames, sizes, lengths, chance, n_step, prioritised, count, moves
):
    """Bit for bit, on random sequences of appends, draws, priorities, forks and restores that wrap, with lanes."""
    capacity, envs = sizes
    whole = Replay(capacity=capacity * envs, steps=1, warmup=0, n_step=n_step, prioritised=prioritised)
    thin = dataclasses.replace(whole, frames=frames)
    worlds = [Pictures(seed + i, frames, envs, chance) for i in range(count or 1)]
    a, b = whole.init(), thin.init()
    for k, length in enumerate(lengths):
        rollouts = [w.rollout(length) for w in worlds]
        rollout = lanes(rollouts) if count else rollouts[0]
        if moves >> k & 1:
            b = thin.restore(thin.gather(b))
        a, b = whole.append(a, rollout), thin.append(b, rollout)
        keys = torch.stack([random.key(97 * k + i) for i in range(count or 1)])
        a, left, rows = drawn(whole, a, keys if count else keys[0], envs)
        b, right, _ = drawn(thin, b, keys if count else keys[0], envs)
        if prioritised is None:  # the places differ, for the rings have other lengths
            assert tree.different_bits(left.batch, right.batch) == []
            assert right.batch.obs.dtype == torch.uint8
        else:
            check_priorities(a.token.owner, b.token.owner)
            error = torch.rand(rows.select(-2, 0).shape, generator=torch.Generator().manual_seed(k))
            a, b = whole.feedback(a, left, rows.select(-2, 0), error), feed(thin, b, a, left, rows, error)
            check_priorities(a.token.owner, b.token.owner)
            one, two = (everything(s, x) for s, x in ((whole, a), (thin, b)))
            assert tree.different_bits(one, two) == []


def everything(storage, state):
    """All transitions, the oldest first, of every lane."""
    ring = state.token.take()
    places = torch.from_numpy(window(ring))
    rows = ring.rows if ring.axis else tree.map(lambda x: x[None], ring.rows)
    ones = torch.ones(len(places))
    return [storage.sample(tree.index(rows, i), WEIGHTS, places, ones, ring.where) for i in range(len(rows.reward))]


def window(ring):
    n = ring.rows.reward.shape[-1]
    return (((ring.start + np.arange(ring.size)) % ring.whole)[:, None] * n + np.arange(n)).flatten()


def check_priorities(a, b):
    """Equal by age, and nothing elsewhere: frames before the oldest row can't be drawn."""
    x, y = (r.rows.priority[..., window(r)] for r in (a, b))
    assert torch.equal(x, y)
    assert bool((y > 0.0).all())
    rest = np.setdiff1d(np.arange(b.rows.priority.shape[-1]), window(b))
    assert not bool(b.rows.priority[..., rest].any())


def feed(thin, state, other, data, rows, error):
    """The errors of samples of the whole ring, given to the thin one at the places of the same age."""
    a, b = other.token.owner, state.token.take()
    index = torch.zeros(a.rows.priority.shape[-1], dtype=torch.int64)
    index[window(a)] = torch.from_numpy(window(b))
    return thin.feedback(state, dataclasses.replace(data, index=index[data.index]), rows.select(-2, 0), error)


@pytest.mark.parametrize("frames", [None, Frames(3), Frames(3, padding=0.0)])
@pytest.mark.parametrize("count", [None, 2])
def test_an_episode_that_a_restore_began_anew_ends_the_one_before(frames, count):
    """As if it had been truncated where the run was saved: what simulators are not brought back to (exact=False)."""
    envs = 3
    storage = Replay(capacity=12 * envs, steps=2, warmup=0, n_step=3, frames=frames)
    worlds = [Pictures(i, frames or Frames(3), envs, 0.3) for i in range(count or 1)]

    def rollout():
        made = [w.rollout(2) for w in worlds]
        return lanes(made) if count else made[0]

    before = [rollout() for _ in range(8)]  # the ring wraps
    axis, steps = 1 if count else 0, before[-1].steps
    anew = torch.zeros_like(steps.truncated)
    anew.select(axis, 1)[..., 1:] = True
    cut = replace(steps, truncated=steps.truncated | (anew & ~steps.terminated))
    assert bool((cut.truncated != steps.truncated).any())
    for world in worlds:
        world.obs[1:] = [world.first(), world.first()]
    after = [rollout() for _ in range(2)]

    saved, told = storage.init(), storage.init()
    for x in before[:-1]:
        saved, told = storage.append(saved, x), storage.append(told, x)
    told = storage.append(told, replace(before[-1], steps=cut))
    saved = storage.restore(storage.gather(storage.append(saved, before[-1])))
    for state in (saved, told):
        state.token.owner.mark_episodes()
    for x in after:
        saved, told = storage.append(saved, x), storage.append(told, x)
    assert tree.different_bits(everything(storage, saved), everything(storage, told)) == []
    assert tree.different_bits(saved.token.owner.spans, told.token.owner.spans) == []


def test_one_frame_a_row_is_stored():
    frames, envs = Frames(4), 2
    storage = Replay(capacity=100, warmup=0, frames=frames)
    state = storage.append(storage.init(), Pictures(0, frames, envs, 0.1).rollout(3))
    rows = state.token.take().rows
    assert rows.obs.shape == (50 + 4, envs, SIDE, SIDE)
    assert rows.finals.shape[1:] == (SIDE, SIDE)
    assert rows.obs.dtype == rows.finals.dtype == torch.uint8
    assert storage.gather(state).ring.rows.obs.shape[0] == 3 + 4


def stacked(env):
    return FrameStackObservation(env, 3)


def stacked_on_zeros(env):
    return FrameStackObservation(env, 3, padding_type="zero")


@pytest.mark.parametrize(("wrapper", "frames"), [(stacked, Frames(3)), (stacked_on_zeros, Frames(3, padding=0.0))])
def test_the_stacks_of_gymnasium_are_those(wrapper, frames):
    env = fnrl.envs.gym("Pendulum-v1", num_envs=2, wrappers=(wrapper,), max_episode_steps=7)
    actor = OffPolicyActorCritic(env.spec, MLP((4,)), MLP((4,)))
    assert env.spec.obs.shape == (3, 3)
    runs = []
    for given_ in (frames, None):
        storage = fnrl.Replay(capacity=24, steps=2, warmup=4, frames=given_, n_step=2)
        parts = fnrl.Parts(env, actor, fnrl.SAC(batch=4, ratio=0.25), storage)
        scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
        state, _ = scheme.step(scheme.init(fnrl.key(0)), 15)
        assert state.env_steps > 2 * 24
        runs.append(state.weights)
        scheme.close(state)
    assert tree.same_bits(*runs)
    other = dataclasses.replace(parts, storage=dataclasses.replace(storage, frames=Frames(3, padding=0.5)))
    scheme = fnrl.Scheme(other, scheme.topology)
    with pytest.raises(EnvironmentFault, match=r"Replay\(frames=Frames\(count=3, padding=0.5\)\).*the same padding"):
        scheme.step(scheme.init(fnrl.key(0)), 15)


@pytest.mark.parametrize("lane", [False, True])
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("field", ["obs", "next_obs"])
def test_what_is_not_a_stack_is_found_where_it_comes_and_nothing_is_taken_in(field, when, lane):
    frames = Frames(3)
    storage, world = Replay(capacity=40, warmup=0, frames=frames), Pictures(0, frames, 2, 0.2)
    state = storage.init()
    for _ in range(when):
        state = storage.append(state, lanes([world.rollout(2)] * 2) if lane else world.rollout(2))
    rollout = world.rollout(3)
    wrong = getattr(rollout.steps, field).clone()
    wrong[-1 if when == 0 else 0, 1, 0, 0, 0] ^= 1
    bad = dataclasses.replace(rollout, steps=dataclasses.replace(rollout.steps, **{field: wrong}))
    before = storage.gather(state)
    given_ = lanes([rollout, bad]) if lane else bad
    with pytest.raises(EnvironmentFault, match=r"of environment 1 is not a stack of frames .*or pass frames=None"):
        storage.append(state, given_)
    assert tree.same_bits(storage.gather(state), before)
    storage.append(state, lanes([rollout] * 2) if lane else rollout)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(4),
        Box((3,)),
        Box((84, 84, 4), 0, 255, "uint8"),
        fnrl.envs.gym("CartPole-v1").spec.obs,  # four numbers, but of bounds of their own
    ],
)
def test_a_space_that_can_not_be_a_stack_is_refused(space):
    actor = OffPolicyActorCritic(EnvSpec("made up", space, Discrete(2)), None, MLP((4,)))
    with pytest.raises(CompositionError, match=r"first axis is 4 frames of equal bounds, .*FrameStackObservation"):
        Replay(frames=Frames(4)).check(Sampling(1.0, 4), actor, 2)


@pytest.mark.parametrize("padding", [-1.0, 256.0, 0.5])
def test_a_padding_that_is_not_in_the_space_is_refused(padding):
    with pytest.raises(CompositionError, match=f"can't be filled with {padding}"):
        Frames(4, padding).check(Box((4, 8, 8), 0, 255, "uint8"))


def test_a_ring_of_other_frames_is_refused():
    frames = Frames(4)
    thin, whole = Replay(capacity=40, frames=frames), Replay(capacity=40)
    rollout = Pictures(0, frames, 2, 0.2).rollout(20)
    records = {s: s.gather(s.append(s.init(), rollout)) for s in (thin, whole)}
    with pytest.raises(CheckpointError, match=r"is not that of Replay\(capacity=40\)"):
        whole.restore(records[thin])
    with pytest.raises(CheckpointError, match=r"is not that of Replay\(capacity=40, frames=Frames\(count=4"):
        thin.restore(records[whole])


def test_gymnasium_stacks_have_the_space_that_is_asked_for():
    env = FrameStackObservation(gymnasium.make("CartPole-v1"), 4)
    shape, low = env.observation_space.shape, env.observation_space.low
    Frames(4).check(Box(shape, tuple(low.ravel().tolist()), dtype="float32"))


class Sick(gymnasium.Env):
    """Episodes of nine steps; in a few a reward is NaN."""

    observation_space, action_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sick = 0, self.np_random.random() < 0.04
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        seen = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return seen, np.nan if self.sick and self.t == 5 else 1.0, False, self.t >= 9, {}


def in_stacks(env):
    return gymnasium.wrappers.FrameStackObservation(env, 3)


@pytest.mark.parametrize("collectors", [1, 2])
def test_a_lane_that_dies_leaves_the_stacks_of_the_others(collectors):
    env = fnrl.envs.gym(Sick, wrappers=[in_stacks])
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((4,)), critics=1, explore=fnrl.EpsilonGreedy())
    replay = fnrl.Replay(capacity=100, steps=2, warmup=8, frames=fnrl.Frames(3))
    parts = fnrl.Parts(env, actor, fnrl.DQN(batch=8, ratio=0.5), replay)
    node = fnrl.collect if collectors == 1 else fnrl.synchronous(fnrl.collect, 2)
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(node)))
    with pytest.warns(fnrl.DeadLaneWarning, match="reward is not finite"):
        state, _ = scheme.step(scheme.init(fnrl.seeds(4)), [60, 20][collectors - 1])
    assert 0 < int(state.node.algo.dead.sum()) < 4
    again, _ = scheme.step(scheme.fork(state), 3)
    assert scheme.same(again, scheme.step(state, 3)[0])


def test_a_stack_of_frames_is_seen_by_a_cnn():
    spec = EnvSpec("x", Box((4, 84, 84), 0.0, 255.0, "uint8"), Discrete(2))
    with pytest.raises(fnrl.CompositionError, match=r"read as \[H, W, C\], is too small.*CNN\(channels_first=True\)"):
        fnrl.OffPolicyActorCritic(spec, None, fnrl.CNN(), critics=1)
    first = fnrl.CNN(channels_first=True)
    actor = fnrl.OffPolicyActorCritic(spec, None, first, critics=1)
    last = fnrl.OffPolicyActorCritic(
        EnvSpec("x", Box((84, 84, 4), 0.0, 255.0, "uint8"), Discrete(2)), None, fnrl.CNN(), critics=1
    )
    params, seen = actor.init(fnrl.key(0)), torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    assert params["critic0.0.weight"].shape == (32, 4, 8, 8)
    want = last.q(params, last.features(params, seen.movedim(1, -1)))
    torch.testing.assert_close(actor.q(params, actor.features(params, seen)), want)
