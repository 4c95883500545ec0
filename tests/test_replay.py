"""The replay against a list of transitions, its samplers against loops and their distributions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import lanes as lanes_of
from scipy import stats

import fnrl
from fnrl import graphs, random, tree
from fnrl.actors import OffPolicyActorCritic
from fnrl.errors import CheckpointError, CompositionError, StaleStateError
from fnrl.lift import Run
from fnrl.networks import MLP
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.storages.replay import Prioritised, Replay
from fnrl.testing import LawError, check_storage
from fnrl.types import Params, Rollout, Sampling, Transition, Weights

ENVS, GAMMA = 2, 0.9
SPEC = EnvSpec("made up", Box((1,)), Box((1,), -1.0, 1.0))
ACTOR = OffPolicyActorCritic(SPEC, MLP((4,)), MLP((4,)))
PLAN = Sampling(1.0, 4)


def weights(**hyper):
    given_ = {"gamma": GAMMA, "priority_beta": 0.4, **hyper}
    return Weights(
        Params(torch.zeros(0), ()), (), {n: torch.tensor(v, dtype=torch.float32) for n, v in given_.items()}, (), 0, 0
    )


class World:
    """Endless steps of ENVS environments whose observations are all different, and what happened, as a list."""

    def __init__(self, seed, chance=0.3):
        self.rng, self.count, self.chance = np.random.default_rng(seed), 0, chance
        self.obs = [self.fresh() for _ in range(ENVS)]
        self.happened = []  # rows of ENVS (obs, action, reward, next_obs, terminated, truncated)

    def fresh(self):
        self.count += 1
        return float(self.count)

    def rollout(self, steps):
        rows = []
        for _ in range(steps):
            row = []
            for i in range(ENVS):
                following, kind = self.fresh(), self.rng.random()
                terminated, truncated = kind < self.chance / 2, self.chance / 3 < kind < self.chance
                row.append((self.obs[i], self.rng.normal(), self.rng.normal(), following, terminated, truncated))
                self.obs[i] = self.fresh() if terminated or truncated else following
            rows.append(row)
        self.happened += rows
        x = np.array(rows, np.float32)  # [T, N, 6]
        t = torch.from_numpy(x)
        zeros = torch.zeros(steps, ENVS)
        done = t[..., 4].bool(), t[..., 5].bool()
        steps_ = Transition(t[..., :1], t[..., 1:2], zeros, t[..., 2], *done, t[..., 3:4], torch.zeros(steps, ENVS, 0))
        return Rollout(steps_, (), 0, steps * ENVS)


def everything(storage, state, **hyper):
    """All transitions in the ring, oldest first, as `sample` gives them."""
    ring = state.token.take()
    whole, n = ring.rows.reward.shape
    place = [(ring.start + r) % whole * n + i for r in range(ring.size) for i in range(n)]
    index = torch.tensor(place)
    return storage.sample(ring.rows, weights(**hyper), index, torch.ones(len(place)), ring.where)


def expected(happened, n_step):
    out = []
    for r in range(len(happened)):
        for i in range(ENVS):
            obs, action = happened[r][i][:2]
            total, discount, k = 0.0, 1.0, 0
            while True:
                _, _, reward, following, terminated, truncated = happened[r + k][i]
                total += discount * reward
                discount *= GAMMA
                k += 1
                if terminated or truncated or k == n_step or r + k == len(happened):
                    break
            out.append((obs, action, total, following, 0.0 if terminated else discount))
    return np.array(out, np.float32)


def as_rows(batch):
    columns = batch.obs[:, 0], batch.action[:, 0], batch.reward, batch.next_obs[:, 0], batch.discount
    return torch.stack(columns, 1).numpy()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    capacity=st.integers(3, 9),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    n_step=st.integers(1, 4),
    moves=st.integers(0, 2**12 - 1),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_ring_holds_the_last_transitions_in_order(seed, capacity, lengths, n_step, moves, chance):
    """On every sequence of appends, forks and restores; the donated ring agrees with a copy made before."""
    storage, world = Replay(capacity=capacity * ENVS, n_step=n_step), World(seed, chance)
    state = storage.init()
    for k, length in enumerate(lengths):
        rollout = world.rollout(length)
        if moves >> k & 1:
            copy = storage.append(storage.restore(storage.gather(state)), rollout)
            state = storage.append(state, rollout)
            assert tree.same_bits(storage.gather(copy), storage.gather(state))
            state = copy
        else:
            state = storage.append(state, rollout)
        last = world.happened[-capacity:]
        np.testing.assert_allclose(as_rows(everything(storage, state)), expected(last, n_step), rtol=1e-5, atol=1e-6)
    assert state.collected == len(world.happened) * ENVS


def test_a_step_of_one_is_the_ring():
    world = World(3)
    one, many = Replay(capacity=40), Replay(capacity=40, n_step=1)
    rollout = world.rollout(15)
    a, b = (everything(s, s.append(s.init(), rollout)) for s in (one, many))
    assert tree.same_bits(a, b)
    assert torch.equal(a.reward, rollout.steps.reward.flatten())


def test_words_drawn_ahead_are_spent_once_and_travel_with_the_state():
    """A plan's draw does not depend on whether the state was saved since the words were drawn."""
    storage, world = Replay(capacity=100, warmup=0), World(0)
    state, drawn_ = storage.append(storage.init(), world.rollout(20)), []
    for k in range(1, 150):
        plan, state = Sampling((k + 0.5) / 40, 4), dataclasses.replace(state, rate=None)
        again = storage.restore(storage.gather(state))
        state, data, _ = drawn(storage, state, random.key(k), plan)
        other, same, _ = drawn(storage, again, random.key(k), plan)
        assert tree.same_bits(data, same)
        assert state.updates == other.updates == k
        drawn_.append(tuple(data.index.tolist()))
    assert len(set(drawn_)) == len(drawn_)


