"""Hindsight against loops over what happened: which goals it gives, what they earn, and how often."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_replay import ACTOR, ENVS, GAMMA, World, weights

import fnrl
from fnrl import random, tree
from fnrl.envs import BitFlipping, gym
from fnrl.envs.base import EnvState, PureEnvironment
from fnrl.errors import CompositionError, EnvironmentFault, NonFiniteError
from fnrl.spaces import Box, Discrete, EnvSpec, Goal
from fnrl.storages import EpisodeGoals, FinalGoals, FutureGoals, Hindsight, Prioritised, Replay
from fnrl.testing import LawError, check_environment
from fnrl.testing.environment import GOALS
from fnrl.types import Rollout, Sampling

ALWAYS = 1e9  # goals for each sample that keeps its own: none keeps it
STRATEGIES = (FutureGoals(), FinalGoals(), EpisodeGoals())
GOAL_SPEC = EnvSpec("goals made up", Box((2,)), Box((1,), -1.0, 1.0), Goal(0, 1))
GOAL_ACTOR = fnrl.OffPolicyActorCritic(GOAL_SPEC, fnrl.MLP((4,)), fnrl.MLP((4,)))


class Judged(PureEnvironment):
    """Goals that are numbers; what they earn is easily told from anything else."""

    spec, num_envs = GOAL_SPEC, ENVS

    def judge(self, achieved, desired):
        return (10.0 * achieved - desired)[..., 0], ((3 * achieved + desired) % 5 == 0.0)[..., 0]


class GoalWorld(World):
    """Observations `[achieved, desired]`; what is achieved is different every time, and so is each episode's goal."""

    def __init__(self, seed, chance=0.3):
        super().__init__(seed, chance)
        self.episode, self.episodes = [0] * ENVS, []  # rows of the episode's number

    def rollout(self, steps):
        made = super().rollout(steps).steps
        numbers = []
        for row in self.happened[-steps:]:
            numbers.append(list(self.episode))
            self.episode = [e + bool(row[i][4] or row[i][5]) for i, e in enumerate(self.episode)]
        self.episodes += numbers
        desired = -1.0 - torch.tensor(numbers, dtype=torch.float32)[..., None]
        fields = {n: getattr(made, n) for n in made.__fields__.data}
        for n in ("obs", "next_obs"):
            fields[n] = torch.cat([fields[n], desired], -1)
        return Rollout(type(made)(**fields), (), 0, steps * ENVS)

    def at(self, achieved):
        """Row and environment of the step that was taken where `achieved` had been."""
        return next((r, i) for r, row in enumerate(self.happened) for i in range(ENVS) if row[i][0] == achieved)


def drawn(storage, state, key, plan, **hyper):
    given_ = ACTOR, weights(**hyper), plan, ENVS, key, Judged()
    return storage.batches(lambda method: method, state, *given_)


def filled(storage, world, rollouts):
    state = storage.init()
    for length in rollouts:
        state = storage.append(state, world.rollout(length))
    return state


