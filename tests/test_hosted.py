"""Hosted simulators against plain gymnasium loops: seeds, true successors, lanes, processes, restoring by replay."""

import pickle
import sys

import numpy as np
import pytest
import torch
from hosted_cases import (
    MODES,
    Count,
    Dicts,
    Double,
    Hidden,
    Mortal,
    Numbers,
    Odd,
    Pixels,
    Resets,
    Unseeded,
    Walk,
    draw_actions,
    key_of,
    limited,
    nothing,
    run,
    same_as_plain_loop,
    seed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrl import random, tree
from fnrl.envs import GymVector, gym
from fnrl.errors import CheckpointError, CompositionError, EnvironmentFault

CHEETAH = "HalfCheetahBulletEnv-v0"

# -- the component --------------------------------------------------------------------------------------------------


def test_it_is_a_value_and_probes_once():
    Walk.opened = Walk.closed = 0
    env = gym(Walk, 3, limit=9, hazard=0.5)
    assert (Walk.opened, Walk.closed) == (1, 1)
    copy = pickle.loads(pickle.dumps(env))
    assert copy == env
    assert hash(copy) == hash(env)
    assert env != gym(Walk, 3, limit=8, hazard=0.5)
    assert gym(Walk, hazard=0.5, limit=9).kwargs == (("hazard", 0.5), ("limit", 9))
    assert copy.spec.name == "Walk"
    assert (copy.pure, copy.noise(random.key(0), 5)) == (False, ())
    assert Walk.opened == 3  # one for each call of gym


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPool-v1", "did you mean .*CartPole-v1"),
        ("HalfCheetahBulletEnv-v9", "did you mean .*HalfCheetahBulletEnv-v0"),
        ("qqqqqq", "no registered name is near it"),
        (lambda: Walk(), "module-level function"),
        (Dicts, "the observation of Dicts is a Dict space"),
        (nothing, "nothing made a builtins.object, expected a gymnasium.Env"),
    ],
)
def test_refuses_what_can_not_be_hosted(env, message):
    if "Bullet" in str(env):
        pytest.importorskip("pybullet_envs_gymnasium")
    with pytest.raises(CompositionError, match=message):
        gym(env)


def test_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet_envs_gymnasium", None)
    with pytest.raises(CompositionError, match=r'pip install "fnrl\[pybullet\]"'):
        gym("NoSuchBulletEnv-v0")


def test_refuses_arguments_that_are_no_values():
    with pytest.raises(CompositionError, match=r"limit = .* must be hashable"):
        gym(Walk, limit=[1])
    with pytest.raises(CompositionError, match="wrapper"):
        gym(Walk, wrappers=[lambda env: env])
    with pytest.raises(ValueError, match=r"GymVector.num_envs = 0"):
        gym(Walk, 0)
    with pytest.raises(EnvironmentFault, match=r"Walk can't be opened.*limits") as e:
        gym(Walk, limits=3)
    assert isinstance(e.value.__cause__, TypeError)


def test_an_environment_must_obey_its_seed():
    for after, where in ((0, "the reset"), (3, "step 3")):
        with pytest.raises(EnvironmentFault, match=rf"Unseeded ignores its seed.*differ at {where}, .*exact=False"):
            gym(Unseeded, after=after)
        assert gym(Unseeded, after=after, exact=False).spec.name == "Unseeded"
    with pytest.raises(EnvironmentFault, match=r"Hidden .*hides state past a reset.*differ at step 6"):
        gym(Hidden, after=5)


# -- stepping -------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("name", ["CartPole-v1", "Walk", "Pendulum-v1"])
def test_equals_plain_loops(name, processes):
    source = Walk if name == "Walk" else name
    kwargs = {"max_episode_steps": 13} if name == "Pendulum-v1" else {}
    for n in (1, 3):
        assert same_as_plain_loop(gym(source, n, processes=processes, **kwargs), 60) >= 2


def test_bullet_equals_plain_loops():
    pytest.importorskip("pybullet_envs_gymnasium")
    assert same_as_plain_loop(gym(CHEETAH, 2, max_episode_steps=4), 14) == 6


def test_true_successor_where_a_time_limit_cuts():
    env = gym(Count, 2, limit=4)
    seen, last = run(env, env.init(key_of(0)), torch.full((8, 2), 3))
    for t, (before, step) in enumerate(seen):
        assert before[:, 2].tolist() == [t % 4] * 2
        assert step.next_obs[:, 2].tolist() == [t % 4 + 1] * 2  # 4 at the cut, never the 0 of the new episode
        assert step.truncated.tolist() == [t % 4 == 3] * 2
        assert not step.terminated.any()
        assert torch.equal(step.next_obs[:, :2], before[:, :2])
    assert last.obs[:, 2].tolist() == [0, 0]