def test_a_stale_state_is_refused_and_a_fork_is_not():
    storage, world = Replay(capacity=10), World(0)
    first = storage.append(storage.init(), world.rollout(2))
    fork = storage.restore(storage.gather(first))
    before = storage.gather(first)
    second = storage.append(first, world.rollout(2))
    for use in (storage.gather, lambda s: storage.append(s, world.rollout(1))):
        with pytest.raises(StaleStateError, match="fork"):
            use(first)
    assert tree.same_bits(storage.gather(fork), before)
    assert not tree.same_bits(storage.gather(second), before)


def test_truncated_episodes_bootstrap_from_their_true_successor_and_terminated_ones_from_nothing():
    storage, world = Replay(capacity=100), World(1, chance=0.9)
    rollout = world.rollout(30)
    batch = everything(storage, storage.append(storage.init(), rollout))
    steps = rollout.steps
    assert bool((steps.truncated & ~steps.terminated).any())
    assert bool(steps.terminated.any())
    assert torch.equal(batch.next_obs, steps.next_obs.flatten(0, 1))
    assert torch.equal(batch.discount == 0.0, steps.terminated.flatten())


def drawn(storage, state, key, plan, **hyper):
    after, data, rows = storage.batches(lambda method: method, state, ACTOR, weights(**hyper), plan, ENVS, key)
    return after, data, rows


@pytest.mark.parametrize("prioritised", [None, Prioritised(alpha=0.0)])
def test_samples_are_uniform_and_a_function_of_the_key(prioritised):
    storage, world = Replay(capacity=20, steps=5, warmup=0, prioritised=prioritised), World(2)
    state = storage.init()
    for _ in range(3):  # past the capacity: the ring has turned
        state = storage.append(state, world.rollout(5))
    if prioritised is not None:  # whatever the errors are
        _, data, rows = drawn(storage, state, random.key(0), Sampling(1.0, 4))
        state = storage.feedback(state, data, rows[0], torch.rand(4, generator=torch.Generator().manual_seed(0)))
    plan = Sampling(40.0, 7)
    _, data, rows = drawn(storage, state, random.key(5), plan)
    assert rows.shape == (1200, 7)
    counts = np.bincount(data.index.numpy(), minlength=22)
    present = everything(storage, state)
    assert sorted(np.unique(data.batch.obs.numpy())) == sorted(present.obs[:, 0].tolist())
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    if prioritised is not None:
        assert torch.equal(data.batch.weight, torch.ones(1200 * 7))
    assert torch.equal(drawn(storage, state, random.key(5), plan)[1].index, data.index)
    assert not torch.equal(drawn(storage, state, random.key(6), plan)[1].index, data.index)