def under(world, r, i, goal, n_step):
    """The return of step r of environment i under a goal, its successor, and what that counts for, by a plain loop."""
    total, discount, k = 0.0, 1.0, 0
    while True:
        following, done = world.happened[r + k][i][3], any(world.happened[r + k][i][4:])
        total += discount * (10.0 * following - goal)
        discount *= GAMMA
        k += 1
        reached = (3 * following + goal) % 5 == 0.0
        if reached or done or k == n_step or r + k == len(world.happened):
            return total, following, 0.0 if reached else discount


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    capacity=st.integers(3, 9),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    n_step=st.integers(1, 4),
    strategy=st.sampled_from(STRATEGIES),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
    moves=st.integers(0, 2**12 - 1),
)
def test_goals_are_of_the_same_episode_and_earn_what_a_loop_says(
    seed, capacity, lengths, n_step, strategy, chance, moves
):
    """At or after the step (but for EpisodeGoals), across the ring's turn, forks and restores."""
    storage = Replay(
        capacity=capacity * ENVS, warmup=0, n_step=n_step, hindsight=Hindsight(goals=ALWAYS, strategy=strategy)
    )
    world, state = GoalWorld(seed, chance), storage.init()
    for k, length in enumerate(lengths):
        state = storage.append(state, world.rollout(length))
        if moves >> k & 1:
            state = storage.restore(storage.gather(state))
    oldest = max(0, len(world.happened) - capacity)
    _, data, _ = drawn(storage, state, random.key(seed), Sampling(4.0 / state.collected, 8))
    assert len(data.batch.reward) == 32
    for (achieved, goal), action, reward, (following, same), discount in zip(
        *(x.tolist() for x in (data.batch.obs, data.batch.action, data.batch.reward, data.batch.next_obs)),
        data.batch.discount.tolist(),
        strict=True,
    ):
        r, i = world.at(achieved)
        assert r >= oldest
        assert same == goal
        assert action == [np.float32(world.happened[r][i][1])]
        episode = [t for t in range(oldest, len(world.happened)) if world.episodes[t][i] == world.episodes[r][i]]
        offered = episode if strategy == EpisodeGoals() else [t for t in episode if t >= r]
        offered = offered[-1:] if strategy == FinalGoals() else offered
        assert goal in [world.happened[t][i][3] for t in offered]
        np.testing.assert_allclose((reward, following, discount), under(world, r, i, goal, n_step), rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_follow_their_distributions(strategy):
    storage = Replay(capacity=60, warmup=0, hindsight=Hindsight(goals=4.0, strategy=strategy))
    world = GoalWorld(0, chance=0.0)
    state = filled(storage, world, [3])
    world.chance = 1.0  # one step, and the episode is over
    state = storage.append(state, world.rollout(1))
    world.chance = 0.0
    state = storage.append(state, world.rollout(3))
    _, data, _ = drawn(storage, state, random.key(1), Sampling(110.0, 20))
    picked = data.batch.obs[data.batch.obs[:, 0] == world.happened[1][0][0]][:, 1].numpy()
    kept = int((picked < 0.0).sum())
    assert stats.binomtest(kept, len(picked), 0.2).pvalue > 1e-3
    reached = {row[0][3]: int((picked == row[0][3]).sum()) for row in world.happened}
    assert sum(reached.values()) == len(picked) - kept
    offered = {FutureGoals(): (1, 2, 3), FinalGoals(): (3,), EpisodeGoals(): (0, 1, 2, 3)}[strategy]
    counts = [reached.pop(world.happened[t][0][3]) for t in offered]
    assert not any(reached.values())
    assert len(picked) > 2000
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("prioritised", [None, Prioritised()])
@pytest.mark.parametrize("n_step", [1, 3])
def test_a_share_of_none_is_the_plain_ring(n_step, prioritised):
    plain = Replay(capacity=20, steps=5, warmup=0, n_step=n_step, prioritised=prioritised)
    none = Replay(**{**vars(plain), "hindsight": Hindsight(goals=0.0)})
    found = []
    for storage in (plain, none):
        state = filled(storage, GoalWorld(3), [5, 5, 5])
        state, data, rows = drawn(storage, state, random.key(0), Sampling(2.0, 8))
        state = storage.feedback(state, data, rows[0], data.batch.reward[rows[0]].abs())
        found.append((data, rows, storage.gather(state)))
    assert tree.same_bits(*found)
    some = Replay(**{**vars(plain), "hindsight": Hindsight()})
    _, data, _ = drawn(some, filled(some, GoalWorld(3), [5, 5, 5]), random.key(0), Sampling(2.0, 8))
    assert torch.equal(data.index, found[0][0].index)  # other goals, at the same places
    assert not torch.equal(data.batch.obs, found[0][0].batch.obs)


def test_which_samples_get_another_goal_has_nothing_to_do_with_where_they_lie():
    storage = Replay(capacity=40, warmup=0, prioritised=Prioritised(alpha=0.0), hindsight=Hindsight(goals=1.0))
    state = filled(storage, GoalWorld(0, chance=0.0), [4])
    _, data, _ = drawn(storage, state, random.key(0), Sampling(250.0, 1))
    table = np.zeros((2, 8), int)
    np.add.at(table, ((data.batch.obs[:, 1] > 0).long().numpy(), data.index.numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_samples_are_a_function_of_the_key():
    storage = Replay(capacity=40, warmup=0, hindsight=Hindsight())
    state = filled(storage, GoalWorld(1), [9, 9, 9])
    one, again, other = (drawn(storage, state, random.key(k), Sampling(2.0, 8))[1] for k in (0, 0, 1))
    assert tree.same_bits(one, again)
    assert not torch.equal(one.batch.obs, other.batch.obs)


def test_a_goal_that_says_nothing_of_termination_leaves_it_as_it_was(monkeypatch):
    judge = Judged.judge
    monkeypatch.setattr(Judged, "judge", lambda self, a, d: (judge(self, a, d)[0], ()))
    storage = Replay(capacity=200, warmup=0, hindsight=Hindsight(goals=ALWAYS))
    world = GoalWorld(2)
    _, data, _ = drawn(storage, filled(storage, world, [40]), random.key(0), Sampling(2.0, 8))
    ends = [world.happened[r][i][4] for r, i in map(world.at, data.batch.obs[:, 0].tolist())]
    assert any(ends)
    assert torch.equal(data.batch.discount == 0.0, torch.tensor(ends))


@pytest.mark.parametrize("prioritised", [None, Prioritised()])
def test_lanes_are_rings(prioritised):
    storage = Replay(capacity=14, steps=3, warmup=0, n_step=2, prioritised=prioritised, hindsight=Hindsight())
    worlds = [GoalWorld(s, chance=0.6) for s in range(3)]
    lanes, apart = storage.init(), [storage.init() for _ in worlds]
    run = fnrl.lift.Run((), None, lanes=3)
    held = tree.stack([weights()] * 3)
    for k in range(4):
        rollouts = [w.rollout(3) for w in worlds]
        lanes = storage.append(lanes, Rollout(tree.stack([r.steps for r in rollouts]), (), 0, 6))
        apart = [storage.append(s, r) for s, r in zip(apart, rollouts, strict=True)]
        keys = torch.stack([random.key(10 * k + i) for i in range(3)])
        given_ = ACTOR, held, Sampling(1.0, 5), ENVS, keys, Judged()
        lanes, data, _ = storage.batches(run.lift, lanes, *given_)
        for i in range(3):
            apart[i], one, _ = drawn(storage, apart[i], random.key(10 * k + i), Sampling(1.0, 5))
            assert tree.same_bits(tree.index(data, i), one)
        lanes = storage.restore(storage.gather(lanes))


# -- what NAPPO's hindsight buffer did --------------------------------------------------------------------------------


def test_defects_of_the_predecessor_stay_away():
    """It relabelled the last transition once for every step of the episode, took the observation after the reset for
    the goal, counted its whole array of zeros as stored, and turned at the wrong place.
    """
    storage = Replay(capacity=12, warmup=0, hindsight=Hindsight(goals=ALWAYS, strategy=FinalGoals()))
    world = GoalWorld(0, chance=0.0)
    state = filled(storage, world, [2])
    world.chance = 1.0
    state = storage.append(state, world.rollout(1))  # both episodes end: rows 0, 1, 2
    last = [world.happened[2][i][3] for i in range(ENVS)]
    first = [world.obs[i] for i in range(ENVS)]  # what the next episodes begin with
    assert state.collected == 6
    for turn in range(3):
        _, data, _ = drawn(storage, state, random.key(turn), Sampling(15.0 / state.collected, 4))
        steps = [world.at(x) for x in data.batch.obs[:, 0].tolist()]
        if turn == 0:
            assert {r for r, _ in steps} == {0, 1, 2}  # every step of the episode, none of the empty rows
            assert [last[i] for _, i in steps] == data.batch.obs[:, 1].tolist()
            assert not set(first) & set(data.batch.obs[:, 1].tolist())
        assert {r for r, _ in steps} == set(range(max(0, len(world.happened) - 6), len(world.happened)))
        world.chance = 0.0
        state = storage.append(state, world.rollout(4))
    assert fnrl.Replay.family == "off-policy"  # a sampler of the one storage, checked as all parts are


# -- environments -----------------------------------------------------------------------------------------------------


def test_bits():
    check_environment(BitFlipping(3, num_envs=5), max_examples=1)
    env = BitFlipping(4, num_envs=2)
    assert env.spec == EnvSpec("BitFlipping(4)", Box((8,), 0.0, 1.0), Discrete(4), Goal(0, 4))
    state = env.init(random.key(0))
    assert set(env.noise(random.key(0), 500).flatten().tolist()) == {0.0, 1.0}
    assert abs(float(env.noise(random.key(0), 500).mean(dim=(0, 1)).sub(0.5).abs().max())) < 0.08
    start, goal = state.obs[:, :4], state.obs[:, 4:]
    differ = (start != goal)[0].nonzero().flatten().tolist()
    other = (start == goal)[1].nonzero().flatten().tolist()
    for t, bit in enumerate(differ):  # the first is led to its goal, the second away from it
        action = torch.tensor([bit, other[t % len(other)]])
        before = state.obs
        state, step = env.step(state, action, env.noise(random.key(9), 1)[0])
        assert torch.equal(step.next_obs[:, 4:], goal)
        changed = (step.next_obs != before).nonzero().tolist()
        assert changed == [[0, bit], [1, int(action[1])]]
        assert step.terminated.tolist() == [t == len(differ) - 1, False]
        assert step.reward.tolist() == [0.0 if t == len(differ) - 1 else -1.0, -1.0]
    for _ in range(4 - len(differ)):
        state, step = env.step(state, torch.tensor([0, other[0]]), env.noise(random.key(9), 1)[0])
    assert bool(step.truncated[1])


class Wanders(BitFlipping):
    """Its goal changes within an episode."""

    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        obs, next_obs = (torch.cat([x[:, : self.n], 1.0 - x[:, self.n :]], -1) for x in (state.obs, step.next_obs))
        inside = dataclasses.replace(state.inside, obs=obs)
        return EnvState(obs, inside), dataclasses.replace(step, next_obs=next_obs)


class Generous(BitFlipping):
    """Its judge says another thing than its step."""

    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        return state, dataclasses.replace(step, reward=step.reward + 0.5)


class Blind(BitFlipping):
    """Its judge does not see an end."""

    def judge(self, achieved, desired):
        reward, terminated = super().judge(achieved, desired)
        return reward, torch.zeros_like(terminated)

    def step(self, state, action, noise):
        return BitFlipping(self.n, self.num_envs).step(state, action, noise)


@pytest.mark.parametrize(
    ("fault", "evidence"),
    [
        (Wanders, "goal .* became"),
        (Generous, r"judge gives reward -1.0, step gave -0.5"),
        (Blind, r"judge gives terminated False, step gave True"),
    ],
)
def test_faults_of_goal_environments_are_caught(fault, evidence):
    with pytest.raises(LawError, match=evidence) as error:
        check_environment(fault(3, num_envs=5), steps=60, max_examples=1)
    assert GOALS in str(error.value)


class Reach(gymnasium.Env):
    """Goals on a line, by gymnasium-robotics' convention; `fault` says what is wrong with it."""

    def __init__(self, fault: str = "", limit: int = 6, size: int = 2) -> None:
        box = gymnasium.spaces.Box
        self.fault, self.limit = fault, limit
        goals = {n: box(-9.0, 9.0, (size,), np.float64) for n in ("desired_goal", "achieved_goal")}
        self.observation_space = gymnasium.spaces.Dict({"observation": box(-1.0, 9.0, (1,), np.float64), **goals})
        self.action_space = box(-1.0, 1.0, (size,), np.float32)
        if fault == "no reward":
            self.compute_reward = None
        if fault in ("size", "kind"):
            wrong = {"size": box(0, 1, (size + 1,)), "kind": gymnasium.spaces.Discrete(3)}[fault]
            self.observation_space = gymnasium.spaces.Dict({**self.observation_space, "desired_goal": wrong})

    def has_wrapper_attr(self, name):
        return super().has_wrapper_attr(name) and getattr(self, name) is not None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.normal(size=self.action_space.shape), 0
        self.goal = self.np_random.normal(size=self.action_space.shape)
        return self.obs(), {}

    def step(self, action):
        self.at, self.steps = self.at + 0.5 * action, self.steps + 1
        reward = -float(np.linalg.norm(self.at - self.goal)) + (0.1 if self.fault == "another reward" else 0.0)
        ended = reward > -0.3 and self.fault != "another end"
        return self.obs(), reward, ended, self.steps >= self.limit, {}

    def obs(self):
        obs = {"observation": np.array([self.steps / 9.0]), "achieved_goal": self.at, "desired_goal": self.goal}
        if self.fault == "missing":
            obs.pop("achieved_goal")
        return obs

    def compute_reward(self, achieved, desired, info):
        assert info == {}
        if self.fault == "raises":
            raise KeyError("is_success")
        reward = -np.linalg.norm(achieved - desired, axis=None if self.fault == "scalar" else -1)
        return np.full_like(reward, np.nan) if self.fault == "nan" and len(reward) > 20 else reward

    def compute_terminated(self, achieved, desired, info):
        return np.linalg.norm(achieved - desired, axis=-1) < (9.0 if self.fault == "another end" else 0.3)


def scheme_of(env, algo=None, **options):
    hindsight = options.pop("hindsight", Hindsight())
    if isinstance(env.spec.action, Discrete):
        actor = fnrl.OffPolicyActorCritic(
            env.spec, None, fnrl.MLP((8,)), critics=1, explore=fnrl.EpsilonGreedy(epsilon=0.2)
        )
        algo = algo or fnrl.DQN(ratio=0.5, batch=8, target_every=5)
    else:
        actor = fnrl.OffPolicyActorCritic(env.spec, fnrl.MLP((8,)), fnrl.MLP((8,)))
        algo = algo or fnrl.SAC(ratio=0.5, batch=8)
    storage = Replay(**{"capacity": 60, "warmup": 12, "hindsight": hindsight, **options})
    parts = fnrl.Parts(env, actor, algo, storage, normalise_obs=fnrl.NormaliseObs())
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


def test_a_dict_of_goals_is_one_vector():
    env = gym(Reach, 2)
    assert env.spec.goal == Goal(1, 2)
    assert env.spec.obs == Box((5,), (-1.0, -9.0, -9.0, -9.0, -9.0), 9.0, "float64")
    state = env.init(random.key(0))
    plain = Reach()
    episode_seed = random.bits(random.fold_in(random.split(random.key(0), 2)[1], 1)) & 0x7FFFFFFF
    obs, _ = plain.reset(seed=int(episode_seed))
    np.testing.assert_array_equal(state.obs[1].numpy(), np.concatenate([*map(obs.get, Goal.NAMES)]).astype(np.float32))
    assert torch.equal(env.spec.goal.desired(state.obs[1]), torch.from_numpy(obs["desired_goal"]).float())
    env.close(state)
    apart = gym(Reach, 2, processes=True)
    other = apart.init(random.key(0))
    assert torch.equal(other.obs, state.obs)
    apart.close(other)
    policy = fnrl.policy.policy_of(actor := scheme_of(env).parts.actor, weights_of(actor))
    flat = np.concatenate([obs[n] for n in Goal.NAMES])
    np.testing.assert_array_equal(policy(obs), policy(flat))
    with pytest.raises(ValueError, match=r"is a dict of .*'achieved_goal': 2.* numbers, got"):
        policy({**obs, "achieved_goal": np.zeros(3)})


def weights_of(actor):
    return fnrl.types.Weights(actor.init(random.key(0)), (), {}, (), 0, 0)


def test_hosted_goals_earn_what_the_simulator_says():
    check_environment(gym(Reach, 2), steps=32, max_examples=1)
    env = gym(Reach)
    achieved, desired = (0.3 * torch.randn(2, 3, 7, 2, generator=torch.Generator().manual_seed(0))).unbind(0)
    reward, terminated = env.judge(achieved, desired)
    distance = (achieved - desired).norm(dim=-1)
    torch.testing.assert_close(reward, -distance)
    assert torch.equal(terminated, distance < 0.3)
    assert bool(terminated.any())


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        (fnrl.envs.CartPole(2), CompositionError, r"needs a goal environment.* PandaReach-v3 .*CartPole-v1 is Box"),
        ("no reward", CompositionError, r"Reach has goals, but no compute_reward\(achieved_goal, desired_goal, info\)"),
        ("scalar", EnvironmentFault, r"compute_reward gave \[\] for goals \[\d+, 2\], expected \[\d+\]"),
        ("raises", EnvironmentFault, r"compute_reward raised KeyError: 'is_success'"),
        ("another reward", EnvironmentFault, r"at step 1 compute_reward gives -.*, step gave -"),
        ("another end", EnvironmentFault, r"at step 1 compute_terminated gives True, step gave False"),
    ],
)
def test_environments_that_hindsight_has_no_use_for_are_refused_at_composition(env, error, message):
    env = gym(Reach, fault=env) if isinstance(env, str) else env
    assert scheme_of(env, hindsight=None)
    with pytest.raises(error, match=message):
        scheme_of(env)


def test_goals_without_a_judge_are_refused():
    class Mute(BitFlipping):
        judge = property()

    with pytest.raises(CompositionError, match=r"has no judge\(achieved, desired\)"):
        scheme_of(Mute(3))

    class Wide(BitFlipping):
        def judge(self, achieved, desired):
            return (achieved == desired).float() - 1.0, (achieved == desired).all(-1)

    with pytest.raises(EnvironmentFault, match=r"judge gave rewards \[4, 1, 3\] for goals \[4, 1, 3\], expected"):
        scheme_of(Wide(3))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("size", "takes three vectors of floats, two of one size"),
        ("kind", "takes three vectors of floats, two of one size"),
    ],
)
def test_other_dicts_are_refused_by_name(fault, message):
    with pytest.raises(CompositionError, match=f"the observation of Reach has goals, so it {message}"):
        gym(Reach, fault=fault)


