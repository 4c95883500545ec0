"""What the tests of the replay share: a world of stacked pictures, lanes, a replay that lives in it."""

import numpy as np
import torch

from fnrl import tree
from fnrl.storages import Frames, Replay
from fnrl.types import Rollout, Transition

SIDE = 2


class Pictures:
    """Endless steps of stacked bytes: the stacks are a deque's, as gymnasium's are, not those of the code."""

    def __init__(self, seed, frames, envs, chance, shape=(SIDE, SIDE), dtype=np.uint8):
        self.rng, self.frames, self.envs, self.chance = np.random.default_rng(seed), frames, envs, chance
        self.shape, self.dtype = shape, dtype
        self.obs = [self.first() for _ in range(envs)]

    def frame(self):
        return self.rng.integers(0, 255, self.shape).astype(self.dtype)

    def first(self):
        frame = self.frame()
        before = frame if self.frames.padding is None else np.full_like(frame, self.frames.padding)
        return [before] * (self.frames.count - 1) + [frame]

    def rollout(self, steps):
        columns = {n: [] for n in ("obs", "next_obs", "action", "reward", "terminated", "truncated")}
        for _ in range(steps):
            kind = self.rng.random(self.envs)
            row = {"terminated": kind < self.chance / 2, "truncated": (self.chance / 3 < kind) & (kind < self.chance)}
            row |= {"action": self.rng.integers(0, 3, self.envs), "reward": self.rng.normal(size=self.envs)}
            following = [[*o[1:], self.frame()] for o in self.obs]
            row |= {"obs": np.array(self.obs), "next_obs": np.array(following)}
            ends = row["terminated"] | row["truncated"]
            self.obs = [self.first() if end else o for end, o in zip(ends, following, strict=True)]
            for name, x in row.items():
                columns[name].append(x)
        x = {n: torch.from_numpy(np.array(c)) for n, c in columns.items()}
        x["reward"] = x["reward"].float()
        none = torch.zeros(steps, self.envs)
        return Rollout(Transition(**x, logp=none, memory=none[..., None][..., :0]), (), 0, steps * self.envs)


def lanes(rollouts):
    return Rollout(tree.stack([r.steps for r in rollouts]), (), 0, rollouts[0].env_steps)


def mapped(method):
    """`method` over lanes of ring, keys and whatever tensors come with them; weights are shared."""

    def run(ring, shared, *rest):
        tensors = [x for x in rest if isinstance(x, torch.Tensor)]
        others = [x for x in rest if not isinstance(x, torch.Tensor)]
        return torch.func.vmap(lambda held, *xs: method(held, shared, *xs, *others))(ring, *tensors)

    return run


class Life:
    """A replay that goes on."""

    def __init__(self, capacity=24, frames=None, prioritised=None, count=None, chance=0.3, seed=0):
        self.storage = Replay(capacity=capacity, warmup=0, frames=frames, prioritised=prioritised)
        self.worlds = [Pictures(seed + i, frames or Frames(2), 2, chance) for i in range(count or 1)]
        self.state, self.count = self.storage.init(), count

    def live(self, steps=1):
        rollouts = [w.rollout(steps) for w in self.worlds]
        self.state = self.storage.append(self.state, lanes(rollouts) if self.count else rollouts[0])

    def view(self):
        return self.storage.gather(self.state, copy=False)

    def record(self):
        return self.storage.gather(self.state)
