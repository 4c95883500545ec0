"""What doesn't fit is refused where it is written, by a typed error that says what would."""

import math
from typing import ClassVar, Literal, Protocol

import pytest
import torch
from torch import nn

import fnrl
from fnrl.component import component, option
from fnrl.topology import Centralised, Collect

ENV = fnrl.envs.CartPole(num_envs=2)
ACTOR = fnrl.OnPolicyActorCritic(ENV.spec)
TOPOLOGY = fnrl.centralised(fnrl.gradients(fnrl.collect))


@component
class NoFamily(fnrl.Algorithm):
    lr: float = fnrl.hyper(default=1e-3, help="learning rate")


@component
class NoDiscount(fnrl.Algorithm):
    family: ClassVar[str] = "on-policy"

    lr: float = fnrl.hyper(default=1e-3, help="learning rate")


def parts(**changes):
    return fnrl.Parts(**{"env": ENV, "actor": ACTOR, "algo": fnrl.PPO(), "storage": fnrl.GAE(), **changes})


def scheme(**changes):
    return fnrl.Scheme(**{"parts": parts(), "topology": TOPOLOGY, **changes})


@pytest.mark.parametrize(
    ("write", "error", "told"),
    [
        # another type
        (
            lambda: parts(normalise_obs=True),
            TypeError,
            r"Parts.normalise_obs = True: expected NormaliseObs\(...\) or None",
        ),
        (lambda: parts(env="CartPole-v1"), TypeError, r"CartPole\(...\) or GymVector\(...\)"),
        (lambda: fnrl.MLP(activation="relu"), TypeError, "MLP.activation = 'relu': expected a function, such as tanh"),
        (lambda: fnrl.MLP(activation=torch.softmax), TypeError, "can't be called with a tensor alone"),
        (lambda: fnrl.MLP(activation=nn.ReLU), TypeError, "can't be called with a tensor alone"),
        (lambda: fnrl.MLP(activation=nn.ReLU()), TypeError, "such as torch.nn.functional.relu"),
        (lambda: fnrl.MLP(activation=torch.sum), TypeError, "from a tensor to one of its shape"),
        (lambda: fnrl.MLP(64), TypeError, r"MLP.hidden = 64: expected a tuple, such as \(64, 64\)"),
        (lambda: fnrl.MLP([64]), TypeError, "expected a tuple"),
        (lambda: fnrl.MLP((64, "64")), TypeError, "expected a tuple"),
        (lambda: fnrl.PPO(optimiser="adam"), TypeError, r"RMSProp\(...\) or SGD\(...\); did you mean Adam\(\)\?"),
        (lambda: fnrl.PPO(clip_value=1), TypeError, "expected True or False"),
        (lambda: fnrl.Linear(1e-3, math.nan), TypeError, "Linear.end = nan: expected a finite number"),
        (lambda: fnrl.Linear("1e-3", 0.0), TypeError, "expected a finite number"),
        (lambda: fnrl.SAC(target_entropy=math.inf), TypeError, "expected a finite number or None"),
        (lambda: fnrl.OnPolicyActorCritic(ENV), TypeError, "expected EnvSpec"),
        (
            lambda: fnrl.OnPolicyActorCritic(ENV.spec, policy=nn.Linear(4, 8)),
            TypeError,
            r"expected a network as a value: fnrl.module\(Linear, ...\), the class and its keyword arguments",
        ),
        (lambda: parts(algo=NoFamily()), fnrl.CompositionError, r"family: ClassVar\[str\] = ... in NoFamily"),
        (lambda: parts(algo=NoDiscount()), fnrl.CompositionError, "NoDiscount has no hyper-parameter gamma: declare"),
        (lambda: fnrl.OnPolicyActorCritic(ENV.spec, recurrent=True), TypeError, r"expected GRU\(...\) or None"),
        (lambda: fnrl.Replay(prioritised=True), TypeError, r"expected Prioritised\(...\) or None"),
        (lambda: fnrl.Evaluate(env="CartPole-v1"), TypeError, r"GymVector\(...\) or None"),
        (lambda: fnrl.GRU(0), ValueError, "GRU.size = 0 is out of range"),
        (lambda: fnrl.CNN(filters=(32, 64)), ValueError, "of one length"),
        (lambda: fnrl.CNN(strides=(4, 2, 0)), ValueError, "positive ints"),
        (lambda: fnrl.module("MLP"), TypeError, "expected a class"),
        (lambda: fnrl.module(int), TypeError, "expected a class"),
        (lambda: fnrl.Learner(parts(), 100), TypeError, r"takes a Scheme\(parts, topology\)"),
        (lambda: fnrl.Learner(scheme(), 100, evaluation=True), TypeError, r"expected Evaluate\(...\) or None"),
        # a class in place of a value
        (lambda: parts(algo=fnrl.PPO), fnrl.CompositionError, r"pass a value such as PPO\(\), not a class"),
        (lambda: parts(env=fnrl.envs.CartPole), TypeError, r"a value such as CartPole\(\), not a class"),
        (lambda: parts(scale_reward=fnrl.ScaleReward), TypeError, r"a value such as ScaleReward\(\), not a class"),
        (lambda: fnrl.PPO(optimiser=fnrl.Adam), TypeError, r"a value such as Adam\(\), not a class"),
        (lambda: fnrl.PPO(lr=fnrl.Linear), TypeError, "must be a float or a Schedule"),
        (lambda: fnrl.gradients(Collect), fnrl.CompositionError, "takes a node such as collect"),
        (lambda: scheme(topology=Centralised), fnrl.CompositionError, "topology applies updates"),
        (lambda: scheme(parts=fnrl.Parts), fnrl.CompositionError, "is made of Parts"),
        (lambda: scheme(executor=fnrl.Ray), fnrl.CompositionError, r"expected a value such as Inline\(\) or Ray\(\)"),
        (lambda: scheme(executor="ray"), fnrl.CompositionError, r"expected a value such as Inline\(\) or Ray\(\)"),
        (lambda: fnrl.collect(), fnrl.CompositionError, r"write gradients\(collect\), without brackets"),
        (lambda: fnrl.centralised(fnrl.gradients), fnrl.CompositionError, "takes a node such as"),
        # devices and keys
        (lambda: scheme(device="gpu"), fnrl.CompositionError, "device='gpu' can't be used .*expected one of cpu"),
        (lambda: scheme(device="meta"), fnrl.CompositionError, "expected one of cpu"),
        (lambda: scheme(device=0), fnrl.CompositionError, "expected one of cpu"),
        (lambda: scheme().init(7), ValueError, r"as fnrl.key\(7\) makes them; got 7"),
        (lambda: scheme().init(torch.zeros(2)), ValueError, r"got torch.float32\[2\]"),
        (lambda: scheme().init(fnrl.key(0)[:1]), ValueError, r"got torch.int32\[1\]"),
    ],
)
def test_it_is_refused_where_it_is_written(write, error, told):
    with pytest.raises(error, match=told):
        write()


def test_what_fits_is_taken():
    parts(normalise_obs=fnrl.NormaliseObs(), scale_reward=None)
    fnrl.MLP((), torch.nn.functional.silu)
    fnrl.Linear(1, 0)
    fnrl.SAC(target_entropy=-3)
    fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.module(nn.Linear, in_features=4, out_features=3))


class Vague(Protocol):
    def act(self) -> int: ...


@component
class Loose:
    """Fields of types that can't be checked, and of a component of one's own."""

    mode: Literal["a", "b"] = option(default="a", help="")
    actor: Vague | None = option(default=None, help="")
    inside: "Loose | None" = option(default=None, help="")


def test_components_of_ones_own_are_checked_as_far_as_can_be():
    assert Loose("b", actor=3, inside=Loose()).inside == Loose()
    with pytest.raises(TypeError, match=r"Loose\.inside = 3: expected Loose or None"):
        Loose(inside=3)


def test_a_type_of_a_local_scope_is_not_checked():
    class Local:
        pass

    @component
    class Held:
        """Its type has no name where the module ends."""

        inside: "Local" = option(help="")

    assert Held(3).inside == 3
