"""The laws of a run on pure CartPole: pure, resumable, the same anywhere, lanes apart.

Episodes end, time limits cut and plans turn over in every window here (episodes of at most 20 steps, rollouts of 32,
plans of 8 updates).
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fnrl
from fnrl import graphs, tree
from fnrl.apply import apply_update
from fnrl.component import component
from fnrl.lift import Run
from fnrl.topology import centralised, collect, gradients, synchronous
from fnrl.types import Update

ENV = fnrl.envs.CartPole(num_envs=4, time_limit=20)


def parts(recurrent: bool = False, **ppo: object) -> fnrl.Parts:
    actor = fnrl.OnPolicyActorCritic(
        ENV.spec, policy=fnrl.MLP((16,)), value=fnrl.MLP((16,)), recurrent=fnrl.GRU(8) if recurrent else None
    )
    algo = fnrl.PPO(**{"minibatches": 2, **ppo})
    return fnrl.Parts(
        ENV, actor, algo, fnrl.GAE(steps=32), normalise_obs=fnrl.NormaliseObs(), scale_reward=fnrl.ScaleReward()
    )


SIMPLE = centralised(gradients(collect))
WIDE = centralised(synchronous(gradients(synchronous(collect, 2)), 2))


def run(scheme, state, updates):
    for _ in range(updates):
        state, _ = scheme.step(state)
    return state


def assert_same(scheme, a, b):
    assert tree.different_bits(scheme.gather(a), scheme.gather(b)) == []


@pytest.mark.parametrize("recurrent", [False, True])
def test_step_is_pure_and_repeatable(recurrent):
    scheme = fnrl.Scheme(parts(recurrent), SIMPLE)
    state = run(scheme, scheme.init(fnrl.key(0)), 11)
    before = [x.clone() for x in tree.leaves(state)]
    one, two = run(scheme, state, 9), run(scheme, state, 9)
    assert_same(scheme, one, two)
    assert tree.same_bits(before, tree.leaves(state))
    assert not tree.same_bits(one.weights.params.vector, state.weights.params.vector)


@settings(max_examples=8)
@given(n=st.integers(0, 20), m=st.integers(1, 20), topology=st.sampled_from([SIMPLE, WIDE]))
def test_resume_is_exact(n, m, topology):
    scheme = fnrl.Scheme(parts(), topology)
    middle = run(scheme, scheme.init(fnrl.key(1)), n)
    resumed = scheme.restore(scheme.gather(middle))
    assert_same(scheme, run(scheme, middle, m), run(scheme, resumed, m))


def test_fused_updates_are_single_updates():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    state = scheme.init(fnrl.key(2))
    fused, info = scheme.step(state, updates=11)
    assert_same(scheme, fused, run(scheme, state, 11))
    assert len(info.episodes) == 2  # two rollouts fed eleven updates of plans of eight


@pytest.mark.parametrize("recurrent", [False, True])
def test_lanes_are_bit_equal_for_any_count_and_agree_with_solo(recurrent):
    scheme = fnrl.Scheme(parts(recurrent), WIDE)
    keys = torch.stack([fnrl.key(seed) for seed in range(8)])
    eight = run(scheme, scheme.init(keys), 20)
    two = run(scheme, scheme.init(keys[:2]), 20)
    firsts = tree.map(lambda x: x[:2], eight)
    assert tree.different_bits(tree.leaves(firsts), tree.leaves(two)) == []
    solo = run(scheme, scheme.init(keys[1]), 20)
    torch.testing.assert_close(two.weights.params.vector[1], solo.weights.params.vector, rtol=1e-4, atol=1e-6)
    alone = scheme.gather(run(scheme, scheme.init(keys[1]), 1))
    together = tree.map(lambda x: x[1], scheme.gather(run(scheme, scheme.init(keys[:2]), 1)))
    torch.testing.assert_close(together.weights.params.vector, alone.weights.params.vector, rtol=1e-6, atol=1e-7)


def test_lanes_differ_and_a_seed_draws_the_same_in_any_lane():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    a, b = fnrl.key(5), fnrl.key(6)
    ab, ba = (run(scheme, scheme.init(torch.stack(k)), 10) for k in ([a, b], [b, a]))
    assert tree.same_bits(ab.weights.params.vector.flip(0).contiguous(), ba.weights.params.vector)
    assert not tree.same_bits(ab.weights.params.vector[0], ab.weights.params.vector[1])


def test_a_first_minibatch_has_ratio_one():
    scheme = fnrl.Scheme(parts(), WIDE)
    state = scheme.init(fnrl.key(3))
    for update in range(17):
        state, info = scheme.step(state)
        if update % 8 == 0:  # weights, normaliser and all are those the rollout was made with
            assert abs(float(info.metrics["approx_kl"])) < 1e-10
        elif update > 8:
            assert float(info.metrics["approx_kl"]) > 0.0


def test_normaliser_counts_every_observation_once():
    scheme = fnrl.Scheme(parts(), WIDE)
    state, seen = scheme.init(fnrl.key(4)), []
    for update in range(16):
        if update % 8 == 0:
            peek = scheme.step(state)[0]
            workers = peek.node.child.workers
            seen += [w.batches.data.obs for w in workers] if update == 0 else []
        state, _ = scheme.step(state)
    moments = state.weights.normaliser.moments
    assert float(moments.count) == 2 * 2 * 2 * 4 * 32  # plans, gradient workers, collectors, environments, steps
    first = run(scheme, scheme.init(fnrl.key(4)), 8).weights.normaliser.moments
    raw = torch.cat([o.flatten(0, -2) for o in seen]).double()  # the first plan's normaliser is the identity
    torch.testing.assert_close(first.mean, raw.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first.m2 / first.count, raw.var(0, correction=0), rtol=1e-5, atol=1e-9)


def test_env_steps_and_versions_count_what_was_learnt_from():
    scheme = fnrl.Scheme(parts(), WIDE)
    state = run(scheme, scheme.init(fnrl.key(0)), 9)
    assert (state.version, state.env_steps) == (9, 2 * 2 * 2 * 4 * 32)


def test_target_kl_stops_the_rest_of_a_plan():
    scheme = fnrl.Scheme(parts(lr=3e-2, target_kl=1e-3), SIMPLE)
    free = fnrl.Scheme(parts(lr=3e-2), SIMPLE)
    state = scheme.init(fnrl.key(0))
    moved = []
    for _ in range(16):
        after, _ = scheme.step(state)
        moved.append(not tree.same_bits(after.weights.params.vector, state.weights.params.vector))
        state = after
    first, second = moved[:8], moved[8:]
    assert (first[0], second[0]) == (True, True)  # the first update of a plan has KL 0
    assert (first[-1], second[-1]) == (False, False)
    assert first == sorted(first, reverse=True)  # once stopped, stopped until the next plan
    assert state.node.algo.opt.count.tolist() == [sum(moved)] * 2  # Adam's clock stands still as well
    assert run(free, free.init(fnrl.key(0)), 16).version == 16


def test_a_stopped_plan_stays_so_whatever_its_later_updates_say():
    scheme = fnrl.Scheme(parts(target_kl=0.1), SIMPLE)
    algo, run_ = scheme.init(fnrl.key(0)).node.algo, Run(scheme.parts, scheme.executor)
    grads, moved = torch.ones_like(algo.weights.params.vector), []
    for first, kl in ((True, 0.0), (False, 1.0), (False, 0.0), (False, 0.0), (True, 0.0)):
        info = {"loss": torch.tensor(0.0), "approx_kl": torch.tensor(kl)}
        update = Update(grads, info, (), first, False, 0, algo.weights.version)
        after, _ = apply_update(run_, algo, update, ())
        moved.append(not tree.same_bits(after.weights.params.vector, algo.weights.params.vector))
        algo = after
    assert moved == [True, False, False, False, True]


def test_schedules_move_between_plans_and_a_set_value_stays():
    lr = fnrl.Linear(1e-3, 0.0, steps=512)
    scheme = fnrl.Scheme(parts(lr=lr), SIMPLE)
    state = scheme.init(fnrl.key(0))
    seen = []
    for _ in range(17):
        seen.append(float(state.weights.hyper["lr"]))
        state, _ = scheme.step(state)
    assert seen[:8] == pytest.approx([1e-3] * 8)
    assert seen[8:16] == pytest.approx([0.75e-3] * 8)
    assert seen[16] == pytest.approx(0.5e-3)
    state = scheme.set(state, lr=5e-4, clip=0.1)
    state = run(scheme, state, 9)
    assert float(state.weights.hyper["lr"]) == pytest.approx(5e-4)
    assert float(state.weights.hyper["clip"]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="did you mean 'clip'"):
        scheme.set(state, clipp=0.1)
    with pytest.raises(ValueError, match=r"gamma = 1.5 is out of range"):
        scheme.set(state, gamma=1.5)


def test_episode_returns_are_those_of_the_environment():
    scheme = fnrl.Scheme(parts(), SIMPLE)
    state, info = scheme.step(scheme.init(fnrl.key(0)))
    (episodes,) = info.episodes
    assert episodes.end.any()
    ended = episodes.returns[episodes.end]
    assert torch.equal(ended, episodes.lengths[episodes.end].float())  # CartPole pays 1 a step
    assert float(ended.max()) <= 20
    state, info = scheme.step(state, updates=8)
    later = info.episodes[0]
    first_end = later.end.float().argmax(0)
    carried = later.lengths.gather(0, first_end[None])[0]
    assert bool((carried > first_end + 1).any())  # episodes run on from one rollout into the next


class Exploding(fnrl.PPO):
    """Its loss becomes NaN at the given clip."""

    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss / (weights.hyper["clip"] != 0.3).float() - 0 * math.inf, aux


def test_a_loss_that_is_not_finite_stops_before_it_is_applied():
    scheme = fnrl.Scheme(dataclasses.replace(parts(), algo=Exploding(minibatches=2)), SIMPLE)
    state = scheme.init(fnrl.key(0))
    with pytest.raises(fnrl.NonFiniteError, match=r"update 0 at node root is not finite.*loss"):
        scheme.step(state)
    assert tree.non_finite(state) == []


@component
class Leaping(fnrl.SGD):
    """Puts one parameter out of reach at a learning rate of 0."""

    beyond: str = "nan"

    def update(self, grads, state, params, lr, mask=()):
        first = (torch.arange(len(grads)) == 0) & (lr == 0.0)
        return dataclasses.replace(params, vector=torch.where(first, float(self.beyond), params.vector)), state


@pytest.mark.parametrize("beyond", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("lanes", [None, 2])
def test_parameters_that_are_not_finite_are_not_kept(lanes, beyond):
    algo = fnrl.PPO(minibatches=2, lr=fnrl.Linear(1.0, 0.0, steps=64), optimiser=Leaping(beyond=beyond))
    scheme = fnrl.Scheme(dataclasses.replace(parts(), algo=algo), SIMPLE)
    state = scheme.init(fnrl.key(0) if lanes is None else torch.stack([fnrl.key(0), fnrl.key(1)]))
    state = run(scheme, state, scheme.updates)
    where = "" if lanes is None else " in any lane that is left"
    with pytest.raises(fnrl.NonFiniteError, match=rf"update 8 at node root is not finite{where}: .*policy\.0\.weight"):
        scheme.step(state)
    assert tree.non_finite(state) == []


def test_ray_cells_give_the_bits_of_one_process():
    executor = fnrl.Ray(collect=fnrl.Resources(cpus=0.1), gradients=fnrl.Resources(cpus=0.1))
    for topology in (
        centralised(gradients(synchronous(collect, 2))),
        centralised(synchronous(gradients(collect), 2)),
        centralised(synchronous(gradients(synchronous(collect, 2)), 2)),
    ):
        here, there = fnrl.Scheme(parts(), topology), fnrl.Scheme(parts(), topology, executor=executor)
        a, b = run(here, here.init(fnrl.key(7)), 13), run(there, there.init(fnrl.key(7)), 13)
        assert tree.different_bits(here.gather(a), there.gather(b)) == []
        crossed = there.restore(here.gather(a))  # resume on the other executor, mid-plan
        assert tree.different_bits(here.gather(run(here, a, 13)), there.gather(run(there, crossed, 13))) == []
        after, info = there.step(b, updates=8)  # a plan of eight turns over: the cells have moved on
        assert {"time/collect", "time/gradient", "time/apply", "time/wait"} <= info.report.keys()
        assert info.report["time/wait"] > 0.0
        with pytest.raises(fnrl.StaleStateError, match="generation"):
            there.step(b, updates=8)
        there.close(after)
        there.close(crossed)


def test_the_second_update_compiles_nothing():
    scheme, made = fnrl.Scheme(parts(), SIMPLE, compile=True), graphs.SPENT.graphs
    state, _ = scheme.step(scheme.init(fnrl.key(0)))
    assert graphs.SPENT.graphs > made
    made = graphs.SPENT.graphs
    compiled = run(scheme, state, 17)
    assert graphs.SPENT.graphs == made
    eager = fnrl.Scheme(parts(), SIMPLE)
    state = eager.init(fnrl.key(0))
    torch.testing.assert_close(
        run(eager, state, 3).weights.params.vector,
        run(scheme, scheme.init(fnrl.key(0)), 3).weights.params.vector,
        rtol=1e-4,
        atol=1e-6,
    )
    assert compiled.version == 18