def test_one_dimensional_action_spaces():
    for n in (1, 3):
        env = gym("Pendulum-v1", n)
        state, step = env.step(env.init(key_of(0)), torch.zeros(n, 1))
        assert step.next_obs.shape == state.obs.shape == (n, 3)
        assert step.reward.shape == (n,)
        assert step.reward.dtype == torch.float32
        with pytest.raises(ValueError, match=rf"takes actions \[{n}, 1\], got \[{n}\]"):
            env.step(state, torch.zeros(n))
        env.step(state, torch.zeros(n, 1))  # the refusal cost nothing


def seeds_in(obs: torch.Tensor) -> list[int]:
    return (obs[..., 0].long() * 65536 + obs[..., 1].long()).flatten().tolist()


def test_every_episode_of_every_environment_of_every_lane_has_its_own_seed():
    env = gym(Resets, 3, limit=1)
    keys = torch.stack([key_of(0), key_of(1)])
    state, found = env.init(keys), []
    assert state.obs[..., 3].eq(1).all()  # what is seen began with the second reset: the first episode was discarded
    for _ in range(130):
        found.append(seeds_in(state.obs))
        state, _ = env.step(state, torch.full((2, 3), 3))
    for column, (lane, i) in enumerate((s, i) for s in range(2) for i in range(3)):
        own = random.fold_in(keys[lane], i)
        assert [row[column] for row in found] == [random.seed_of(random.fold_in(own, e)) for e in range(1, 131)]
    assert len({s for row in found for s in row}) == 130 * 6


@MODES
def test_lanes_equal_solo_runs(processes):
    env = gym(Walk, 2, processes=processes)
    keys, actions = torch.stack([key_of(i) for i in range(3)]), draw_actions(env, 25, lanes=3)
    together, last = run(env, env.init(keys), actions)
    assert last.obs.shape == (3, 2, 3)
    pure = env.gather(last)
    env.close(last)
    for lane in range(3):
        alone, end = run(env, env.init(keys[lane]), actions[:, lane])
        assert tree.same_bits(alone, tree.index(together, lane))
        own, width = env.gather(end), int(pure.lengths[lane].max())
        assert tree.same_bits(own.actions, pure.actions[lane, :, :width])
        assert tree.same_bits(
            [own.keys, own.episodes, own.lengths], [x[lane] for x in (pure.keys, pure.episodes, pure.lengths)]
        )
        env.close(end)


@MODES
def test_spaces(processes):
    double = gym(Double, 2, processes=processes)
    obs = double.init(key_of(0)).obs
    assert (obs.dtype, obs.shape) == (torch.float32, (2, 4))
    assert obs[0, 3] == np.float32(1 / 3)
    pixels = gym(Pixels, 2, processes=processes)
    state, step = pixels.step(pixels.init(key_of(0)), torch.tensor([3, 4]))
    assert (state.obs.dtype, state.obs.shape) == (torch.uint8, (2, 2, 3))
    assert step.reward.tolist() == [3, 4]  # actions of a Discrete space come with its start
    numbers = gym(Numbers, 2, processes=processes, limit=3)
    seen, _ = run(numbers, numbers.init(key_of(0)), torch.full((3, 2), 3))
    assert [s.next_obs.tolist() for _, s in seen] == [[1, 1], [2, 2], [3, 3]]  # counted from 0
    assert seen[0][0].dtype == torch.int64
    with pytest.raises(EnvironmentFault, match=r"step 4: the observation is .*2.*declares the integers -2 to 1"):
        gym(Numbers, limit=4)


def test_wrappers_and_kwargs():
    env = gym(Count, wrappers=(limited,), limit=50)
    seen, _ = run(env, env.init(key_of(0)), torch.full((7, 1), 3))
    assert [bool(s.truncated) for _, s in seen] == [False, False, True] * 2 + [False]


@pytest.mark.parametrize("kind", ["one", "int", "numpy"])
def test_rewards_are_numbers_of_any_kind(kind):
    env = gym(Odd, 2, how=kind)
    _, step = env.step(env.init(key_of(0)), torch.full((2,), 3))
    assert (step.reward.dtype, step.reward.tolist()) == (torch.float32, [2.0, 2.0])


def test_actions_are_copied_and_cast():
    env, actions = gym(Walk, 2), draw_actions(gym(Walk, 2), 3).double()
    first = env.init(key_of(0))
    seen, last = run(env, first, actions.float())
    again, state = run(env, env.init(key_of(0)), actions)  # Walk asserts that it gets float32
    assert tree.same_bits(again, seen)
    for action in actions.float():
        first, _ = env.step(env.init(key_of(0)), action)
        kept = action.clone()
        pure = env.gather(first)
        action.zero_()
        assert tree.same_bits(env.gather(first).actions[:, 0], kept)
        assert tree.same_bits(pure.actions[:, 0], kept)
    assert tree.same_bits(env.restore(env.gather(state)).obs, last.obs)


# -- replay ---------------------------------------------------------------------------------------------------------


