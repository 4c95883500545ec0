"""A grid of learning rates and discounts, two seeds each, as twelve lanes of one program; then what came of it.

python examples/sweep.py
"""

import tempfile
from pathlib import Path

import torch

import fnrl

torch.set_num_threads(1)


def main(env_steps: int = 20_000, directory: str | None = None) -> list[fnrl.results.Setting]:
    """Returns the settings, the best first."""
    env = fnrl.envs.CartPole(num_envs=8)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(entropy_coef=0.01), fnrl.GAE(steps=64))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    sweep = fnrl.sweep(scheme, lr=[1e-4, 1e-3, 1e-2], gamma=[0.9, 0.99], seeds=2)
    where = Path(directory or tempfile.mkdtemp()) / "sweep"
    evaluation = fnrl.Evaluate(every=env_steps // 4, episodes=8)
    with fnrl.Learner(sweep.scheme, env_steps, where, evaluation=evaluation, seeds=sweep.seeds) as learner:
        learner.train()
    found = fnrl.results.settings(fnrl.results.read(where))
    for s in found:
        print(f"{s.values}: {s.iqm:.1f} ({s.low:.1f} to {s.high:.1f})")
    print("written to", fnrl.report.report([where], where.with_suffix(".html")))
    return found


if __name__ == "__main__":
    main()
