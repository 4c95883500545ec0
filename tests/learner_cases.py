"""A small learner on pure CartPole, for the tests of it."""

import pytest

import fnrl
from fnrl import logs
from fnrl.topology import centralised, collect, gradients

ENV = fnrl.envs.CartPole(num_envs=4, time_limit=20)
SIMPLE = centralised(gradients(collect))
PLAN, STEPS = 8, 128  # updates and environment steps of one plan


@pytest.fixture
def tensorboard():
    """Asks for TensorBoard and the picture."""


@pytest.fixture(autouse=True)
def light(monkeypatch, request):
    """A writer's thread per learner is slow; one test has it on."""
    if "tensorboard" not in request.fixturenames:

        def missing(*_):
            raise ImportError

        monkeypatch.setattr(logs, "TensorBoard", missing)
        monkeypatch.setattr(fnrl.plots, "curve", lambda directory: None)


def parts(recurrent=False, algo=fnrl.PPO, **ppo):
    actor = fnrl.OnPolicyActorCritic(
        ENV.spec, policy=fnrl.MLP((8,)), value=fnrl.MLP((8,)), recurrent=fnrl.GRU(4) if recurrent else None
    )
    algo = algo(**{"minibatches": 2, **ppo})
    return fnrl.Parts(ENV, actor, algo, fnrl.GAE(steps=32), normalise_obs=fnrl.NormaliseObs())


def scheme(**kwargs):
    return fnrl.Scheme(parts(**kwargs), SIMPLE)


def quiet(s, steps, log_dir=None, **kwargs):
    return fnrl.Learner(s, steps, log_dir, **kwargs)


def bits(learner):
    return learner.scheme.gather(learner.state)
