"""stable-baselines3's side of off-policy throughput: `sac|dqn UPDATES THREADS` -> one line of JSON.

Batches of 256, two layers of 256, one update a step, from end to end; `alone` is the time inside `train` only.
"""

import gc
import json
import sys
import time

import torch
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import BaseCallback

work, updates, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
WARMUP = 512
common = {"batch_size": 256, "buffer_size": 50_000, "learning_starts": WARMUP, "seed": 0, "device": "cpu"}
if work == "sac":
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [256, 256]}, **common)
else:
    every = {"train_freq": 1, "gradient_steps": 1, "target_update_interval": 1000}
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [256, 256]}, **common, **every)
marks: list[tuple[float, float]] = []
inside, train = [0.0], model.train


def timed(*args: object, **kwargs: object) -> None:
    """`train`, with its time added to `inside`."""
    begin = time.perf_counter()
    train(*args, **kwargs)
    inside[0] += time.perf_counter() - begin


model.train = timed


class Mark(BaseCallback):
    """Notes the time at some steps."""

    def _on_step(self) -> bool:
        if self.num_timesteps == WARMUP + 20:
            gc.collect()  # else one of a large heap falls, or doesn't, into what is timed
            inside[0] = 0.0
            marks.append((time.perf_counter(), time.process_time()))
        return True


model.learn(WARMUP + 20 + updates, callback=Mark())
seconds, cpu = time.perf_counter() - marks[0][0], time.process_time() - marks[0][1]
print(json.dumps({"updates": updates, "seconds": seconds, "cpu": cpu, "alone": inside[0]}))