def test_prioritised_samples_follow_their_errors():
    storage, world = Replay(capacity=3000, steps=100, warmup=0, prioritised=Prioritised(alpha=0.7)), World(2)
    state = storage.init()
    for _ in range(20):
        state = storage.append(state, world.rollout(100))
    total = 1500 * ENVS
    _, data, rows = drawn(storage, state, random.key(0), Sampling(1.0, 100))
    error = 3.0 * torch.rand(100, generator=torch.Generator().manual_seed(0))
    index = data.index[rows[0]]
    state = storage.feedback(state, data, rows[0], error)
    p = np.ones(1501 * ENVS)
    ring = state.token.take()
    p[[ring.cursor * ENVS, ring.cursor * ENVS + 1]] = 0.0
    greatest = {}
    for i, e in zip(index.tolist(), error.tolist(), strict=True):
        greatest[i] = max(greatest.get(i, 0.0), (e + 1e-6) ** 0.7)
    for i, e in greatest.items():
        p[i] = e
    state, data, rows = drawn(storage, state, random.key(1), Sampling(0.05, 4000))
    counts = np.bincount(data.index.numpy(), minlength=len(p))
    assert counts[p == 0.0].sum() == 0
    keep = p > 0.0
    assert stats.chisquare(counts[keep], p[keep] / p.sum() * counts.sum()).pvalue > 1e-3
    w = (total * p[data.index.numpy()] / p.sum()) ** -0.4
    w = (w.reshape(rows.shape) / w.reshape(rows.shape).max(-1, keepdims=True)).flatten()
    np.testing.assert_allclose(data.batch.weight.numpy(), w, rtol=1e-4)


@pytest.mark.parametrize("prioritised", [None, Prioritised()])
@pytest.mark.parametrize("u", [0, -1])
@pytest.mark.parametrize("rollouts", [1, 33, 700])
def test_no_draw_leaves_what_is_stored(u, rollouts, prioritised, monkeypatch):
    """At the ends of the uniforms' range, in a ring whose later blocks are empty."""
    storage, world = Replay(capacity=5000, steps=2, warmup=0, prioritised=prioritised), World(0)
    state = storage.init()
    for _ in range(rollouts):
        state = storage.append(state, world.rollout(2))
    monkeypatch.setattr("fnrl.storages.replay.random.bits", lambda key, shape: torch.full(shape, u, dtype=torch.int32))
    _, data, _ = drawn(storage, state, random.key(0), Sampling(0.25 / rollouts, 256))
    assert int(data.index.max()) < 4 * rollouts
    assert bool((data.batch.weight > 0.0).all())


def test_an_error_that_is_not_finite_is_not_remembered():
    storage, world = Replay(capacity=50, steps=2, warmup=0, prioritised=Prioritised()), World(0)
    state, data, rows = drawn(
        storage, storage.append(storage.init(), world.rollout(2)), random.key(0), Sampling(1.0, 4)
    )
    before = storage.gather(state)
    state = storage.feedback(state, data, rows[0], torch.tensor([1.0, math.nan, 2.0, 3.0]))
    assert tree.same_bits(storage.gather(state), before)


def test_a_ring_is_restored_into_a_larger_one_and_not_into_one_of_another_kind():
    small, large = (Replay(capacity=c, steps=2, warmup=0, prioritised=Prioritised()) for c in (200, 9000))
    world = World(0)
    state = small.append(small.init(), world.rollout(2))
    moved = large.restore(small.gather(state))
    for _ in range(800):
        moved = large.append(moved, world.rollout(2))
    _, data, _ = drawn(large, moved, random.key(0), Sampling(0.01, 64))
    assert int(data.index.max()) > 1024
    for pure, other in ((small.gather(state), Replay(capacity=200)), (None, small)):
        plain = Replay(capacity=200)
        given_ = pure or plain.gather(plain.append(plain.init(), World(0).rollout(2)))
        with pytest.raises(CheckpointError, match="priorities is not that of Replay"):
            other.restore(given_)


