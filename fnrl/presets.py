"""Hyper-parameters by family of environments, by the names the command line gives them.

A schedule is written `start:end`, a line over the whole run. What a preset leaves out keeps the parts' own default.
"""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

_CARTPOLE: Values = {
    "num_envs": 4,
    "algo": "PPO",
    "algo.lr": "1e-3:0",
    "algo.epochs": 4,
    "algo.minibatches": 4,
    "algo.entropy_coef": 0.01,
    "storage": "GAE",
    "storage.steps": 128,
}

_BULLET: Values = {
    "num_envs": 8,
    "algo": "PPO",
    "algo.lr": 3e-4,
    "algo.epochs": 10,
    "algo.minibatches": 16,
    "algo.clip": 0.2,
    "algo.entropy_coef": 0.0,
    "algo.value_coef": 0.5,
    "algo.max_grad_norm": 0.5,
    "storage": "GAE",
    "storage.steps": 256,
    "storage.gae_lambda": 0.95,
    "actor.log_std": -1.0,
    "actor.policy.hidden": (64, 64),
    "actor.value.hidden": (64, 64),
    "normalise_obs": True,
    "scale_reward": True,
}

PRESETS: Mapping[str, Values] = {
    "CartPole": _CARTPOLE,
    "CartPole-v1": _CARTPOLE,
    "HalfCheetahBulletEnv-v0": _BULLET,
    "AntBulletEnv-v0": _BULLET,
    "HopperBulletEnv-v0": _BULLET,
    "HumanoidBulletEnv-v0": _BULLET,
    "Walker2DBulletEnv-v0": _BULLET,
}


def preset(env: str) -> Values:
    """The hyper-parameters for an environment; empty where there are none."""
    return PRESETS.get(env, {})