def test_an_observation_that_is_not_what_was_declared_is_a_fault():
    with pytest.raises(EnvironmentFault, match=r"Reach, probe.*is a dict of .* numbers, got .*'desired_goal': \[2\]"):
        gym(Reach, fault="missing")


def test_a_reward_that_is_not_finite_is_named():
    scheme = scheme_of(gym(Reach, fault="nan"), algo=fnrl.SAC(ratio=2.0, batch=12))
    state = scheme.init(fnrl.key(0))
    with pytest.raises(NonFiniteError, match="Reach: judge gave the reward nan for"):
        scheme.step(state)
    scheme.close(state)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [False, True])
def test_bits_resume_exactly(lanes):
    env = BitFlipping(4, num_envs=3)
    scheme = scheme_of(env, n_step=2, prioritised=Prioritised(), hindsight=Hindsight(strategy=EpisodeGoals()))
    resumes(scheme, torch.stack([fnrl.key(0), fnrl.key(1)]) if lanes else fnrl.key(0), 11, 26)


@pytest.mark.slow
def test_compiled_hindsight_agrees_with_eager_and_resumes_exactly():
    scheme = scheme_of(BitFlipping(4, num_envs=3), n_step=2, hindsight=Hindsight(strategy=FutureGoals()))
    compiled = dataclasses.replace(scheme, compile=True)
    resumes(compiled, fnrl.key(0), 11, 26)
    (a, _), (b, _) = (s.step(s.init(fnrl.key(2)), 4) for s in (scheme, compiled))
    assert (a.env_steps, a.version) == (b.env_steps, b.version)
    torch.testing.assert_close(a.weights.params.vector, b.weights.params.vector, rtol=1e-3, atol=1e-4)


