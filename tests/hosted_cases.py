"""Environments for the tests of hosted simulators, and plain gymnasium loops to compare with."""

import os
import signal
import threading
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import TimeLimit

from fnrl import random, tree
from fnrl.envs import Environment, GymVector
from fnrl.envs.hosted import HostedState

# -- environments ---------------------------------------------------------------------------------------------------


class Walk(gymnasium.Env):
    """A noisy linear system in one reused buffer; episodes end by chance, or after `limit` steps, or both at once."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)
    opened = closed = 0

    def __init__(self, limit: int = 7, hazard: float = 0.15) -> None:
        type(self).opened += 1
        self.limit, self.hazard, self.steps, self.x = limit, hazard, 0, np.zeros(3, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.x[:] = 0, self.np_random.normal(size=3)
        return self.x, {"seen": self.steps}

    def step(self, action):
        assert action.dtype == np.float32
        assert action.shape == (2,)
        self.steps += 1
        self.x[:] = 0.9 * self.x + 0.1 * self.np_random.normal(size=3) + np.array([*action, action.prod()])
        action *= np.nan  # what an environment does to its action is nobody else's business
        return self.x, float(self.x.sum()), bool(self.np_random.random() < self.hazard), self.steps >= self.limit, {}

    def close(self):
        type(self).closed += 1


class Count(gymnasium.Env):
    """Tells (high, low) of its seed, resets since it was opened, steps of the episode; ends after `limit` steps."""

    observation_space = Box(-1.0, 1e9, (4,), np.float32)
    action_space = Discrete(2, start=3)

    def __init__(self, limit: int = 5) -> None:
        self.limit, self.resets, self.steps, self.seed, self.total = limit, 0, 0, 0, 0

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps, self.resets = seed, 0, self.resets + 1
        return self.obs(), {}

    def step(self, action):
        assert action in self.action_space
        self.steps, self.total = self.steps + 1, self.total + 1
        return self.obs(), self.reward(action), False, self.steps >= self.limit, {}

    def obs(self):
        return np.array([self.seed // 65536, self.seed % 65536, self.steps, 0], np.float32)

    def reward(self, action):
        return float(action)


class Resets(Count):
    """Tells whether it is in its second episode, or a later one."""

    def obs(self):
        return super().obs() + np.float32([0, 0, 0, self.resets >= 2])


class Hidden(Count):
    """Remembers past a reset what it shows only `after` so many steps of an episode."""

    def __init__(self, limit: int = 30, after: int = 20) -> None:
        super().__init__(limit)
        self.after = after

    def obs(self):
        return super().obs() + np.float32([0, 0, 0, self.total if self.steps > self.after else 0])


class Mortal(Count):
    """Lives 25 steps in its first episode, 30 in later ones; can't be stepped when it is over."""

    def reset(self, *, seed=None, options=None):
        self.limit = 25 if self.total < 25 else 30
        return super().reset(seed=seed)

    def step(self, action):
        assert self.steps < self.limit
        return super().step(action)


class Unseeded(Count):
    """Draws from numpy's global generator `after` so many steps."""

    def __init__(self, after: int = 0) -> None:
        super().__init__(50)
        self.after = after

    def obs(self):
        noise = np.random.default_rng().normal() if self.steps >= self.after else 0
        return super().obs() + np.float32([0, 0, 0, noise])


class Odd(Count):
    """Breaks its declaration in its second step if its seed is odd (but no probe's), or at any time with `always`."""

    def __init__(self, how: str = "", always: bool = False) -> None:
        super().__init__(limit=50)
        self.how, self.always = how, always

    def obs(self):
        good = super().obs()
        if not (self.always or self.odd()):
            return good
        broken = {
            "shape": good[:3],
            "dtype": good.astype(np.float64),
            "nan": good * np.float32(np.nan),
            "list": [1.0] * 4,
        }
        return broken.get(self.how, good)

    def odd(self):
        return self.steps == 2 and self.seed % 2 and self.seed > 9

    def reward(self, action):
        odd = self.odd()
        if odd and self.how == "raise":
            raise ValueError("boom")
        if odd and self.how == "unpicklable":
            raise UnpicklableError("boom", threading.Lock())
        if odd and self.how == "interrupt":
            raise KeyboardInterrupt
        if odd and self.how == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(100)
        if odd and self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        kinds = {
            "none": None,
            "inf": np.inf,
            "one": np.array([2.0]),
            "int": 2,
            "numpy": np.float64(2.0),
            "two": np.zeros(2),
        }
        return kinds[self.how] if self.how in kinds and (odd or self.how in ("one", "int", "numpy")) else 1.0


class UnpicklableError(Exception):
    pass


