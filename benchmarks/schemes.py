"""Every architecture learns: the twelve schemes on CartPole, IMPALA where lag is, and SAC on Pendulum.

One set of hyper-parameters for all synchronous schemes, one for all asynchronous ones, declared here. A seed has
reached the bar when 100 deterministic episodes (every 25,000 steps) have that mean; the figure of a case is its worst
seed's best mean. In one process calls arrive in an order that is drawn; with `--ray` in their own.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, main

import fnrl
from fnrl import schemes, tree
from fnrl.testing import Shuffled
from fnrl.topology import asynchronous, centralised, collect, decentralised, gradients, synchronous

LIMIT, EVERY = 300_000, 25_000
_COLLECT = {"one": collect, "sync": synchronous(collect, 2), "async": asynchronous(collect, 2)}
TWELVE: dict[str, Any] = {
    **{f"{name}-central": centralised(gradients(c)) for name, c in _COLLECT.items()},
    **{f"{name}-sync": centralised(synchronous(gradients(c), 2)) for name, c in _COLLECT.items()},
    **{f"{name}-async": centralised(asynchronous(gradients(c), 2)) for name, c in _COLLECT.items()},
    **{f"{name}-decentral": decentralised(gradients(c), 2) for name, c in _COLLECT.items()},
}


def cartpole(lagging: bool) -> fnrl.Parts:
    """PPO, 8 x 32 steps, 4 x 4 minibatches; smaller steps and V-trace where products lag."""
    env = fnrl.envs.CartPole(num_envs=8)
    if lagging:
        lr = fnrl.Linear(5e-4, 0.0, LIMIT)
        algo, storage = fnrl.PPO(lr=lr, clip=0.1, entropy_coef=0.01), fnrl.VTrace(steps=32)
    else:
        algo, storage = fnrl.PPO(lr=1e-3, entropy_coef=0.01), fnrl.GAE(steps=32)
    return fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, storage)


def impala(storage: Any) -> fnrl.Parts:
    """A2C, 8 x 16 steps, Adam: what a correction of the lag is worth shows where each rollout is used once."""
    env = fnrl.envs.CartPole(num_envs=8)
    algo = fnrl.A2C(lr=2e-3, entropy_coef=0.01, optimiser=fnrl.Adam())
    return fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, storage)


def pendulum() -> fnrl.Parts:
    """SAC, 64x64, an update a step."""
    env, net = fnrl.envs.gym("Pendulum-v1"), fnrl.MLP((64, 64), torch.relu)
    actor = fnrl.OffPolicyActorCritic(env.spec, net, net)
    return fnrl.Parts(env, actor, fnrl.SAC(lr=2e-3, ratio=1.0, batch=128), fnrl.Replay(capacity=50_000, warmup=500))


def reached(scheme: fnrl.Scheme, key: torch.Tensor, bar: float, limit: int, every: int, episodes: int) -> list[Any]:
    """For every seed the steps after which it reached the bar (or the limit), and the best mean it had."""
    state = scheme.init(key)
    lanes = range(len(key)) if key.dim() == 2 else [None]
    best, at = [-float("inf")] * len(lanes), [limit] * len(lanes)
    try:
        for mark in range(every, limit + 1, every):
            while state.env_steps < mark:
                state, _ = scheme.step(state)
            for i, lane in enumerate(lanes):
                weights = state.weights if lane is None else tree.index(state.weights, lane)
                env = fnrl.envs.CartPole(num_envs=50) if scheme.parts.env.pure else fnrl.envs.gym("Pendulum-v1", 10)
                mean = fnrl.evaluate(scheme.parts, weights, fnrl.key(10_000 + mark), episodes, env).mean
                if mean > best[i]:
                    best[i] = mean
                    at[i] = mark if mean >= bar else limit
            if min(best) >= bar:
                break
    finally:
        scheme.close(state)
    return [{"steps": n, "best": round(x, 1)} for n, x in zip(at, best, strict=True)]


def case(name: str) -> Any:
    """A scheme of the twelve on CartPole."""

    def run(args: argparse.Namespace) -> Iterator[Row]:
        lagging = "async" in name
        seeds = torch.stack([fnrl.key(s) for s in range(1, 1 + args.seeds)])
        cells = fnrl.Resources(cpus=0.25)
        executor = fnrl.Ray(collect=cells, gradients=cells) if args.ray else Shuffled(7) if lagging else fnrl.Inline()
        scheme = fnrl.Scheme(cartpole(lagging), TWELVE[name], executor)
        told = reached(scheme, seeds[0] if args.ray else seeds, 450.0, LIMIT, EVERY, 100)
        where = "Ray, 1 seed" if args.ray else f"one process, {args.seeds} seeds"
        yield Row(name, f"CartPole-v1, {where}", min(x["best"] for x in told), 450.0, detail=told)

    run.__doc__ = f"{TWELVE[name]}: return on CartPole-v1"
    return run


def lag(args: argparse.Namespace) -> Iterator[Row]:
    """IMPALA at a lag of several updates, and A2C that does not correct for it: return on CartPole-v1."""
    seeds, means = torch.stack([fnrl.key(s) for s in range(1, 1 + args.seeds)]), []
    for name, storage in (("V-trace", fnrl.VTrace(steps=16)), ("no correction", fnrl.GAE(steps=16, gae_lambda=1.0))):
        scheme = fnrl.Scheme(impala(storage), schemes.impala(workers=16), Shuffled(7))
        told = reached(scheme, seeds, 1e9, 150_000, EVERY, 100)
        means.append(sum(x["best"] for x in told) / len(told))
        yield Row("lag", f"A2C, 16 collectors, {name}", means[-1], 450.0 if name == "V-trace" else None, detail=told)
    yield Row("lag", "what the correction is worth", means[0] - means[1], 50.0)


def sac(args: argparse.Namespace) -> Iterator[Row]:
    """SAC in the schemes that suit replay: return on Pendulum-v1."""
    for name in ("one-central", "sync-central", "async-central", "one-sync", "one-decentral"):
        scheme = fnrl.Scheme(pendulum(), TWELVE[name], Shuffled(7) if "async" in name else fnrl.Inline())
        told = reached(scheme, fnrl.key(1), -200.0, 30_000, 2_500, 50)
        yield Row("sac", f"{name}, Pendulum-v1", told[0]["best"], -200.0, detail=told)


if __name__ == "__main__":
    main(
        __doc__ or "",
        {**{name: case(name) for name in TWELVE}, "lag": lag, "sac": sac},
        seeds={"type": int, "default": 3, "help": "seeds of each case, as lanes [3]"},
        ray={"action": "store_true", "help": "one seed of each of the twelve in Ray cells"},
    )