def test_new_transitions_have_the_greatest_priority_so_far():
    storage, world = Replay(capacity=50, steps=2, warmup=0, prioritised=Prioritised(alpha=1.0)), World(0)
    state = storage.append(storage.init(), world.rollout(2))
    state, data, rows = drawn(storage, state, random.key(0), Sampling(1.0, 4))
    state = storage.feedback(state, data, rows[0], torch.tensor([1.0, 7.0, 2.0, 3.0]))
    state = storage.append(state, world.rollout(2))
    ring = state.token.take()
    torch.testing.assert_close(ring.rows.priority[4:8], torch.full((4,), 7.0))
    assert float(ring.rows.top) == float(ring.rows.priority[4])
    np.testing.assert_allclose(ring.rows.sums.numpy(), ring.rows.priority.reshape(-1, 128).sum(-1).numpy())


@pytest.mark.parametrize("prioritised", [None, Prioritised()])
def test_lanes_of_a_ring_are_rings(prioritised):
    storage = Replay(capacity=7 * ENVS, steps=3, warmup=0, n_step=2, prioritised=prioritised)
    worlds = [World(s, chance=0.6) for s in range(3)]
    lanes, apart = storage.init(), [storage.init() for _ in worlds]
    for k in range(4):
        rollouts = [w.rollout(3) for w in worlds]
        stacked = Rollout(tree.stack([r.steps for r in rollouts]), (), 0, 6)
        lanes = storage.append(lanes, stacked)
        apart = [storage.append(s, r) for s, r in zip(apart, rollouts, strict=True)]
        keys = torch.stack([random.key(10 * k + i) for i in range(3)])

        def mapped(method):
            def run(ring, hyper_or_weights, *rest):
                tensors = [x for x in rest if isinstance(x, torch.Tensor)]
                others = [x for x in rest if not isinstance(x, torch.Tensor)]
                return torch.func.vmap(lambda held, *xs: method(held, hyper_or_weights, *xs, *others))(ring, *tensors)

            return run

        lanes, data, rows = storage.batches(mapped, lanes, ACTOR, weights(), Sampling(1.0, 5), ENVS, keys)
        errors = data.batch.reward[:, :5].abs()
        errors[1, 3] = math.nan if k == 2 else 1.0  # which is not remembered in its lane, and is in the others
        for i in range(3):
            one, d, r = drawn(storage, apart[i], random.key(10 * k + i), Sampling(1.0, 5))
            assert tree.same_bits(tree.index(data, i), d)
            assert torch.equal(rows[i], r)
            apart[i] = storage.feedback(one, d, r[0], errors[i])
        lanes = storage.feedback(lanes, data, rows.select(-2, 0), errors)
        again = storage.restore(storage.gather(lanes))
        assert tree.same_bits(storage.gather(again), storage.gather(lanes))


def test_updates_are_earned_by_transitions():
    def life(storage, plan, rollouts=200):
        state, world, at, made = storage.init(), World(0), [], 0
        for _ in range(rollouts):
            state = storage.append(state, world.rollout(storage.steps))
            if storage.ready(state, plan, ENVS):
                state, _, rows = storage.batches(
                    lambda m: m, state, ACTOR, weights(), plan, ENVS, random.key(state.collected)
                )
                made += len(rows)
                at.append((state.collected, made))
        return at

    quarter = life(Replay(capacity=100, warmup=8), Sampling(0.25, 4))
    assert quarter[:3] == [(10, 1), (14, 2), (18, 3)]  # rollouts of two: 6 + 4 k transitions
    assert quarter[-1] == (398, 98)
    whole = life(Replay(capacity=100, warmup=8, steps=2), Sampling(1.5, 4))
    assert whole[:3] == [(8, 6), (12, 12), (16, 18)]
    odd = life(Replay(capacity=100, warmup=0), Sampling(math.pi / 10, 2))
    assert odd[-1][1] == math.floor(math.pi / 10 * odd[-1][0])


