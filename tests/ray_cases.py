"""Schemes for cells, and what can happen to a cell."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

import fnrl

SMALL = fnrl.Resources(cpus=0.2)
ENV = fnrl.envs.CartPole(num_envs=4, time_limit=20)


def on_policy(env=ENV, steps=32, hidden=(16,)):
    actor = fnrl.OnPolicyActorCritic(env.spec, policy=fnrl.MLP(hidden), value=fnrl.MLP(hidden))
    algo = fnrl.PPO(minibatches=2)
    return fnrl.Parts(env, actor, algo, fnrl.GAE(steps=steps), normalise_obs=fnrl.NormaliseObs())


def off_policy(env, spread=0.0):
    explore = fnrl.EpsilonGreedy(epsilon=0.4, spread=spread)
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((16,)), critics=1, explore=explore)
    return fnrl.Parts(env, actor, fnrl.DQN(batch=16, ratio=1.0), fnrl.Replay(capacity=48, warmup=32))


def on_ray(**options):
    return fnrl.Ray(**{"collect": SMALL, "gradients": SMALL, "snapshot_every": 4, **options})


def owners(tree):
    """The cells behind a state, in worker order."""
    return [w.token.owner for w in tree.workers]


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def stat(pid):
    """(parent, start time) of a process; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def descendants(pid):
    """Processes below this one, with their start times: a number may be given again."""
    parents = {int(p.name): stat(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found, new = {}, {pid}
    while new:
        new = {p for p, s in parents.items() if s and s[0] in new}
        found |= {p: parents[p][1] for p in new}
    return found


def left_of(processes, seconds):
    """Those that are still there after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        left = {p for p, begun in processes.items() if (s := stat(p)) and s[1] == begun}
        if not left or time.monotonic() > end:
            return [Path(f"/proc/{p}/cmdline").read_bytes() for p in left]
        time.sleep(0.2)


@contextlib.contextmanager
def left_behind():
    """Filled at the end: processes of a cluster begun inside, and of its cells, that outlive it. (Any test's: one that
    was killed, hung or raised on the way as well.)
    """
    left, seen, done = [], {}, threading.Event()

    def watch():
        known = descendants(os.getpid())
        while not done.wait(0.25):
            seen.update({p: b for p, b in descendants(os.getpid()).items() if known.get(p) != b})

    watcher = threading.Thread(target=watch, daemon=True)
    if Path("/proc/self/stat").exists():
        watcher.start()
    yield left
    done.set()
    left += [line for line in left_of(seen, 30) if b"resource_tracker" not in line]  # Python's own


def cell_pids():
    """The cells of clusters that this process started, also those below cells."""
    found = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Cell"):
                found.add(pid)
    return found


def faulty(tmp_path, what, steps=16, **options):
    """Parts whose environments do `what`, and the same parts once the mark is there."""
    kwargs = {"what": what, "mark": str(tmp_path / "mark")}
    options = {"processes": what == "die", "deadline": 3.0, **options}
    env = dataclasses.replace(fnrl.envs.gym(Once, num_envs=2, **options), kwargs=tuple(kwargs.items()))
    return on_policy(env, steps)


class Once(gymnasium.Env):
    """An environment that at its fortieth step (`born`: when it is made) does `what`: `hang`, `die` or `trip`, once, as
    the file `mark` remembers; `raise` or `end` every time. If it is `slow`, the first one that is made is.
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
                with open(self.mark, "a") as told:
                    told.write("raised\n")
            if self.what == "raise" or (self.what == "trip" and self.first()):
                raise OSError("the gripper is stuck")
        return self.np_random.normal(size=2).astype(np.float32), float(action), False, self.at >= 7, {}
