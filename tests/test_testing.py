"""The kit itself: a component with one fault breaks one law, and the message says which, and in whose name."""

import dataclasses
import importlib
import random as python_random
from pathlib import Path

import faulty_components as bad
import faulty_environments as bad_envs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fnrl
from fnrl import random, testing, tree
from fnrl.envs import CartPole, GymVector
from fnrl.manifest import decode, encode
from fnrl.networks import GRU, MLP
from fnrl.spaces import Box, EnvSpec
from fnrl.storages import GAE
from fnrl.testing import LawError, actor, algorithm, environment, laws, node, storage, strategies

BOX = EnvSpec("made up", Box((3,)), Box((2,), -1.0, 1.0))

# -- environments ---------------------------------------------------------------------------------------------------


def caught(check, component, law, evidence, **options):
    with pytest.raises(LawError) as found:
        check(component, **options)
    message = str(found.value)
    name = type(component).__qualname__
    assert f"breaks the law '{law}'" in message
    assert name in message
    assert evidence in message.split(law, 1)[1]


ENVIRONMENTS = [
    (bad_envs.TorchDraws, laws.QUIET, "torch"),
    (bad_envs.NumpyDraws, laws.QUIET, "numpy"),
    (bad_envs.PythonDraws, laws.QUIET, "Python"),
    (bad_envs.WritesItsInput, laws.PURE, "state.inside.steps"),
    (bad_envs.ChangesItsInput, laws.PURE, "action"),
    (bad_envs.Counts, laws.SAME, "reward"),
    (bad_envs.ResetIsSuccessor, environment.SUCCESSOR, "after the reset"),
    (bad_envs.GoesOnFromElsewhere, environment.FOLLOWS, "at step 0"),
    (bad_envs.OneNoiseForAll, environment.ENVIRONMENTS, "environments 0 and 1"),
    (bad_envs.AlwaysTheSameStart, environment.EPISODES, "random_resets=False"),
    (bad_envs.IgnoresItsKey, laws.KEYS, "10 keys"),
    (bad_envs.DoubleReward, laws.SHAPES, "float32"),
    (bad_envs.NoReward, laws.FINITE, "reward"),
    (bad_envs.ReadsATensor, laws.SOLO, "vmap"),
    (bad_envs.FeelsOtherLanes, laws.LANES, "reward"),
    (bad_envs.HidesAnObject, laws.SAVED, "inside.note"),
    (bad_envs.OtherwiseInAGraph, laws.COMPILED, "2.0, not the 1.0"),
    (bad_envs.Thawed, laws.VALUE, "num_envs can be set"),
    (bad_envs.local(), laws.VALUE, "pickle"),
]


@pytest.mark.parametrize(("fault", "law", "evidence"), ENVIRONMENTS, ids=lambda x: getattr(x, "__name__", ""))
def test_faults_of_environments_are_caught(fault, law, evidence):
    options = {"steps": 60, "max_examples": 1, "compiled": law == laws.COMPILED}
    caught(testing.check_environment, fault(num_envs=3, time_limit=9), law, evidence, **options)


def test_an_environment_that_never_ends_shows_nothing():
    with pytest.raises(
        ValueError, match="2 episodes ended in 9 steps of 2 environments, and the laws of ends need 10: pass steps=100"
    ):
        testing.check_environment(CartPole(num_envs=2, time_limit=6), steps=9)


def hosted(kind=GymVector, env=bad_envs.Random, **options):
    made = fnrl.envs.gym(env, num_envs=2, **options)
    return kind(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})


def test_faults_of_simulators_are_caught():
    testing.check_environment(hosted(), steps=32, max_examples=1)
    faults = [
        (hosted(env=bad_envs.Unseeded, exact=False), laws.SAME, "obs of one walk"),
        (hosted(bad_envs.Restarts), environment.RESTORED, "obs of the restored simulator's walk"),
        (hosted(bad_envs.StepsTheStale), laws.STALE, "StaleStateError"),
        (hosted(bad_envs.NeverCloses), environment.CLOSED, "StaleStateError"),
    ]
    for env, law, evidence in faults:
        caught(testing.check_environment, env, law, evidence, steps=32, max_examples=1)