def restores(env: GymVector, steps: int, more: int, lanes: int | None = None, other: GymVector | None = None) -> None:
    key = key_of(0) if lanes is None else torch.stack([key_of(i) for i in range(lanes)])
    actions = draw_actions(env, steps + more, lanes)
    _, state = run(env, env.init(key), actions[:steps])
    pure, other = env.gather(state), other or env
    assert tree.same_bits(pickle.loads(pickle.dumps(pure)), pure)  # tensors only
    back = other.restore(pure)
    assert tree.same_bits(back.obs, state.obs)
    assert tree.same_bits(other.gather(back), pure)
    on, end = run(env, state, actions[steps:])
    again, ending = run(other, back, actions[steps:])
    assert tree.same_bits(again, on)
    assert tree.same_bits(other.gather(ending), env.gather(end))
    env.close(end)
    other.close(ending)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 12), st.sampled_from([None, 1, 2]))
def test_restores_by_replay(steps, more, lanes):
    restores(gym(Walk, 3), steps, more, lanes)
    restores(gym("CartPole-v1", 2), steps, more, lanes)


def test_restores_across_processes():
    inside, outside = gym(Walk, 2), gym(Walk, 2, processes=True)
    restores(inside, 17, 9, other=outside)
    restores(outside, 23, 9, lanes=2, other=inside)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 40))
def test_restores_bullet_at_any_point(steps):
    pytest.importorskip("pybullet_envs_gymnasium")
    restores(gym(CHEETAH, 2, max_episode_steps=6), steps, 8)


@pytest.mark.parametrize("name", [CHEETAH, "AntBulletEnv-v0"])
def test_restores_bullet_in_its_seventh_episode(name):
    pytest.importorskip("pybullet_envs_gymnasium")
    env = gym(name, 2, max_episode_steps=6)
    _, state = run(env, env.init(key_of(0)), draw_actions(env, 40))
    assert min(env.gather(state).episodes) >= 7
    assert min(env.gather(state).lengths) > 0
    env.close(state)
    restores(env, 40, 10)


def test_hidden_state_is_found_by_replay():
    env = gym(Hidden, 2)
    _, state = run(env, env.init(key_of(0)), torch.full((53, 2), 3))
    pure = env.gather(state)
    with pytest.raises(EnvironmentFault, match=r"hides state past a reset.*environment 0, episode 2.*exact=False"):
        env.restore(pure)
    loose = gym(Hidden, 2, exact=False)
    with pytest.warns(RuntimeWarning, match="episode was restarted") as caught:
        back = loose.restore(pure)
    assert len(caught) == 1
    after = loose.gather(back)
    assert (after.episodes.tolist(), after.lengths.tolist()) == ([3, 3], [0, 0])
    assert seeds_in(back.obs) == [seed(key_of(0), i, 3) for i in range(2)]


@pytest.mark.parametrize("name", ["PusherBulletEnv-v0", "HumanoidFlagrunHarderBulletEnv-v0", "ThrowerBulletEnv-v0"])
def test_simulators_known_to_hide_state_are_taken_only_as_inexact(name):
    pytest.importorskip("pybullet_envs_gymnasium")
    with pytest.raises(EnvironmentFault, match=rf"{name} is known to hide state.*exact=False.*--no-env.exact"):
        gym(name)
    if name.startswith("Pusher"):
        assert gym(name, exact=False).spec.name == name


def test_a_replay_stops_where_its_episode_ends_early():
    env = gym(Mortal)
    _, state = run(env, env.init(key_of(0)), torch.full((25 + 27, 1), 3))
    with pytest.raises(EnvironmentFault, match=r"hides state past a reset.*episode 2"):
        env.restore(env.gather(state))


def test_only_the_episode_that_was_lost_is_restarted():
    env = gym(Hidden, 2, exact=False)
    _, state = run(env, env.init(key_of(0)), torch.full((53, 2), 3))
    pure = env.gather(state)
    pure.obs[0, 3] = env.restore(env.gather(env.init(key_of(0)))).obs[0, 3] + 23  # what a replay of environment 0 shows
    with pytest.warns(RuntimeWarning, match="environment 1"):
        back = env.restore(pure)
    after = env.gather(back)
    assert (after.episodes.tolist(), after.lengths.tolist()) == ([2, 3], [23, 0])
    assert tree.same_bits(back.obs[0], pure.obs[0])
    seen, _ = run(env, back, torch.full((8, 2), 3))
    assert [s.truncated.tolist() for _, s in seen] == [[False, False]] * 6 + [[True, False], [False, False]]


def test_refuses_the_record_of_another_vector():
    env = gym(Walk, 2)
    pure = env.gather(env.init(key_of(0)))
    for other in (gym(Walk, 3), gym(Count, 2), gym("Pendulum-v1", 2)):
        with pytest.raises(CheckpointError, match="can't be restored from"):
            other.restore(pure)
