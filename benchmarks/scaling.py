"""Cells: how throughput grows with them, what a round costs besides its work, what weights and memory cost.

`waiting`, `round`, `weights` and `memory` bear a busy machine; `halfcheetah` compares speeds and wants a quiet one with
two cores.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import ray
import torch
from gymnasium import spaces
from harness import HERE, Row, main, one_thread, peer_python
from throughput import SB3

import fnrl
from fnrl.apply import first_algo
from fnrl.lift import Run
from fnrl.topology import asynchronous, centralised, collect, gradients, synchronous
from fnrl.types import Info

torch.set_num_threads(1)


class Waits(gymnasium.Env):  # type: ignore[type-arg]
    """A step waits 5 ms, as for a device; an episode has 100."""

    observation_space, action_space = spaces.Box(-1, 1, (4,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Zeros."""
        self.t = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        """After 5 ms."""
        time.sleep(0.005)
        self.t += 1
        return np.zeros(4, np.float32), 0.0, False, self.t >= 100, {}


def parts_of(env: Any, steps: int, minibatches: int = 1, width: int = 64) -> fnrl.Parts:
    """PPO with two hidden layers."""
    net = fnrl.MLP((width, width))
    algo = fnrl.PPO(epochs=1, minibatches=minibatches)
    return fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec, policy=net, value=net), algo, fnrl.GAE(steps=steps))


def cells(cpus: float = 0.05) -> fnrl.Ray:
    """A cluster of this program's own, with room for many cells."""
    each = fnrl.Resources(cpus=cpus)
    return fnrl.Ray(collect=each, gradients=each, patience=600.0)


def case_waiting(args: argparse.Namespace) -> Iterator[Row]:
    """Steps that wait 5 ms, 8 environments a worker: throughput of n workers over n times that of one."""
    parts = parts_of(fnrl.envs.gym(Waits, num_envs=8), args.steps)
    found: dict[int, float] = {}
    for n in sorted({1, *args.workers}):
        node, executor = synchronous(collect, n), cells()
        run = Run(parts, executor)
        weights = first_algo(run, fnrl.key(0)).weights
        with executor.opening(run, node):
            state = node.init(run, fnrl.key(0))
        state, *_ = node.step(run, state, weights)
        times = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            state, *_ = node.step(run, state, weights)
            times.append(time.perf_counter() - begin)
        node.close(run, state)
        found[n] = n * 8 * args.steps / statistics.median(times)
        bar = 0.9 if n == 32 else None
        yield Row("waiting", f"{n} workers, over {n} times one", found[n] / (n * found[1]), bar, True, times)
        yield Row("waiting", f"{n} workers, steps/s", found[n])