# -- actors ---------------------------------------------------------------------------------------------------------


def test_the_actor_that_the_faults_are_made_of_is_sound():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()
    testing.check_actor(bad.Actor(BOX, MLP((5,)), MLP((5,)), recurrent=GRU(4)), max_examples=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), python_random.getstate()) == before[1:]


ACTORS = [
    (bad.Epsilon, laws.QUIET, "torch"),
    (bad.DoesNotRecur, actor.AGREE, "memory of evaluate"),
    (bad.MissesStarts, actor.AGREE, "logp of evaluate"),
    (bad.RemembersBirth, actor.BLANK, "not zero"),
    (bad.Unclipped, actor.INSIDE, "Box"),
    (bad.Gossips, actor.APART, "alone"),
    (bad.SameParameters, laws.KEYS, "init"),
    (bad.SameNoise, laws.KEYS, "noise"),
    (bad.DeadPolicy, actor.MOVES, "policy.head.weight"),
    (bad.Vertical, laws.FINITE, "gradient"),
    (bad.Wide, laws.SHAPES, "logp"),
]


@pytest.mark.parametrize(("fault", "law", "evidence"), ACTORS, ids=lambda x: getattr(x, "__name__", ""))
def test_faults_of_actors_are_caught(fault, law, evidence):
    made = fault(BOX, MLP((5,)), MLP((5,)), recurrent=GRU(4))
    caught(testing.check_actor, made, law, evidence, max_examples=4)


def test_a_lambda_is_not_a_value():
    made = bad.Actor(BOX, MLP((5,), lambda x: x))
    caught(testing.check_actor, made, laws.VALUE, "pickle")


# -- storages -------------------------------------------------------------------------------------------------------


STORAGES = [
    (bad.TimeLimitIsTheEnd, storage.TIME_LIMIT, "truncated=True"),
    (bad.TheEndIsATimeLimit, storage.TERMINAL, "next_obs"),
    (bad.RolloutEndIsTheEnd, storage.CUT, "step 3 of"),
    (bad.RunsOn, storage.LEAK, "reward"),
    (bad.BootstrapsFromTheReset, storage.TIME_LIMIT, "next_obs"),
    (bad.UsesOneTwice, storage.ONCE, "logp"),
    (bad.ScalesObservations, storage.ONCE, "obs"),
    (bad.Overwrites, storage.WHOLE, "append"),
    (bad.AlwaysReady, storage.HOLDS, "init"),
    (bad.NeverShuffles, storage.ORDERS, "two keys"),
    (bad.TakesAnyPlan, storage.DIVIDES, "CompositionError"),
    (bad.ScalesInPlace, laws.PURE, "state.rollout.steps.reward"),
]


