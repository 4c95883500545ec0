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

_REACH: Values = {
    "algo": "SAC",
    "algo.lr": 1e-3,
    "algo.gamma": 0.95,
    "algo.ratio": 0.5,
    "storage.capacity": 100_000,
    "storage.steps": 10,
    "storage.hindsight": True,
    "actor.policy.hidden": (64, 64),
    "actor.critic.hidden": (64, 64),
    "normalise_obs": True,
}

_BITS: Values = {
    "num_envs": 64,
    "algo": "DQN",
    "algo.lr": 1e-3,
    "algo.gamma": 0.95,
    "algo.ratio": 1 / 32,
    "algo.batch": 128,
    "algo.target_every": 50,
    "storage.steps": 4,
    "storage.hindsight": True,
    "actor.critic.hidden": (256,),
    "actor.explore.epsilon": 0.2,
}

_PENDULUM: Values = {
    "algo.lr": 1e-3,
    "algo.gamma": 0.98,
    "algo.batch": 128,
    "storage.capacity": 200_000,
    "storage.warmup": 1000,
    "actor.policy.hidden": (64, 64),
    "actor.critic.hidden": (64, 64),
}

_CARTPOLE_Q: Values = {
    "algo.lr": "1e-3:0",
    "algo.ratio": 0.5,
    "algo.batch": 64,
    "algo.target_every": 128,
    "storage.capacity": 100_000,
    "storage.steps": 16,
    "storage.n_step": 5,
}

_BULLET_SAC: Values = {
    "algo.lr": 7.3e-4,
    "algo.gamma": 0.98,
    "algo.tau": 0.02,
    "storage.capacity": 300_000,
    "storage.steps": 8,
    "storage.warmup": 10_000,
    "actor.policy.hidden": (128, 128),
    "actor.critic.hidden": (128, 128),
}

# what an algorithm needs of the other parts, whatever the environment
_PLAIN: Mapping[str, Values] = {
    "TD3": {"actor.stochastic": False, "actor.explore": "Gaussian"},
    "DDPG": {"actor.stochastic": False, "actor.explore": "Gaussian", "actor.critics": 1},
    "DQN": {"actor.policy": "none", "actor.critics": 1, "actor.explore": "EpsilonGreedy"},
}

# by environment and algorithm; the first algorithm is the environment's own
PRESETS: Mapping[str, Mapping[str, Values]] = {
    "CartPole": {"PPO": _CARTPOLE},
    "CartPole-v1": {"PPO": _CARTPOLE, "DQN": _CARTPOLE_Q},
    "Pendulum-v1": {"SAC": _PENDULUM, "TD3": _PENDULUM, "DDPG": _PENDULUM},
    "HalfCheetahBulletEnv-v0": {"PPO": _BULLET, "SAC": _BULLET_SAC},
    "AntBulletEnv-v0": {"PPO": _BULLET},
    "HopperBulletEnv-v0": {"PPO": _BULLET},
    "HumanoidBulletEnv-v0": {"PPO": _BULLET},
    "Walker2DBulletEnv-v0": {"PPO": _BULLET},
    "PandaReach-v3": {"SAC": _REACH},
    "BitFlipping": {"DQN": _BITS},
}


def preset(env: str, algo: str | None = None) -> Values:
    """The hyper-parameters for an environment and an algorithm; those that only make the parts fit where none are
    tuned.
    """
    tuned = PRESETS.get(env, {})
    algo = algo or next(iter(tuned), None)
    if algo is None:
        return {}
    if algo == "A2C":  # what is tuned for another rollout algorithm, but for its own
        tuned = {"A2C": {n: x for n, x in tuned.get("PPO", {}).items() if not n.startswith("algo")}, **tuned}
    return {**_PLAIN.get(algo, {}), **tuned.get(algo, {}), "algo": algo}