class BadReset(Count):
    """Can be reset four times, as a probe does."""

    def reset(self, *, seed=None, options=None):
        if self.resets == 4:
            raise OSError("no fifth life")
        return super().reset(seed=seed)


class Elsewhere(Count):
    """Opens in the process that probed it, and nowhere else."""

    pid = os.getpid()

    def __init__(self) -> None:
        super().__init__()
        if os.getpid() != self.pid:
            raise FileNotFoundError("no display")


class Double(Count):
    observation_space = Box(-1.0, 1e9, (4,), np.float64)

    def obs(self):
        return super().obs() + np.float64(1 / 3)


class Pixels(Count):
    observation_space = Box(0, 255, (2, 3), np.uint8)

    def obs(self):
        return np.full((2, 3), (self.steps + self.seed) % 256, np.uint8)


class Numbers(Count):
    observation_space = Discrete(4, start=-2)

    def obs(self):
        return np.int64(self.steps - 2)


class Dicts(Count):
    observation_space = Dict(x=Discrete(2))


class Old(Count):
    def step(self, action):
        return super().step(action)[:4]


class Bare(Count):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class Lost(Count):
    """Has nothing to show but NaN before the first step, unless it is probed."""

    def obs(self):
        return super().obs() + np.float32(np.nan if self.seed > 9 and self.steps == 0 else 0)


class Varied(Count):
    """Has one more number to show each time it is opened."""

    opened = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).opened += 1
        self.observation_space = Box(-1.0, 1e9, (4 + self.opened,), np.float32)

    def obs(self):
        return np.zeros(self.observation_space.shape, np.float32)


class Stuck(Elsewhere):
    """Opens in the process that probed it, and nowhere else, without saying so."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except FileNotFoundError:
            time.sleep(100)


def limited(env):
    return TimeLimit(env, 3)


def nothing():
    return object()


# -- helpers --------------------------------------------------------------------------------------------------------


MODES = pytest.mark.parametrize("processes", [False, True], ids=["inside", "processes"])


def key_of(i: int) -> torch.Tensor:
    return random.fold_in(random.key(7), i)


def seed(key: torch.Tensor, i: int, episode: int) -> int:
    return random.seed_of(random.fold_in(random.fold_in(key, i), episode))


def draw_actions(env: GymVector, steps: int, lanes: int | None = None) -> torch.Tensor:
    generator, space = torch.Generator().manual_seed(0), env.spec.action
    shape = (steps, *(() if lanes is None else (lanes,)), env.num_envs, *space.shape)
    if space.stored == torch.int64:
        return torch.randint(space.start, space.start + space.n, shape, generator=generator)
    return torch.rand(shape, generator=generator) * 2 - 1


def run(env: Environment, state: HostedState, actions: torch.Tensor):
    """[(obs, Step)] of each action, and the last state."""
    seen = []
    for action in actions:
        before = state.obs
        state, step = env.step(state, action)
        seen.append((before, step))
    return seen, state


def plain_loop(env: GymVector, key: torch.Tensor, i: int, actions: torch.Tensor):
    """What environment i should see, by a loop over one gymnasium environment; and the seeds of its episodes."""
    raw, episode, rows = env.make(), 1, []
    raw.reset(seed=seed(key, i, 0))
    obs = np.array(raw.reset(seed=seed(key, i, 1))[0], copy=True)
    for action in actions:
        after, reward, terminated, truncated, _ = raw.step(
            action[i].numpy().copy() if action[i].dim() else action[i].item()
        )
        after = np.array(after, copy=True)
        rows.append((obs, after, np.float32(reward), terminated, truncated))
        if terminated or truncated:
            episode += 1
            after = np.array(raw.reset(seed=seed(key, i, episode))[0], copy=True)
        obs = after
    raw.close()
    return rows, obs, episode


def same_as_plain_loop(env: GymVector, steps: int) -> int:
    """Compares a whole run with plain loops, bit for bit; gives the number of episodes that ended."""
    actions, key, ended = draw_actions(env, steps), key_of(0), 0
    seen, last = run(env, env.init(key), actions)
    for i in range(env.num_envs):
        rows, obs, episode = plain_loop(env, key, i, actions)
        for (before, step), (o, after, reward, terminated, truncated) in zip(seen, rows, strict=True):
            got = [x[i] for x in (before, step.next_obs, step.reward, step.terminated, step.truncated)]
            assert tree.same_bits(got, [np.asarray(v) for v in (o, after, reward, terminated, truncated)])
        assert tree.same_bits(last.obs[i], obs)
        ended += episode - 1
    env.close(last)
    return ended


def children() -> list[int]:
    return [int(p) for p in open(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read().split()]