@pytest.mark.parametrize(("fault", "law", "evidence"), STORAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_faults_of_storages_are_caught(fault, law, evidence):
    caught(testing.check_storage, fault(steps=4), law, evidence, max_examples=8)


# -- algorithms -----------------------------------------------------------------------------------------------------


ALGORITHMS = [
    (bad.Uphill, algorithm.GRADIENT, "torch.autograd"),
    (bad.ForgetsABatch, algorithm.GRADIENT, "grad at [0] is 0.0"),
    (bad.LooksDownhill, algorithm.DOWNHILL, "against a gradient"),
    (bad.PerSample, algorithm.SCALAR, "ratio"),
    (bad.Drops, laws.QUIET, "torch"),
    (bad.NeverStops, algorithm.MASKED, "a KL above"),
    (bad.MovesWhenStopped, algorithm.MASKED, "1.mean"),
    (bad.InPlace, laws.PURE, "grads"),
    (bad.Ascends, algorithm.LEARNS, "not negative"),
    (bad.NeverRests, algorithm.STANDS, "vector"),
    (bad.Silent, algorithm.TELLS, "approx_kl"),
    (bad.Divides, laws.FINITE, "gradient"),
]


@pytest.mark.parametrize(("fault", "law", "evidence"), ALGORITHMS, ids=lambda x: getattr(x, "__name__", ""))
def test_faults_of_algorithms_are_caught(fault, law, evidence):
    made = fault(target_kl=0.01, max_grad_norm=None)
    caught(testing.check_algorithm, made, law, evidence)


# -- nodes ----------------------------------------------------------------------------------------------------------


def test_hidden_state_of_a_run_is_caught():
    env = CartPole(num_envs=2, time_limit=5)
    who = fnrl.OnPolicyActorCritic(env.spec, MLP((4,)), MLP((4,)))
    parts = fnrl.Parts(env, who, bad.Moody(epochs=1, minibatches=2), GAE(steps=4))
    with pytest.raises(LawError, match=rf"centralised\(gradients\(collect\)\) breaks the law '{node.RESUMED}'"):
        testing.check_node(fnrl.collect, parts, max_examples=1)


# -- strategies -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(testing.trees() | testing.records())
def test_trees_are_taken_apart_and_saved(x):
    leaves, structure = tree.flatten(x)
    assert tree.same_bits(tree.unflatten(structure, leaves), x)
    assert len(tree.paths(x)) == len(leaves)
    assert tree.same_bits(tree.to_torch(tree.to_numpy(x)), x)
    made, tensors, _ = encode(x)
    assert tree.same_bits(decode(made, dict(tensors), {}.__getitem__), x)  # it has no pieces
    for i, leaf in enumerate(leaves):
        if leaf.numel():
            other = leaf.clone(memory_format=torch.contiguous_format)
            other.view(-1)[:1] = ~other.view(-1)[:1] if leaf.dtype == torch.bool else other.view(-1)[:1] + 1
            changed = tree.unflatten(structure, [*leaves[:i], other, *leaves[i + 1 :]])
            assert tree.different_bits(x, changed) == [tree.paths(x)[i][0]]


def test_rollouts_hold_ends_of_every_kind_and_true_successors():
    found = set()

    @settings(max_examples=80)
    @given(testing.specs().flatmap(lambda spec: testing.rollouts(spec, memory=2)))
    def law(rollout):
        steps = rollout.steps
        done = steps.terminated | steps.truncated
        found.update(zip(steps.terminated.flatten().tolist(), steps.truncated.flatten().tolist(), strict=True))
        assert len(torch.unique(steps.logp)) == done.numel() == rollout.env_steps
        assert torch.equal(steps.next_obs[:-1][~done[:-1]], steps.obs[1:][~done[:-1]])
        assert not steps.memory[1:][done[:-1]].any()

    law()
    assert found == {(False, False), (False, True), (True, False), (True, True)}


@settings(max_examples=40)
@given(spec=testing.specs(), seed=st.integers(0, 99))
def test_the_actor_takes_any_space(spec, seed):
    who = fnrl.OnPolicyActorCritic(spec, MLP((3,)), MLP((3,)))
    obs = strategies.observations(spec.obs, (2,), seed)
    params, memory = who.init(random.key(seed)), who.memory(2)
    action, env_action, logp, _ = who.act(params, obs, memory, tree.index(who.noise(random.key(seed), 1, 2), 0))
    actor._check_inside(who, spec.action, env_action)
    assert env_action.shape == (2, *spec.action.shape)
    starts = torch.zeros(1, 2, dtype=torch.bool)
    again = who.evaluate(params, obs[None], memory, starts, action[None])[0][0]
    torch.testing.assert_close(again, logp)


@given(testing.keys(), testing.spaces())
def test_keys_and_spaces(key, space):
    assert (key.shape, key.dtype) == ((2,), torch.int32)
    assert hash(space) == hash(dataclasses.replace(space))
    for make in (strategies.observations, strategies.env_actions):
        assert make(space, (3,), 0).shape == (3, *space.shape)


# -- the example ----------------------------------------------------------------------------------------------------


def test_the_example_of_a_users_own_component_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    module = importlib.import_module("test_your_component")
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()
