"""Wrong compositions fail when they are composed, before an environment starts, naming both sides and what fits."""

import dataclasses

import pytest
import torch

import fnrl
from fnrl import tree
from fnrl.component import component
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.topology import centralised, collect, gradients, synchronous

ENV = fnrl.envs.CartPole(num_envs=4)
ACTOR = fnrl.OnPolicyActorCritic(ENV.spec)


@dataclasses.dataclass(frozen=True)
class ReplayRing:
    """Stands for an off-policy storage."""

    family = "off-policy"


def parts(**changes):
    given = {"env": ENV, "actor": ACTOR, "algo": fnrl.PPO(), "storage": fnrl.GAE(steps=32), **changes}
    return fnrl.Parts(**given)


def test_families_must_agree():
    with pytest.raises(fnrl.CompositionError, match=r"PPO is an on-policy algorithm and ReplayRing is an off-policy"):
        parts(storage=ReplayRing())
    with pytest.raises(
        fnrl.CompositionError, match=r"storage=<class.*is not a component.*pass a value such as PPO\(\)"
    ):
        parts(storage=object)


PENDULUM = EnvSpec("made up", Box((3,)), Box((1,), -2.0, 2.0))


def off_policy(**changes):
    """Parts of SAC on CartPole, but for what is changed."""
    given = {"env": ENV, "actor": fnrl.OffPolicyActorCritic(ENV.spec), "algo": fnrl.SAC(), "storage": fnrl.Replay()}
    return fnrl.Parts(**{**given, **changes})


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        (lambda: off_policy(storage=fnrl.GAE()), "SAC is an off-policy algorithm and GAE is an on-policy storage"),
        (lambda: off_policy(actor=ACTOR), "OnPolicyActorCritic is an on-policy actor: SAC needs an off-policy actor"),
        (lambda: off_policy(scale_reward=fnrl.ScaleReward()), "scale_reward changes with time.*leave it out"),
        (lambda: off_policy(algo=fnrl.DDPG()), r"DDPG needs Box actions, .* takes Discrete.*use DQN or SAC"),
        (lambda: off_policy(algo=fnrl.DQN()), r"no use for a policy: pass OffPolicyActorCritic\(\.\.\., policy=None"),
        (
            lambda: off_policy(actor=fnrl.OffPolicyActorCritic(ENV.spec, policy=None), algo=fnrl.DQN()),
            "DQN has one critic, the actor has 2: pass critics=1",
        ),
        (
            lambda: off_policy(actor=fnrl.OffPolicyActorCritic(ENV.spec, policy=None)),
            "SAC needs a stochastic policy",
        ),
        (lambda: fnrl.OffPolicyActorCritic(ENV.spec, stochastic=False), "deterministic policy needs Box actions"),
        (lambda: fnrl.OffPolicyActorCritic(ENV.spec, explore=fnrl.Gaussian()), r"use EpsilonGreedy\(\)"),
        (lambda: fnrl.OffPolicyActorCritic(PENDULUM, policy=None), "needs a policy network"),
        (lambda: fnrl.OffPolicyActorCritic(PENDULUM, duelling=True), "duelling critics are for Discrete"),
        (lambda: fnrl.OffPolicyActorCritic(EnvSpec("x", Box((3,)), Box((1,)))), "has none"),
    ],
    ids=range(12),
)
def test_off_policy_parts_that_do_not_fit(compose, message):
    with pytest.raises(fnrl.CompositionError, match=message):
        compose()


def test_actor_and_environment_must_agree():
    other = EnvSpec("other", Box((3,)), Discrete(2))
    with pytest.raises(fnrl.CompositionError, match=r"the actor was made for.*other.*the environment is.*CartPole-v1"):
        parts(actor=fnrl.OnPolicyActorCritic(other))


def test_normalising_what_has_no_mean():
    for obs in (Discrete(3), Box((4, 4, 3), 0.0, 255.0, "uint8")):
        env = dataclasses.replace(ENV)
        object.__setattr__(env, "__class__", type("Other", (type(ENV),), {"spec": EnvSpec("x", obs, Discrete(2))}))
        with pytest.raises(fnrl.CompositionError, match="normalise_obs needs a float Box"):
            parts(env=env, actor=fnrl.OnPolicyActorCritic(env.spec), normalise_obs=fnrl.NormaliseObs())


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        (
            lambda: gradients(gradients(collect)),
            r"gradients takes a node that produces rollouts \(such as collect\), got",
        ),
        (
            lambda: centralised(collect),
            r"centralised takes a node that produces updates \(such as gradients\(collect\)\)",
        ),
        (lambda: centralised(centralised(gradients(collect))), r"which produces weights"),
        (lambda: synchronous(centralised(gradients(collect)), 2), r"produces rollouts or updates"),
        (lambda: gradients(fnrl.PPO()), r"gradients takes a node such as collect or gradients\(collect\), got PPO"),
        (lambda: synchronous(collect, 0), r"workers = 0, expected an int of at least 1"),
        (lambda: synchronous(collect, -3), r"workers = -3"),
        (lambda: synchronous(collect, True), r"workers = True"),
        (lambda: synchronous(collect, 2.0), r"workers = 2.0"),
        (
            lambda: fnrl.Scheme(parts(), gradients(collect)),
            r"applies updates.*got gradients\(collect\), which produces upd",
        ),
        (lambda: fnrl.Scheme(parts(), "a3c"), r"a scheme's topology applies updates.*got 'a3c'"),
        (lambda: fnrl.Ray(collect=fnrl.Resources(cpus=-1)), r"cpus = -1"),
        (lambda: fnrl.Resources(cpus=0.00001), r"cpus = 1e-05, expected a number, 0\.0001 or more"),
        (lambda: fnrl.Resources(gpus="1"), r"gpus = '1', expected a number, 0\.0001 or more, or 0"),
        (lambda: fnrl.Resources(custom=3), r"custom = 3, expected a mapping such as \{'simulator': 1\}"),
        (lambda: fnrl.Resources(custom="arm"), r"custom = 'arm', expected a mapping"),
        (lambda: fnrl.Resources(custom={"GPU": 1}), r"'GPU'.*a name of Ray's own: use gpus="),
        (lambda: fnrl.Ray(object_store="2GB"), r"Ray\.object_store = '2GB': expected bytes, 78643200 or more"),
        (lambda: fnrl.Ray(object_store=1), r"Ray\.object_store = 1: expected bytes"),
        (lambda: fnrl.Ray(address=5), r"Ray\.address = 5: expected 'host:port', 'auto' or None"),
        (lambda: fnrl.Ray(deadline=0), r"Ray\.deadline = 0: expected seconds, 1\.0 or more"),
        (lambda: fnrl.schemes.named(3), r"no scheme 3; there are: a2c"),
    ],
)
def test_nodes_that_do_not_fit(compose, message):
    with pytest.raises(fnrl.CompositionError, match=message):
        compose()


