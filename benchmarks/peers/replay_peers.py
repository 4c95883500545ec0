"""The peers' side of the replay benchmark: `ENVS` -> one line of JSON, microseconds of cpprb and stable-baselines3."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cpprb import ReplayBuffer
from gymnasium.spaces import Box
from stable_baselines3.common.buffers import ReplayBuffer as SB3Buffer

envs = int(sys.argv[1])
torch.set_num_threads(1)
ROWS = 1_000_000
rng = np.random.default_rng(0)
sizes = {"obs": 26, "act": 6, "rew": 1, "next_obs": 26, "done": 1}
step = {n: rng.normal(size=(envs, size)).astype(np.float32) for n, size in sizes.items()}
step["done"][:] = 0.0


def timed(call: Callable[[], Any], times: int = 2000) -> float:
    """Microseconds of CPU a call."""
    for _ in range(50):
        call()
    begin = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begin) / times * 1e6


shapes: dict[str, Any] = {n: {"shape": size} for n, size in sizes.items() if n != "next_obs"}
ours = ReplayBuffer(ROWS, shapes, next_of="obs")
many = {n: np.repeat(x, 1000, 0) for n, x in step.items()}
for _ in range(ROWS // (1000 * envs) + 1):
    ours.add(**many)
out = {"cpprb": {"append": timed(lambda: ours.add(**step)), "batch": timed(lambda: ours.sample(256))}}

theirs = SB3Buffer(ROWS, Box(-1, 1, (26,)), Box(-1, 1, (6,)), "cpu", n_envs=envs)
for x in (theirs.observations, theirs.next_observations, theirs.actions, theirs.rewards, theirs.dones, theirs.timeouts):
    x[:] = 0.0
theirs.full, infos = True, [{}] * envs
columns = step["obs"], step["next_obs"], step["act"], step["rew"][:, 0], step["done"][:, 0]
out["stable-baselines3"] = {
    "append": timed(lambda: theirs.add(*columns, infos)),
    "batch": timed(lambda: theirs.sample(256)),
}
print(json.dumps(out))
