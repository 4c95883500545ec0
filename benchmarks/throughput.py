"""Throughput against stable-baselines3: the same settings, alternated in one run, one process and one thread each.

Ratios are medians over `--repeats` alternations, with their spread. "Outside the simulator" is wall time less the time
spent inside the simulator's own `step` and `reset`, measured by the same wrapper in both.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from harness import HERE, Row, main, one_thread, peer_python

SB3 = "stable-baselines3==2.9.2"


def alternate(args: argparse.Namespace, env: str, envs: int, steps: int, batch: int, epochs: int, rollouts: int) -> Any:
    """`--repeats` pairs of measurements `(fnrl, sb3)`, who goes first taking turns."""
    setting = [env, *map(str, (envs, steps, batch, epochs, rollouts))]
    ours = [sys.executable, str(HERE / "peers" / "throughput_fnrl.py"), *setting]
    theirs = [peer_python("sb3", [SB3]), str(HERE / "peers" / "throughput_sb3.py"), *setting]
    pairs = []
    for i in range(args.repeats):
        found = {}
        for who in ("fnrl", "sb3") if i % 2 == 0 else ("sb3", "fnrl"):
            command = ours if who == "fnrl" else theirs
            out = subprocess.run(command, check=True, env=one_thread(), capture_output=True, text=True).stdout
            found[who] = json.loads(out.strip().splitlines()[-1])
        pairs.append((found["fnrl"], found["sb3"]))
        print(f"  {env} {i}: {found}", flush=True)
    return pairs


def ratio(case: str, what: str, values: list[float], bar: float, above: bool, detail: Any) -> Row:
    """The median of ratios, its spread in the name."""
    return Row(case, f"{what} [{min(values):.2f}, {max(values):.2f}]", statistics.median(values), bar, above, detail)


def case_cartpole(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on hosted CartPole-v1, 4 x 128, batch 128, 4 epochs: steps per second at least 1.5 times theirs."""
    pairs = alternate(args, "CartPole-v1", 4, 128, 128, 4, 20)
    rates = [(a["steps"] / a["seconds"]) / (b["steps"] / b["seconds"]) for a, b in pairs]
    yield ratio("cartpole", "steps/s over stable-baselines3", rates, 1.5, True, pairs)
    yield Row("cartpole", "fnrl steps/s", statistics.median(a["steps"] / a["seconds"] for a, _ in pairs))
    yield Row("cartpole", "stable-baselines3 steps/s", statistics.median(b["steps"] / b["seconds"] for _, b in pairs))


def case_halfcheetah(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on HalfCheetahBulletEnv-v0, 8 x 256, batch 256, 4 epochs: time outside the simulator <= 0.6 of theirs."""
    pairs = alternate(args, "HalfCheetahBulletEnv-v0", 8, 256, 256, 4, 4)
    outside = [(a["seconds"] - a["simulator"]) / (b["seconds"] - b["simulator"]) for a, b in pairs]
    yield ratio("halfcheetah", "time outside the simulator over theirs", outside, 0.6, False, pairs)
    memory = [a["memory"] / b["memory"] for a, b in pairs]
    yield ratio("halfcheetah", "peak memory over theirs", memory, 1.0, False, None)
    for name, i in (("fnrl", 0), ("stable-baselines3", 1)):
        yield Row("halfcheetah", f"{name} steps/s", statistics.median(p[i]["steps"] / p[i]["seconds"] for p in pairs))


if __name__ == "__main__":
    main(
        __doc__ or "",
        {"cartpole": case_cartpole, "halfcheetah": case_halfcheetah},
        repeats={"type": int, "default": 5, "help": "alternations of fnrl and the peer"},
    )