def test_batch_sizes_are_checked_through_the_topology():
    three = parts(algo=fnrl.PPO(minibatches=3))
    with pytest.raises(fnrl.CompositionError, match=r"minibatches=3 does not divide 32 steps x 4 environments = 128"):
        fnrl.Scheme(three, centralised(gradients(collect)))
    fnrl.Scheme(three, centralised(gradients(synchronous(collect, 3))))  # 384 samples
    with pytest.raises(fnrl.CompositionError, match=r"x 4 environments"):
        fnrl.Scheme(three, centralised(synchronous(gradients(collect), 3)))  # three updates of 128 each


def test_print_shows_the_scheme():
    shown = "centralised(synchronous(gradients(synchronous(collect, workers=2)), workers=3))"
    assert repr(centralised(synchronous(gradients(synchronous(collect, 2)), 3))) == shown


def test_names_and_ranges_of_hyperparameters():
    with pytest.raises(TypeError, match=r"PPO has no parameter 'learning_rate'"):
        fnrl.PPO(learning_rate=1e-3)
    with pytest.raises(TypeError, match=r"PPO has no parameter 'cilp'; did you mean 'clip'\?"):
        fnrl.PPO(cilp=0.2)
    for bad in ({"gamma": 1.5}, {"lr": -1.0}, {"clip": 0.0}, {"lr": float("nan")}, {"epochs": 0}, {"minibatches": 0}):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=rf"PPO.{name} = {value!r} is out of range: expected a value in"):
            fnrl.PPO(**bad)
    with pytest.raises(TypeError, match=r"PPO.epochs must be an int, got float 2.0"):
        fnrl.PPO(epochs=2.0)
    with pytest.raises(TypeError, match=r"PPO.lr must be a float or a Schedule, got str '3e-4'"):
        fnrl.PPO(lr="3e-4")
    with pytest.raises(ValueError, match=r"an end of its schedule"):
        fnrl.PPO(gamma=fnrl.Linear(0.9, 1.1, steps=10))
    with pytest.raises(ValueError, match="out of range"):
        fnrl.envs.CartPole(num_envs=0)
    with pytest.raises(ValueError, match=r"MLP.hidden = \(0,\)"):
        fnrl.MLP((0,))


def test_networks_that_do_not_fit_the_observation():
    with pytest.raises(fnrl.CompositionError, match=r"CNN takes images \[H, W, C\], got observations of shape \(4,\)"):
        fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.CNN())


def test_composing_starts_no_environment():
    class Never(fnrl.envs.CartPole):
        def init(self, key):
            raise AssertionError("an environment was started")

    env = Never(num_envs=4)
    scheme = fnrl.Scheme(parts(env=env), centralised(gradients(collect)))
    with pytest.raises(AssertionError, match="was started"):
        scheme.init(fnrl.key(0))


def test_keys_and_counts_of_updates_are_checked():
    scheme = fnrl.Scheme(parts(), centralised(gradients(collect)))
    with pytest.raises(ValueError, match=r"init takes a key \[2\] or keys \[S, 2\]"):
        scheme.init(torch.zeros(3, dtype=torch.int32))
    state = scheme.init(fnrl.key(0))
    with pytest.raises(ValueError, match="expected at least 1"):
        scheme.step(state, updates=0)


@component
class Poisoned(fnrl.envs.CartPole):
    """Pays what is no number when an episode ends."""

    pays: str = "nan"

    def step(self, state, action, noise):
        state, step = super().step(state, action, noise)
        reward = torch.where(step.terminated | step.truncated, float(self.pays), step.reward)
        return state, dataclasses.replace(step, reward=reward)


@pytest.mark.parametrize("pays", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("lanes", [False, True])
def test_a_reward_that_is_not_finite_names_where(lanes, pays):
    env = Poisoned(num_envs=4, time_limit=9, pays=pays)
    scheme = fnrl.Scheme(parts(env=env), centralised(gradients(collect)))
    state = scheme.init(torch.stack([fnrl.key(0), fnrl.key(1)]) if lanes else fnrl.key(0))
    where = "lane 0, environment [0-3]" if lanes else "environment [0-3]"
    with pytest.raises(fnrl.NonFiniteError, match=rf"reward is not finite: CartPole-v1, {where}, step 8 of rollout 0"):
        scheme.step(state)
    assert tree.non_finite(state) == []
