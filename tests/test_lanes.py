"""Lanes of seeds: apart from each other, frozen where one turns non-finite, swept, taken out, refused."""

import dataclasses
import math
import warnings

import gymnasium
import numpy as np
import pytest
import torch

import fnrl
from fnrl import tree
from fnrl.envs.base import Step
from fnrl.topology import centralised, collect, gradients, sharded, synchronous

ENV = fnrl.envs.CartPole(num_envs=4, time_limit=20)
SIMPLE = centralised(gradients(collect))
WIDE = centralised(synchronous(gradients(collect), 2))


def parts(env=ENV, recurrent=False, **ppo):
    actor = fnrl.OnPolicyActorCritic(
        env.spec, policy=fnrl.MLP((8,)), value=fnrl.MLP((8,)), recurrent=fnrl.GRU(4) if recurrent else None
    )
    algo = fnrl.PPO(**{"minibatches": 2, "epochs": 2, **ppo})
    scaled = {"normalise_obs": fnrl.NormaliseObs(), "scale_reward": fnrl.ScaleReward()}
    return fnrl.Parts(env, actor, algo, fnrl.GAE(steps=32), **scaled)


def run(scheme, state, updates=20):
    for _ in range(updates):
        state, info = scheme.step(state)
    return state, info


def lane(state, i):
    """Lane i of a gathered state."""
    return tree.leaves(tree.map(lambda x: x[i].clone(), state))


def same(a, b):
    return tree.different_bits(a, b) == []


# -- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_are_keys():
    assert torch.equal(fnrl.seeds(3), torch.stack([fnrl.key(i) for i in range(3)]))
    many = [7, 2**63 + 5, 0]
    assert torch.equal(fnrl.seeds(many), torch.stack([fnrl.key(i) for i in many]))
    assert torch.equal(fnrl.seeds(fnrl.seeds(many)), fnrl.seeds(many))  # keys are those of the seeds they belong to
    with pytest.warns(UserWarning, match=r"more than once: \[1\]"):
        fnrl.seeds([1, 1])
    for none in (0, []):
        with pytest.raises(ValueError, match="at least one seed"):
            fnrl.seeds(none)
    for wrong in (-1, "3", 1.5, torch.zeros(3), True):
        with pytest.raises((ValueError, TypeError), match="seed"):
            fnrl.seeds(wrong)


# -- taken out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [SIMPLE, WIDE])
def test_lanes_that_are_selected_go_on_as_they_would_have(topology):
    scheme = fnrl.Scheme(parts(), topology)
    state, _ = run(scheme, scheme.init(fnrl.seeds(4)), 7)  # inside a plan
    some = scheme.select(state, [3, 1])
    whole, _ = run(scheme, state, 6)
    assert (some.lanes, some.which) == (2, (3, 1))
    few, _ = run(scheme, some, 6)
    for place, number in enumerate((3, 1)):
        assert same(lane(few, place), lane(whole, number))
    one = scheme.drop(few, 3)  # alone it runs twice
    assert one.which == (1, 1)
    whole, _ = run(scheme, whole, 4)
    assert same(lane(run(scheme, one, 4)[0], 0), lane(whole, 1))
    for wrong in ([], [0], [1, 4]):
        with pytest.raises(ValueError, match=r"the state has \[3, 1\]"):
            scheme.select(few, wrong)
    with pytest.raises(ValueError, match="of one seed"):
        scheme.select(scheme.init(fnrl.key(0)), [0])


