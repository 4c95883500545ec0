"""stable-baselines3's side of the throughput benchmark: `ENV ENVS STEPS BATCH EPOCHS ROLLOUTS [VECTOR]` -> JSON.

VECTOR is `dummy` (one process) or `subproc` (a process for each environment).
"""

import gc
import json
import sys
import time

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from timed import INSIDE, Timed, peak_memory

name, (envs, steps, batch, epochs, rollouts) = sys.argv[1], map(int, sys.argv[2:7])
torch.set_num_threads(1)


def made():
    """One environment; Bullet's register where they are made."""
    if "Bullet" in name:
        import pybullet_envs_gymnasium  # noqa: F401
    return Timed(gymnasium.make(name))


apart = sys.argv[7:] == ["subproc"]
vector = SubprocVecEnv([made] * envs, start_method="fork") if apart else DummyVecEnv([made] * envs)
if name != "CartPole-v1":
    vector = VecNormalize(vector)
model = PPO("MlpPolicy", vector, n_steps=steps, batch_size=batch, n_epochs=epochs, seed=0, device="cpu")
marks: list[tuple[float, float, float]] = []


class Mark(BaseCallback):
    """Notes the time at the start of every rollout."""

    def _on_rollout_start(self) -> None:
        if len(marks) == 1:
            gc.collect()  # else one of a large heap falls, or doesn't, into what is timed
        marks.append((time.perf_counter(), INSIDE[0], time.process_time()))

    def _on_step(self) -> bool:
        return True


model.learn(envs * steps * (rollouts + 1), callback=Mark())
marks.append((time.perf_counter(), INSIDE[0], time.process_time()))
seconds, simulator, cpu = (b - a for a, b in zip(marks[1], marks[-1], strict=True))  # the first rollout is the warm-up
took = {"steps": envs * steps * rollouts, "seconds": seconds, "cpu": cpu, "simulator": simulator}
vector.close()
print(json.dumps({**took, "memory": peak_memory()}))