def case_halfcheetah(args: argparse.Namespace) -> Iterator[Row]:
    """HalfCheetahBulletEnv-v0, 8 environments: two collectors over one process, and over stable-baselines3's best."""
    setting = ["HalfCheetahBulletEnv-v0", *map(str, (8, args.rollout, 256, 4, args.rounds))]
    ours, theirs = str(HERE / "peers" / "throughput_fnrl.py"), str(HERE / "peers" / "throughput_sb3.py")
    commands = {
        "one process": [sys.executable, ours, *setting],
        "two collectors": [sys.executable, ours, *setting, "2"],
        **{kind: [peer_python("sb3", [SB3]), theirs, *setting, kind] for kind in ("dummy", "subproc")},
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(args.repeats):
        for name in [*commands][:: 1 if i % 2 == 0 else -1]:
            out = subprocess.run(commands[name], check=True, env=one_thread(), capture_output=True, text=True).stdout
            took = json.loads(out.strip().splitlines()[-1])
            rates[name].append(took["steps"] / took["seconds"])
        print(f"  {i}: " + ", ".join(f"{name} {r[-1]:.0f}" for name, r in rates.items()), flush=True)
    best = [max(pair) for pair in zip(rates["dummy"], rates["subproc"], strict=True)]
    for what, others, bar in (
        ("one process", rates["one process"], 1.6),
        ("stable-baselines3's best vector", best, 1.8),
    ):
        ratios = [a / b for a, b in zip(rates["two collectors"], others, strict=True)]
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        yield Row("halfcheetah", f"two collectors over {what} {spread}", statistics.median(ratios), bar, True, rates)


def case_round(args: argparse.Namespace) -> Iterator[Row]:
    """One synchronous round of 2 gradient workers with a 64x64 policy: its time less that inside the slower worker."""
    parts = parts_of(fnrl.envs.CartPole(num_envs=4), 32, minibatches=8)
    node, executor = gradients(collect), cells()
    run, pair = Run(parts, executor), synchronous(gradients(collect), 2)
    algo = first_algo(run, fnrl.key(0))
    with executor.opening(run, pair):
        states = list(pair.init(run, fnrl.key(0)).workers)
    over = []
    for i in range(30 + 10 * args.rounds):
        weights = dataclasses.replace(algo.weights, version=i)  # each round has a version of its own to send
        begin = time.perf_counter()
        calls = [executor.submit(run.child(j), node, s, weights) for j, s in enumerate(states)]
        after, _, infos = zip(*(executor.result(c) for c in calls), strict=True)
        took = time.perf_counter() - begin
        states = list(after)
        inside = [sum(x for n, x in info.report.items() if n.startswith("time/")) for info in infos]
        over.append(1e3 * (took - max(inside)))
    for j, s in enumerate(states):
        executor.close(run.child(j), node, s)
    yield Row("round", "ms besides the work", statistics.median(over[30:]), 5.0, False, over[30:])


@dataclasses.dataclass(frozen=True)
class Touch:
    """A node whose step takes the weights and keeps them: a copy would stay."""

    produces: ClassVar[str] = "updates"

    def init(self, run: Run, key: torch.Tensor) -> Any:
        """Nothing."""
        return ()

    def step(self, run: Run, state: Any, weights: Any) -> Any:
        """The first parameter, as a tensor."""
        return weights, weights.params.vector[:1].clone(), Info({}, (), {})

    def gather(self, run: Run, state: Any) -> Any:
        """Nothing."""
        return ()

    def close(self, run: Run, state: Any) -> None:
        """Nothing."""


class Holds:
    """What Ray alone would do with the same array."""

    def touch(self, x: Any) -> Any:
        """Its first element."""
        return x[:1].copy()


def private(pid: int) -> float:
    """MB of memory that a process has for itself."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_")) / 1e3


def case_weights(args: argparse.Namespace) -> Iterator[Row]:
    """40 MB of weights as tensors in each of 4 cells, over one `ray.put` and a `ray.get` in each of 4 processes."""
    env = fnrl.envs.CartPole(num_envs=1)
    parts = parts_of(env, 8, width=64)
    executor, node = cells(), Touch()
    run = Run(parts, executor)
    weights = first_algo(run, fnrl.key(0)).weights
    wide = dataclasses.replace(weights.params, vector=torch.zeros(10_000_000))
    with executor.opening(run, synchronous(gradients(collect), 4)):
        states = [executor.init(run.child(i), node, fnrl.key(i)) for i in range(4)]
    actor: Any = ray.remote(Holds)
    plain = [actor.options(num_cpus=0.05).remote() for _ in range(4)]
    ratios: list[float] = []
    before = [private(s.token.owner.pid) for s in states]
    for i in range(5 + 2 * args.rounds):

        def ours(i: int = i) -> None:
            sent = dataclasses.replace(weights, params=wide, version=i)
            calls = [executor.submit(run.child(j), node, s, sent) for j, s in enumerate(states)]
            states[:] = [executor.result(c)[0] for c in calls]

        def theirs() -> None:
            ref = ray.put(wide.vector.numpy())
            ray.get([p.touch.remote(ref) for p in plain])

        took = {}
        for f in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            begin = time.perf_counter()
            f()
            took[f.__name__] = time.perf_counter() - begin
        ratios.append(took["ours"] / took["theirs"])
    grown = max(private(s.token.owner.pid) - b for s, b in zip(states, before, strict=True))
    for j, s in enumerate(states):
        executor.close(run.child(j), node, s)
    yield Row("weights", "time over one put and 4 gets", statistics.median(ratios[5:]), 2.0, False, ratios[5:])
    yield Row("weights", "MB of its own that a cell gains by keeping them", grown, 20.0, False)


def proportional(root: int) -> float:
    """MB of the proportional set sizes of a process and all below it; the object store is shared memory of these."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    family, new = {root}, {root}
    while new:
        new = {p for p, parent in parents.items() if parent in new} - family
        family |= new
    total = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
    return total / 1e3


def case_memory(args: argparse.Namespace) -> Iterator[Row]:
    """Proportional set size of driver, cells and object store: growth from a fifth of the rounds to their end."""
    schemes = {
        "synchronous collectors": (centralised(gradients(synchronous(collect, 2))), 0.0),
        "synchronous gradients": (centralised(synchronous(gradients(collect), 2)), 0.0),
        "asynchronous collectors": (centralised(gradients(asynchronous(collect, 2))), 0.0),
        "asynchronous gradients": (centralised(asynchronous(gradients(collect), 2)), 0.0),
        "fast collectors, slow learner": (centralised(gradients(asynchronous(collect, 2))), 0.02),
    }
    parts = parts_of(fnrl.envs.CartPole(num_envs=16), 16, width=128)
    for name, (topology, pause) in schemes.items():
        scheme = fnrl.Scheme(parts, topology, executor=cells())
        state, first = scheme.init(fnrl.key(0)), 0.0
        for i in range(args.memory_rounds):
            if i == args.memory_rounds // 5:
                first = proportional(os.getpid())
            state, _ = scheme.step(state)
            time.sleep(pause)
        last = proportional(os.getpid())
        scheme.close(state)
        yield Row("memory", f"{name}: growth", last / first - 1.0, 0.05, False, {"first": first, "last": last})


if __name__ == "__main__":
    main(
        __doc__ or "",
        {
            "waiting": case_waiting,
            "halfcheetah": case_halfcheetah,
            "round": case_round,
            "weights": case_weights,
            "memory": case_memory,
        },
        workers={"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16, 32], "help": "of `waiting`"},
        steps={"type": int, "default": 25, "help": "of a rollout of `waiting`"},
        rollout={"type": int, "default": 256, "help": "steps of a rollout of `halfcheetah`"},
        rounds={"type": int, "default": 5, "help": "that are measured"},
        repeats={"type": int, "default": 5, "help": "alternations of `halfcheetah`"},
        memory_rounds={"type": int, "default": 1000, "help": "rounds of `memory`"},
    )
