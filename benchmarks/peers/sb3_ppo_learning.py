"""stable-baselines3's PPO on HalfCheetahBulletEnv-v0 with fnrl's settings: `SEED OUT MARK...` -> {mark: returns of
100 episodes}.
"""

import json
import sys
from pathlib import Path

import gymnasium
import pybullet_envs_gymnasium  # noqa: F401
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

ENV = "HalfCheetahBulletEnv-v0"
seed, out, marks = int(sys.argv[1]), Path(sys.argv[2]), [int(m) for m in sys.argv[3:]]
torch.set_num_threads(1)
vector = VecNormalize(make_vec_env(ENV, 8, seed=seed, vec_env_cls=DummyVecEnv), gamma=0.99)
model = PPO(
    "MlpPolicy",
    vector,
    learning_rate=3e-4,
    n_steps=256,
    batch_size=128,
    n_epochs=10,
    gamma=0.99,
    gae_lambda=0.95,
    clip_range=0.2,
    ent_coef=0.0,
    vf_coef=0.25,  # of the squared error, of which fnrl takes half
    max_grad_norm=0.5,
    seed=seed,
    device="cpu",
    policy_kwargs={"log_std_init": -1.0, "net_arch": {"pi": [64, 64], "vf": [64, 64]}},
)
apart = DummyVecEnv([lambda: gymnasium.make(ENV)])
apart.seed(10_000 + 1000 * seed)
found: dict[str, list[float]] = {}


def evaluate() -> list[float]:
    """Raw returns of 100 deterministic episodes under the present statistics."""
    returns, total, obs = [], 0.0, apart.reset()
    while len(returns) < 100:
        action, _ = model.predict(vector.normalize_obs(obs), deterministic=True)
        obs, reward, done, _ = apart.step(action)
        total += float(reward[0])
        if done[0]:
            returns.append(total)
            total = 0.0
    return returns


class AtMarks(BaseCallback):
    """Evaluates after the update that passes a mark."""

    def look(self) -> None:
        """One evaluation for every mark passed."""
        for mark in marks:
            if str(mark) not in found and self.model.num_timesteps >= mark:
                found[str(mark)] = evaluate()
                out.write_text(json.dumps(found))

    def _on_rollout_start(self) -> None:
        self.look()

    def _on_training_end(self) -> None:
        self.look()

    def _on_step(self) -> bool:
        return True


model.learn(max(marks), callback=AtMarks())
