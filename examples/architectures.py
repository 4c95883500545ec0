"""Four architectures on HalfCheetahBulletEnv-v0 from the same parts: one process, and three with Ray cells.

    python examples/architectures.py [--steps 40000] [--workers 2] [--only NAME...]

Needs fnrl[ray,pybullet]. 40,000 steps are a look (a minute or so each); a run that learns to walk takes a million.
"""

import argparse
import time
from typing import Any

import torch

import fnrl
from fnrl import asynchronous, centralised, collect, decentralised, gradients, synchronous

torch.set_num_threads(1)


def architectures(workers: int) -> dict[str, Any]:
    """Each is a value; what flows is the same."""
    return {
        "one process": centralised(gradients(collect)),
        "synchronous collectors": centralised(gradients(synchronous(collect, workers))),
        "asynchronous collectors": centralised(gradients(asynchronous(collect, workers))),
        "decentralised": decentralised(gradients(collect), workers),
    }


def parts(workers: int, lags: bool) -> fnrl.Parts:
    """PPO; where rollouts are of an older policy, V-trace in the place of GAE."""
    env = fnrl.envs.gym("HalfCheetahBulletEnv-v0", num_envs=8 // workers)
    return fnrl.Parts(
        env,
        actor=fnrl.OnPolicyActorCritic(env.spec, log_std=-1.0),
        algo=fnrl.PPO(lr=3e-4, epochs=10, minibatches=8),
        storage=fnrl.VTrace(steps=256, trace_lambda=0.95) if lags else fnrl.GAE(steps=256),
        normalise_obs=fnrl.NormaliseObs(),
        scale_reward=fnrl.ScaleReward(),
    )


def main(steps: int = 40_000, workers: int = 2, only: list[str] | None = None) -> dict[str, float]:
    """Trains each for so many steps; returns the mean return of the last episodes that ended."""
    found = {}
    for name, topology in architectures(workers).items():
        if only and name not in only:
            continue
        alone = name == "one process"
        cell = fnrl.Resources(cpus=0.5)
        executor = fnrl.Inline() if alone else fnrl.Ray(collect=cell, gradients=cell)
        scheme = fnrl.Scheme(parts(1 if alone else workers, "asynchronous" in name), topology, executor)
        print(f"\n{name}\n{scheme}")
        state, returns, lag = scheme.init(fnrl.key(0)), list[float](), 0
        begin = time.perf_counter()
        while state.env_steps < steps:
            state, info = scheme.step(state)
            returns += [float(r) for e in info.episodes for r in e.returns[e.end]]
            lag = max([lag, *(n for lags in info.lags.values() for n in lags)])
        rate = state.env_steps / (time.perf_counter() - begin)
        scheme.close(state)
        found[name] = sum(returns[-8:]) / max(len(returns[-8:]), 1)
        print(f"{state.env_steps} steps, {rate:.0f} a second; at most {lag} versions behind; return {found[name]:.0f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(architectures(2)))
    said = parser.parse_args()
    main(said.steps, said.workers, said.only)