def test_a_hosted_replay_is_taken_apart_by_lanes():
    env = fnrl.envs.gym("Pendulum-v1", num_envs=2, max_episode_steps=9)
    small = fnrl.MLP((8,))
    actor = fnrl.OffPolicyActorCritic(env.spec, small, small)
    storage = fnrl.Replay(capacity=64, steps=4, warmup=16, prioritised=fnrl.Prioritised())
    scheme = fnrl.Scheme(fnrl.Parts(env, actor, fnrl.SAC(batch=8), storage), SIMPLE)
    state, _ = run(scheme, scheme.init(fnrl.seeds(3)), 30)
    some = scheme.select(state, [2, 0])
    few, _ = run(scheme, some, 30)
    whole, _ = run(scheme, state, 30)
    whole, few = (scheme.select(x, [0, 2]) for x in (whole, few))
    assert same(tree.leaves(scheme.gather(whole)), tree.leaves(scheme.gather(few)))


# -- dead -----------------------------------------------------------------------------------------------------------


@fnrl.component
class Bad(fnrl.PPO):
    """Its loss is not finite where the clip is 0.3."""

    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss / (weights.hyper["clip"] != 0.3).float(), aux


@pytest.mark.parametrize("topology", [SIMPLE, WIDE])
def test_a_lane_whose_loss_is_not_finite_stands_still_and_the_others_do_not_notice(topology):
    p = parts()
    scheme = fnrl.Scheme(fnrl.Parts(p.env, p.actor, Bad(minibatches=2, epochs=2), p.storage, p.normalise_obs), topology)
    state, _ = run(scheme, scheme.init(fnrl.seeds(3)), 6)
    sick = scheme.set(scheme.fork(state), clip=[0.2, 0.3, 0.2])
    well, _ = run(scheme, scheme.set(state, clip=0.2), 8)
    with pytest.warns(fnrl.DeadLaneWarning, match=r"lane 1 is dead: update 6 at node root.*loss=(inf|nan).*clip=0.3"):
        after, info = scheme.step(sick)
    assert info.metrics["alive"].tolist() == [1.0, 0.0, 1.0]
    assert bool(info.metrics["entropy"][1].isnan())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        after, _ = run(scheme, after, 7)
    for i in (0, 2):
        assert same(lane(after, i), lane(well, i))
    algo, before = after.node.algo, sick.node.algo
    for name in ("weights", "opt", "updates"):
        assert same(lane(getattr(algo, name), 1), lane(getattr(before, name), 1))
    assert tree.non_finite(scheme.gather(after)) == []  # so it can be saved
    alone = scheme.select(sick, [1])
    with pytest.raises(fnrl.NonFiniteError, match="in any lane that is left"):
        scheme.step(alone)


@fnrl.component
class Poisoned(fnrl.envs.CartPole):
    """The reward and the state of environments that went far to the right are not finite."""

    def step(self, state, action, noise):
        after, step = super().step(state, action, noise)
        bad = after.inside.physics[..., 0] > self.far
        nan = torch.where(bad, math.nan, 0.0)
        after = tree.map(
            lambda x: x + nan.reshape(nan.shape + (1,) * (x.dim() - 1)) if x.is_floating_point() else x, after
        )
        return after, Step(step.next_obs + nan[..., None], step.reward + nan, step.terminated, step.truncated)

    far: float = fnrl.option(default=0.4, help="where it ends")


@pytest.mark.parametrize("off_policy", [False, True])
def test_a_lane_whose_simulation_is_not_finite_stands_still_and_the_others_do_not_notice(off_policy):
    def scheme_of(env):
        if not off_policy:
            return fnrl.Scheme(parts(env), WIDE)
        actor = fnrl.OffPolicyActorCritic(env.spec, fnrl.MLP((8,)), fnrl.MLP((8,)))
        storage = fnrl.Replay(capacity=256, steps=4, warmup=32, prioritised=fnrl.Prioritised())
        return fnrl.Scheme(fnrl.Parts(env, actor, fnrl.SAC(batch=8), storage), SIMPLE)

    well, sick = (scheme_of(Poisoned(num_envs=4, far=far)) for far in (9.0, 0.2 if off_policy else 0.4))
    updates = 100 if off_policy else 16
    with pytest.warns(fnrl.DeadLaneWarning, match=r"is not finite: CartPole-v1, lane \d, environment \d, step \d+"):
        a, info = run(sick, sick.init(fnrl.seeds(6)), updates)
    b, _ = run(well, well.init(fnrl.seeds(6)), updates)
    alive = info.metrics["alive"].bool().tolist()
    assert 1 < sum(alive) < 6
    for i in range(6):
        assert same(lane(sick.gather(a), i), lane(well.gather(b), i)) == alive[i]
    assert tree.non_finite(sick.gather(a)) == []


