"""Cells: how throughput grows with them, what a round costs besides its work, what weights and memory cost.

`waiting`, `round`, `weights` and `memory-*` bear a busy machine. `halfcheetah` and its like compare speeds end to end,
learning included, on two cores: while two collectors work the driver only waits, so they have both; while it learns,
they wait for the weights. A synchronous plan goes on only from what the last one has learnt, so nothing overlaps, and
the bound is (C + L) / (C / 2 + L) for C seconds of collecting and L of learning in one process. Each collector has half
of the environments, and a step of four costs a little more than half of a step of eight.
"""

import argparse
import contextlib
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
from harness import HERE, Row, besides, family, main, one_thread, peer_python
from schemes import TWELVE
from throughput import SB3, ratio

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
    yield from _halfcheetah(args, "halfcheetah", ("one", "collectors"), (1.6, 1.8))


def case_compiled(args: argparse.Namespace) -> Iterator[Row]:
    """The same with fnrl compiled; stable-baselines3 as it is."""
    yield from _halfcheetah(args, "compiled", ("one compiled", "collectors compiled"), (1.6, 1.8))


def case_topologies(args: argparse.Namespace) -> Iterator[Row]:
    """The same with two workers that compute gradients as well: a round of both for each minibatch."""
    yield from _halfcheetah(args, "topologies", ("one", "gradients", "decentralised"), None)


