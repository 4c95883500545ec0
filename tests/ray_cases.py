"""Schemes for cells, and what can happen to a cell."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

import fnrl

SMALL = fnrl.Resources(cpus=0.2)
ENV = fnrl.envs.CartPole(num_envs=4, time_limit=20)


def on_policy(env=ENV, steps=32):
    actor = fnrl.OnPolicyActorCritic(env.spec, policy=fnrl.MLP((16,)), value=fnrl.MLP((16,)))
    algo = fnrl.PPO(minibatches=2)
    return fnrl.Parts(env, actor, algo, fnrl.GAE(steps=steps), normalise_obs=fnrl.NormaliseObs())


def off_policy(env):
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((16,)), critics=1)
    return fnrl.Parts(env, actor, fnrl.DQN(batch=16, ratio=1.0), fnrl.Replay(capacity=48, warmup=32))


def on_ray(**options):
    return fnrl.Ray(**{"collect": SMALL, "gradients": SMALL, "snapshot_every": 4, **options})


def owners(tree):
    """The cells behind a state, in worker order."""
    return [w.token.owner for w in tree.workers]


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def faulty(tmp_path, what, steps=16, **options):
    """Parts whose environments do `what`, and the same parts once the mark is there."""
    kwargs = {"what": what, "mark": str(tmp_path / "mark")}
    options = {"processes": what == "die", "deadline": 3.0, **options}
    env = dataclasses.replace(fnrl.envs.gym(Once, num_envs=2, **options), kwargs=tuple(kwargs.items()))
    return on_policy(env, steps)


class Once(gymnasium.Env):
    """An environment that at its fortieth step (`born`: when it is made) does `what`: `hang` or `die`, once, as the
    file `mark` remembers; `raise` or `end` every time. If it is `slow`, the first one that is made is.
    """

    observation_space, action_space = spaces.Box(-10, 10, (2,), np.float32), spaces.Discrete(2)

    def __init__(self, what="", mark=""):
        self.what, self.mark, self.t = what, mark, 0
        self.pace = 0.01 if what == "slow" and self.first() else 0.0
        if what == "born" and self.first():
            os._exit(1)

    def first(self):
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.t, self.at = self.t + 1, self.at + 1
        time.sleep(self.pace)
        if self.t == 40:
            if self.what == "hang" and self.first():
                time.sleep(600)
            if self.what == "end" or (self.what == "die" and self.first()):
                os._exit(1)
            if self.what == "raise":
                raise OSError("the gripper is stuck")
        return self.np_random.normal(size=2).astype(np.float32), float(action), False, self.at >= 7, {}