class Broken(gymnasium.Wrapper):
    """Nothing it says is finite in episodes that begin fast."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.bad = float(obs[2]) > 0.8
        return obs, info

    def step(self, action):
        assert np.isfinite(action).all()
        obs, reward, *rest = self.env.step(action)
        return (obs * np.nan, np.nan, *rest) if self.bad else (obs, reward, *rest)


def test_simulators_of_a_dead_lane_step_on():
    made = []
    for wrappers in ((), (Broken,)):
        env = fnrl.envs.gym("Pendulum-v1", num_envs=2, wrappers=wrappers, max_episode_steps=50)
        scheme = fnrl.Scheme(parts(env), SIMPLE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fnrl.DeadLaneWarning)
            made.append((scheme, *run(scheme, scheme.init(fnrl.seeds(5)), 12)))
    (well, a, _), (sick, b, info) = made
    alive = info.metrics["alive"].bool().tolist()
    assert 1 < sum(alive) < 5
    again = sick.fork(b)  # simulators are brought back through what was not finite
    for i in range(5):
        assert same(lane(well.gather(a).node.algo, i), lane(sick.gather(b).node.algo, i)) == alive[i]
    assert tree.non_finite(sick.gather(b)) == []
    assert same(sick.gather(again), sick.gather(b))


def test_one_lane_alone_is_exact():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    one, _ = run(scheme, scheme.init(fnrl.seeds([7])), 5)
    three, _ = run(scheme, scheme.init(fnrl.seeds([1, 7, 3])), 5)
    assert (one.lanes, one.which) == (2, (0, 0))
    assert same(lane(one, 0), lane(three, 1))


# -- swept ----------------------------------------------------------------------------------------------------------


def swept_and_alone(sweep, wanted, updates=10):
    """Lane `wanted` of a sweep, and the same lane of two that have only its values."""
    state, _ = run(sweep.scheme, sweep.scheme.init(sweep.keys), updates)
    values = dict(sweep.settings[wanted])
    algo = fnrl.PPO(minibatches=2, epochs=2, **{n: x for n, x in values.items() if n != "gae_lambda"})
    p = dataclasses.replace(parts(), algo=algo)
    if "gae_lambda" in values:
        p = dataclasses.replace(p, storage=dataclasses.replace(p.storage, gae_lambda=values["gae_lambda"]))
    scheme = fnrl.Scheme(p, SIMPLE)
    two, _ = run(scheme, scheme.init(fnrl.seeds([99, sweep.seeds[wanted]])), updates)
    return lane(state, wanted), lane(two, 1)


def test_a_lane_of_a_grid_is_the_lane_that_has_only_its_values():
    lr = [1e-2, fnrl.Linear(1e-2, 1e-3, steps=400)]
    sweep = fnrl.sweep(fnrl.Scheme(parts(), SIMPLE), lr=lr, gamma=(0.9, 0.99), gae_lambda=[0.8], seeds=[4, 2])
    assert len(sweep) == 8
    assert sweep.seeds == (4, 2) * 4
    assert sweep.settings[3] == (("lr", 1e-2), ("gamma", 0.99), ("gae_lambda", 0.8))
    for wanted in (2, 7):
        swept, alone = swept_and_alone(sweep, wanted)
        assert same(swept, alone)
    state = sweep.scheme.select(sweep.scheme.init(sweep.keys), [7, 0])  # a lane takes its schedule along
    state, _ = run(sweep.scheme, state, 5)
    assert state.weights.hyper["lr"].tolist() == pytest.approx([1e-2 - 9e-3 * 128 / 400, 1e-2])


def test_random_search_draws_by_key():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    space = {"lr": fnrl.LogUniform(1e-5, 1e-1), "entropy_coef": fnrl.Uniform(0.0, 0.1), "clip": [0.1, 0.2]}
    sweep = fnrl.sweep(scheme, samples=400, **space)
    again = fnrl.sweep(scheme, samples=400, **dict(reversed(space.items())))
    assert [dict(s) for s in sweep.settings] == [dict(s) for s in again.settings]
    assert sweep.settings != fnrl.sweep(scheme, samples=400, key=fnrl.key(1), **space).settings
    lr, entropy, clip = (np.array([dict(s)[n] for s in sweep.settings]) for n in space)
    assert (lr.min() >= 1e-5) & (lr.max() < 1e-1)
    assert abs(np.log10(lr).mean() + 3) < 0.2
    assert abs(entropy.mean() - 0.05) < 0.005
    assert 150 < (clip == 0.1).sum() < 250


def test_what_cannot_be_swept_is_refused_by_name():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    for name in ("minibatches", "steps", "hidden", "clip_value"):
        with pytest.raises(fnrl.CompositionError, match=rf"\.{name} shapes the program.*run a program for each value"):
            fnrl.sweep(scheme, **{name: [2, 4]})
    for given, told in (
        ({"lrr": [1.0]}, "did you mean 'lr'"),
        ({"target_kl": [0.1]}, "switched off"),
        ({"gamma": [0.9, 1.5]}, r"gamma \(lane 1\) = 1.5 is out of range"),
        ({"lr": []}, "at least one value"),
        ({}, "at least one hyper-parameter"),
        ({"lr": fnrl.Uniform(0, 1)}, "samples=16"),
        ({"lr": [1e-3], "seeds": 0}, "at least one seed"),
        ({"lr": [1e-3], "samples": 0}, "samples=0"),
    ):
        with pytest.raises(ValueError, match=told):
            fnrl.sweep(scheme, **given)
    for given in (1e-3, "1e-3"):
        with pytest.raises(TypeError, match="a sequence of values"):
            fnrl.sweep(scheme, lr=given)
    sweep = fnrl.sweep(scheme, lr=[1e-3, 1e-4])
    for keys, have in ((fnrl.seeds(3), "3 lanes"), (fnrl.key(0), "one seed")):
        with pytest.raises(fnrl.CompositionError, match=f"lr has values for 2 lanes, the run has {have}"):
            sweep.scheme.init(keys)


def test_set_takes_a_number_for_each_lane():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    state = scheme.set(scheme.init(fnrl.seeds(2)), lr=[1e-3, 2e-3], gamma=0.5)
    assert state.weights.hyper["lr"].tolist() == pytest.approx([1e-3, 2e-3])
    assert state.weights.hyper["gamma"].tolist() == [0.5, 0.5]
    for wrong in ([1e-3], [1e-3] * 3, [1e-3, -1.0]):
        with pytest.raises(ValueError, match="lr"):
            scheme.set(state, lr=wrong)


def test_a_sweep_larger_than_memory_is_refused_with_the_estimate(monkeypatch):
    scheme = fnrl.Scheme(parts(), SIMPLE)
    one = fnrl.lanes.lane_bytes(scheme.parts, SIMPLE)
    held = 4 * (3 * 107 + 2)  # parameters and two moments of 107 numbers, and the ages of two groups
    assert one == 3 * (held + 32 * 4 * (2 * 16 + 8 + 16 + 2))
    monkeypatch.setattr("fnrl.lanes.available", lambda device: 10 * one)
    scheme.init(fnrl.seeds(10))
    with pytest.raises(fnrl.CompositionError, match=r"11 lanes need about 0.0 GB.*at most 10 lanes of 0.0 MB"):
        scheme.init(fnrl.seeds(11))
    monkeypatch.undo()
    small = fnrl.MLP((8,))
    actor, storage = fnrl.OffPolicyActorCritic(ENV.spec, small, small), fnrl.Replay(capacity=1_000_000)
    scheme = fnrl.Scheme(fnrl.Parts(ENV, actor, fnrl.SAC(), storage), SIMPLE)
    with pytest.raises(fnrl.CompositionError, match=r"100000 lanes need about .* GB, there are"):
        scheme.init(torch.zeros(100_000, 2, dtype=torch.int32))


# -- sharded --------------------------------------------------------------------------------------------------------


def pendulum(topology, executor=None):
    env = fnrl.envs.gym("Pendulum-v1", num_envs=2, max_episode_steps=9)
    small = fnrl.MLP((8,))
    storage = fnrl.Replay(capacity=64, steps=4, warmup=16, prioritised=fnrl.Prioritised())
    p = fnrl.Parts(env, fnrl.OffPolicyActorCritic(env.spec, small, small), fnrl.SAC(batch=8), storage)
    return fnrl.Scheme(p, topology, executor or fnrl.Inline())


@pytest.mark.parametrize("off_policy", [False, True])
def test_shards_have_the_bits_of_one_program(off_policy):
    def scheme_of(topology):
        return pendulum(topology) if off_policy else fnrl.Scheme(parts(), topology)

    whole, split, other = (scheme_of(t) for t in (SIMPLE, sharded(SIMPLE, 2), sharded(SIMPLE, 3)))
    keys = fnrl.seeds(7)
    (a, said), (b, told) = (run(s, s.init(keys), 14) for s in (whole, split))
    assert same(whole.gather(a), split.gather(b))
    assert same(a.weights, b.weights)
    assert same((said.metrics, said.episodes), (told.metrics, told.episodes))
    a, b = (s.set(x, lr=[1e-3 * (i + 1) for i in range(7)]) for s, x in ((whole, a), (split, b)))
    assert same(whole.gather(a), split.gather(b))  # not told to the shards yet
    c = other.restore(split.gather(b))  # a run goes on with other shards
    a, b, c = (run(s, x, 6)[0] for s, x in ((whole, a), (split, b), (other, c)))
    assert same(whole.gather(a), split.gather(b))
    assert same(whole.gather(a), other.gather(c))
    (a, said), (b, told) = whole.step(a, 9), split.step(b, 9)  # one round of calls
    assert same(whole.gather(a), split.gather(b))
    assert same((said.metrics, said.episodes), (told.metrics, told.episodes))
    assert said.lags == told.lags
    few = split.select(b, [6, 0, 3, 1])
    assert same(lane(split.gather(run(split, few, 3)[0]), 2), lane(whole.gather(run(whole, a, 3)[0]), 3))


def test_shards_run_in_ray_cells():
    whole, split = fnrl.Scheme(parts(), SIMPLE), fnrl.Scheme(parts(), sharded(SIMPLE, 2), fnrl.Ray())
    a, b = (run(s, s.init(fnrl.seeds(4)), 6)[0] for s in (whole, split))
    assert same(whole.gather(a), split.gather(b))
    split.close(b)


def test_what_cannot_be_sharded_is_refused():
    split = fnrl.Scheme(parts(), sharded(SIMPLE, 2))
    for keys in (fnrl.seeds(3), fnrl.seeds([1]), fnrl.key(0)):
        with pytest.raises(fnrl.CompositionError, match=r"at least 4 seeds, or fewer shards"):
            split.init(keys)
    for wrong, told in ((collect, "produces weights"), (WIDE, "workers of its own"), (SIMPLE, "shards = 0")):
        with pytest.raises(fnrl.CompositionError, match=told):
            sharded(wrong, 0 if wrong is SIMPLE else 2)