def _halfcheetah(
    args: argparse.Namespace, case: str, ours: tuple[str, ...], bars: tuple[float, float] | None
) -> Iterator[Row]:
    """Alternations of all; one beside which others used more than a tenth of a core is made again.

    The bound is what the parts come to that one process takes: collection by two at once, learning as it is.
    """
    setting = ["HalfCheetahBulletEnv-v0", *map(str, (8, args.rollout, 256, 4, args.rounds))]
    here, there = str(HERE / "peers" / "throughput_fnrl.py"), str(HERE / "peers" / "throughput_sb3.py")
    commands = {name: [sys.executable, here, *setting, *name.split()] for name in ours}
    if bars:
        commands |= {kind: [peer_python("sb3", [SB3]), there, *setting, kind] for kind in ("dummy", "subproc")}
    found: list[dict[str, Any]] = []
    for i in range(3 * args.repeats):
        took, used = {}, besides()
        for name in [*commands][:: 1 if i % 2 == 0 else -1]:
            out = subprocess.run(commands[name], check=True, env=one_thread(), capture_output=True, text=True).stdout
            took[name] = json.loads(out.strip().splitlines()[-1])
        others = used()
        rates = {name: t["steps"] / t["seconds"] for name, t in took.items()}
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"  {told} steps/s; others used {others:.2f} cores", flush=True)
        if others <= 0.1:
            found.append({**took, "steps/s": rates, "others": others})
        if len(found) == args.repeats:
            break
    if not found:
        raise SystemExit(f"{case}: the machine was never quiet")
    one, *two = ours
    for name in two:
        ratios = [f["steps/s"][name] / f["steps/s"][one] for f in found]
        yield ratio(case, f"{name} over one process", ratios, bars and bars[0], True, found)
        if bars:
            best = [f["steps/s"][name] / max(f["steps/s"][k] for k in ("dummy", "subproc")) for f in found]
            yield ratio(case, f"{name} over stable-baselines3's best vector", best, bars[1], True, None)
        yield Row(case, f"{name}, steps/s", statistics.median(f["steps/s"][name] for f in found))
    yield Row(case, f"{one}, steps/s", statistics.median(f["steps/s"][one] for f in found))
    if bars:
        bounds = [f[one]["seconds"] / (f[one]["seconds"] - f[one]["time/collect"] / 2) for f in found]
        yield Row(case, "bound: collection halved, the rest as it is", statistics.median(bounds))


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
class Bulk:
    """A node with a state of so many floats, that a step makes anew."""

    floats: int
    produces: ClassVar[str] = "updates"

    def init(self, run: Run, key: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(self.floats)

    def step(self, run: Run, state: torch.Tensor, weights: Any) -> Any:
        """One more in each place."""
        return state + 1.0, weights.params.vector[:1] + state[:1], Info({}, (), {})

    def gather(self, run: Run, state: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return state

    def close(self, run: Run, state: Any) -> None:
        """Nothing."""


def case_tasks(args: argparse.Namespace) -> Iterator[Row]:
    """A round of two workers of a pure node: in cells, and as Ray tasks on references to their states."""
    parts, executor = parts_of(fnrl.envs.CartPole(num_envs=1), 8), cells()
    run = Run(parts, executor)
    weights = first_algo(run, fnrl.key(0)).weights
    remote: Any = ray.remote
    with executor.opening(run, synchronous(gradients(collect), 2)):
        cell = {
            n: [executor.init(run.child(i), Bulk(n), fnrl.key(i)) for i in range(2)] for n in (1250, 125_000, 1_250_000)
        }
    for floats, states in cell.items():
        node = Bulk(floats)

        def work(state: Any, vector: Any) -> Any:
            return state + 1.0, vector[:1] + state[:1]

        task = remote(work).options(num_returns=2, num_cpus=0.05)
        refs = [ray.put(np.zeros(floats, np.float32)) for _ in range(2)]
        took: dict[str, list[float]] = {"cells": [], "tasks": []}
        for i in range(30 + 10 * args.rounds):
            sent = dataclasses.replace(weights, version=i)
            for how in ("cells", "tasks") if i % 2 == 0 else ("tasks", "cells"):
                begin = time.perf_counter()
                if how == "cells":
                    calls = [executor.submit(run.child(j), node, s, sent) for j, s in enumerate(states)]
                    states[:] = [executor.result(c)[0] for c in calls]
                else:
                    down = ray.put(weights.params.vector.numpy())
                    made = [task.remote(r, down) for r in refs]
                    ray.get([product for _, product in made])
                    refs = [state for state, _ in made]
                took[how].append(1e3 * (time.perf_counter() - begin))
        for how, times in took.items():
            what = f"a round of two as {how}, ms, states of {4 * floats / 1e3:g} kB"
            yield Row("tasks", what, statistics.median(times[30:]), detail=times[30:])
    for floats, states in cell.items():
        for j, s in enumerate(states):
            executor.close(run.child(j), Bulk(floats), s)


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
    total = 0
    for pid in family(root):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
    return total / 1e3


def memory(name: str, topology: Any, pause: float = 0.0) -> Any:
    """A scheme whose driver sleeps `pause` seconds after every update."""
    case = f"memory-{name}"

    def run(args: argparse.Namespace) -> Iterator[Row]:
        parts = parts_of(fnrl.envs.CartPole(num_envs=16), 16, width=128)
        scheme = fnrl.Scheme(parts, topology, executor=cells())
        state, marks = scheme.init(fnrl.key(0)), list[float]()
        for i in range(args.memory_rounds):
            if 5 * i % args.memory_rounds == 0:
                marks.append(proportional(os.getpid()))
            state, _ = scheme.step(state)
            time.sleep(pause)
        marks.append(proportional(os.getpid()))
        scheme.close(state)
        yield Row(case, "growth from a fifth of the rounds on", marks[-1] / marks[1] - 1.0, 0.05, False, marks)

    run.__doc__ = f"{topology}: growth of the proportional set size of driver, cells and object store"
    return run


MEMORY = {name: (topology,) for name, topology in TWELVE.items() if name != "one-central"}
MEMORY["slow-learner"] = centralised(gradients(asynchronous(collect, 2))), 0.02


if __name__ == "__main__":
    main(
        __doc__ or "",
        {
            "waiting": case_waiting,
            "halfcheetah": case_halfcheetah,
            "compiled": case_compiled,
            "topologies": case_topologies,
            "round": case_round,
            "tasks": case_tasks,
            "weights": case_weights,
            **{f"memory-{name}": memory(name, *how) for name, how in MEMORY.items()},
        },
        workers={"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16, 32], "help": "of `waiting`"},
        steps={"type": int, "default": 25, "help": "of a rollout of `waiting`"},
        rollout={"type": int, "default": 256, "help": "steps of a rollout of `halfcheetah`"},
        rounds={"type": int, "default": 5, "help": "that are measured"},
        repeats={"type": int, "default": 5, "help": "quiet alternations of `halfcheetah` and the like"},
        memory_rounds={"type": int, "default": 1000, "help": "rounds of `memory-*`"},
    )