def resumes(scheme, key, n, m):
    """run(n + m) is resume(run(n), m), and the ring turns meanwhile."""
    whole, _ = scheme.step(scheme.init(key), n + m)
    cut, _ = scheme.step(scheme.init(key), n)
    again = scheme.restore(scheme.gather(cut))
    scheme.close(cut)
    again, _ = scheme.step(again, m)
    assert scheme.same(whole, again)
    assert whole.env_steps > 60
    assert math.isfinite(float(whole.weights.params.vector.sum()))
    for state in (whole, again):
        scheme.close(state)


def test_a_saved_run_resumes_exactly(tmp_path):
    scheme, runs = scheme_of(BitFlipping(4, num_envs=3), n_step=2), []
    for home, targets in ((tmp_path / "whole", (150,)), (tmp_path / "cut", (75, 150))):
        with fnrl.Learner(scheme, targets[0], home) as learner:
            learner.train(progress=False)
        for target in targets[1:]:
            with fnrl.Learner.resume(home, scheme, target) as learner:
                learner.train(progress=False)
        runs.append(learner.state)
    assert tree.same_bits(*(state.weights for state in runs))
    assert runs[0].env_steps >= 150


def test_reach_resumes_exactly():
    resumes(scheme_of(gym(Reach, 2), n_step=2), fnrl.key(1), 11, 26)


def test_panda_reach():
    pytest.importorskip("panda_gym")
    env = gym("PandaReach-v3", max_episode_steps=7)
    assert env.spec.goal == Goal(6, 3)
    achieved = torch.zeros(2, 3)
    reward, terminated = env.judge(achieved, torch.tensor([[0.0, 0.0, 0.04], [0.0, 0.0, 0.06]]))
    assert (reward.tolist(), terminated.tolist()) == ([0.0, -1.0], [True, False])
    resumes(scheme_of(env, algo=fnrl.SAC(ratio=0.25, batch=8)), fnrl.key(0), 3, 13)