@pytest.mark.parametrize(
    ("storage", "plan", "message"),
    [
        (Replay(capacity=3, steps=4), PLAN, r"capacity=3 of Replay is less than one rollout of 4 steps x 2"),
        (Replay(warmup=10), Sampling(1.0, 256), r"a batch of 256 is more than the 10 .*Replay\(warmup=256\)"),
        (Replay(capacity=10**13), PLAN, r"needs .* GB for Box.* the machine has .* GB: a capacity of \d+"),
        (Replay(), fnrl.PPO().plan, "plan is a Sampling, such as SAC"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(storage, plan, message):
    with pytest.raises(CompositionError, match=message):
        storage.check(plan, ACTOR, ENVS)


def test_memory_counts_what_is_available_and_a_frame_of_a_stack(monkeypatch):
    """Of the machine's memory what others use is not there, and a stack of frames needs the room of one."""
    space = Box((4, 84, 84), 0, 255, "uint8")
    actor = OffPolicyActorCritic(EnvSpec("pictures", space, Discrete(3)), None, MLP((4,)), critics=1)
    whole, thin = Replay(capacity=100_000), Replay(capacity=100_000, frames=fnrl.Frames(4))
    assert 3.9 < whole.nbytes(actor, 1) / thin.nbytes(actor, 1) <= 4.0
    assert 0.7e9 < thin.nbytes(actor, 1) < 0.8e9
    texts = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr("fnrl.storages.replay.Path.read_text", lambda path: texts[str(path)])
    thin.check(PLAN, actor, 1)
    with pytest.raises(CompositionError, match=r"needs 2\.8 GB .* the machine has 1\.0 GB"):
        whole.check(PLAN, actor, 1)
    texts["/sys/fs/cgroup/memory.max"] = "500000000\n"
    with pytest.raises(CompositionError, match=r"needs 0\.7 GB .* the machine has 0\.5 GB"):
        thin.check(PLAN, actor, 1)


def test_a_ring_of_another_size_is_refused():
    storage = Replay(capacity=20)
    pure = storage.gather(storage.append(storage.init(), World(0).rollout(8)))
    with pytest.raises(CheckpointError, match=r"not that of Replay\(capacity=10\)"):
        Replay(capacity=10).restore(pure)


def test_bytes_stay_bytes_and_discrete_actions_are_whole():
    spec = EnvSpec("pictures", Box((4, 4, 2), 0, 255, "uint8"), Discrete(3))
    actor = OffPolicyActorCritic(spec, None, MLP((4,)), critics=1)
    storage = Replay(capacity=6, warmup=0)
    gen = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 255, (4, ENVS, 4, 4, 2), dtype=torch.uint8, generator=gen)
    flags = torch.zeros(3, ENVS, dtype=torch.bool)
    action = torch.randint(0, 3, (3, ENVS), generator=gen)
    zeros = torch.zeros(3, ENVS)
    steps = Transition(obs[:-1], action, zeros, zeros, flags, flags, obs[1:], torch.zeros(3, ENVS, 0))
    state = storage.append(storage.init(), Rollout(steps, (), 0, 6))
    batch = everything(storage, state)
    assert batch.obs.dtype == torch.uint8
    assert torch.equal(batch.obs, obs[:-1].flatten(0, 1))
    assert torch.equal(batch.next_obs, obs[1:].flatten(0, 1))
    assert torch.equal(batch.action, action.flatten())
    assert actor.q(actor.init(random.key(0)), actor.features(actor.init(random.key(0)), batch.obs)).shape == (1, 6, 3)


class Careless(Replay):
    """Restores another ring than was gathered."""

    def restore(self, pure, copy=True):
        made = super().restore(pure, copy)
        if not isinstance(made.token, tuple):
            made.token.owner.rows.reward[0] += 1.0
        return made


class Lenient(Replay):
    """Takes stale states."""

    def gather(self, state, copy=True):
        if isinstance(state.token, tuple):
            return super().gather(state, copy)
        return super().gather(dataclasses.replace(state, token=state.token.owner.token()), copy)


class Lopsided(Replay):
    """Draws the older half."""

    def draw(self, ring, hyper, words, where):
        return super().draw(ring, hyper, words // 2, where)


class Deaf(Replay):
    """Takes no errors."""

    def feedback(self, state, data, rows, priority):
        return state


class Unweighted(Replay):
    """Corrects nothing."""

    def draw(self, ring, hyper, words, where):
        index, weight = super().draw(ring, hyper, words, where)
        return index, torch.ones_like(weight)


class Reset(Replay):
    """Takes the next episode's first observation for the successor of the last one's end."""

    def sample(self, ring, *args):
        return super().sample(dataclasses.replace(ring, final_at=torch.full_like(ring.final_at, -1)), *args)


class Immortal(Replay):
    """Takes a termination for a time limit."""

    def sample(self, ring, *args):
        return super().sample(dataclasses.replace(ring, terminated=torch.zeros_like(ring.terminated)), *args)


@pytest.mark.parametrize("prioritised", [None, Prioritised(), Prioritised(alpha=0.0)])
def test_the_kit_has_laws_for_replays(prioritised):
    check_storage(Replay(capacity=14, steps=2, n_step=2, prioritised=prioritised), max_examples=2)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Careless(capacity=14, steps=2), "a fork is not touched"),
        (Lenient(capacity=14, steps=2), "only the newest"),
        (Lopsided(capacity=14, steps=2), "drawn alike"),
        (Deaf(capacity=14, steps=2, prioritised=Prioritised()), "follow their errors"),
        (Unweighted(capacity=14, steps=2, prioritised=Prioritised()), "follow their errors.*weight"),
        (Reset(capacity=14, steps=2), "as it was collected.*next_obs"),
        (Immortal(capacity=14, steps=2), "as it was collected.*discount"),
    ],
)
def test_the_kit_catches_replays_that_break_them(wrong, law):
    with pytest.raises(LawError, match=law):
        check_storage(wrong)


@pytest.mark.parametrize("given", [{"n_step": 3}, {"n_step": 3, "steps": 2}, {"hindsight": fnrl.Hindsight()}])
def test_what_looks_beyond_a_rollout_is_not_collected_in_any_order(given):
    env = fnrl.envs.BitFlipping(4, num_envs=2)
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((8,)), critics=1)

    def compose(node, **more):
        replay = Replay(**{"capacity": 100, "warmup": 16, **given, **more})
        return fnrl.Scheme(fnrl.Parts(env, actor, fnrl.DQN(batch=8), replay), fnrl.centralised(fnrl.gradients(node)))

    with pytest.raises(fnrl.CompositionError, match=r"can't look beyond a rollout, which has steps=\d: pass steps=8"):
        compose(fnrl.asynchronous(fnrl.collect, 2))
    compose(fnrl.asynchronous(fnrl.collect, 2), steps=8)
    compose(fnrl.synchronous(fnrl.collect, 2))


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("many", [None, 2])
def test_a_graph_draws_the_samples_of_numpy(n_step, many):
    """Around the ring's end and over the ends of episodes."""
    storage, worlds = Replay(capacity=40, warmup=0, n_step=n_step), [World(i, 0.6) for i in range(many or 1)]
    shared = weights()
    if many:
        shared = dataclasses.replace(shared, hyper={n: x.expand(many).clone() for n, x in shared.hyper.items()})
        shared = dataclasses.replace(shared, params=Params(torch.zeros(many, 0), ()))
    run, state = Run(None, None, lanes=many, compile=True), storage.init()
    ends = 0
    for k in range(12):
        made = [w.rollout(7) for w in worlds]
        state = storage.append(state, lanes_of(made) if many else made[0])
        key = torch.stack([random.key(10 * k + i) for i in range(many or 1)])
        facts = state, ACTOR, shared, Sampling(1.0, 16), ENVS, key if many else key[0]
        before = graphs.SPENT.graphs
        state, mine, _ = storage.batches(run.graph, *facts)
        assert (graphs.SPENT.graphs > before) == (k == 0)  # one graph for the whole life of a ring
        _, other, _ = storage.batches(run.lift, *facts)
        assert tree.different_bits(mine, other) == []
        ends += int((other.batch.discount == 0.0).sum())
    assert ends > 100


def test_a_ring_makes_room_for_more_ends_than_it_had_places(monkeypatch):
    """And gives the samples, and the record, of one that had enough."""

    def life():
        storage, world = Replay(capacity=40, warmup=0, n_step=2), World(0, 0.9)
        state = storage.init()
        for _ in range(12):
            state = storage.append(state, world.rollout(7))
        return everything(storage, state), storage.gather(state), state.token.take().rows.finals.shape[0]

    want, record, enough = life()
    monkeypatch.setattr("fnrl.storages.ring._finals", lambda rows, envs: 3)
    got, same, grown = life()
    assert grown > 3
    assert grown != enough
    assert tree.different_bits(got, want) == []
    assert tree.different_bits(same, record) == []
