"""Throughput against stable-baselines3 and JAX: the same settings, alternated in one run.

A process of fnrl or of stable-baselines3 has one thread, JAX as many as it likes; each side has the whole machine, two
cores. Many seeds of fnrl are two shards, a process each (`fnrl.sharded`, on Ray). JAX is measured in its two ways:
seeds vmapped (`jax`), and that split over two host devices by `jax.shard_map` (`jax, two devices`). stable-baselines3
trains one seed after another, and on MuJoCo two at a time.

Ratios are medians over `--repeats` alternations, with their spread. "Outside the simulator" is wall time less the time
spent inside the simulator's own `step` and `reset`, measured by the same wrapper in both. Every process has a time
limit: one that hangs is told and left out. `--clock cpu` compares processor time, for a machine that is busy besides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import HERE, Row, besides, main, one_thread, peer_python, pinned

SB3, JAX = "stable-baselines3==2.9.2", ["jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8"]


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


def ratio(case: str, what: str, values: list[float], bar: float | None, above: bool, detail: Any) -> Row:
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


# -- lanes and compilation ------------------------------------------------------------------------------------------

Command = list[str]


def ours(
    work: str,
    seeds: int,
    plans: int,
    how: str = "compiled",
    python: str = sys.executable,
    shards: int = 1,
    threads: int = 1,
    device: str = "cpu",
) -> Command:
    """fnrl's process, with others for its shards if there are several."""
    settings = map(str, (seeds, plans, how, shards, threads, device))
    return [python, str(HERE / "peers" / "lanes_fnrl.py"), work, *settings]


def in_jax(seeds: int, rollouts: int, devices: int = 1) -> Command:
    """That of PPO jitted whole."""
    script = HERE / "peers" / "throughput_jax.py"
    return [peer_python("jax", JAX, torch=False), str(script), *map(str, (seeds, rollouts, devices))]


def in_jax_on_gpu(seeds: int, rollouts: int, python: str | None) -> Command:
    """The same on a GPU, by an interpreter that has JAX for it, or one made here."""
    python = python or peer_python("jax-gpu", ["jax[cuda13]==0.10.2", "optax==0.2.8"], torch=False)
    return [python, str(HERE / "peers" / "throughput_jax.py"), *map(str, (seeds, rollouts, 1, "cuda"))]


def in_sb3(env: str, envs: int, steps: int, batch: int, rollouts: int, python: str | None = None) -> Command:
    """That of stable-baselines3's PPO."""
    setting = [env, *map(str, (envs, steps, batch, 4, rollouts))]
    return [python or peer_python("sb3", [SB3]), str(HERE / "peers" / "throughput_sb3.py"), *setting]


def measure(commands: list[Command], limit: float, **variables: str) -> list[dict[str, Any]] | None:
    """What some processes, started together, print; None if one fails or takes longer than `limit` seconds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(HERE / ".peers" / "jax-cache")}  # its first run is not timed
    env = {**one_thread(), "PYTHONPATH": str(HERE.parent), **cache, **variables}
    running = [
        subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    found = []
    try:
        for process in running:
            out, err = process.communicate(timeout=limit)
            if process.returncode:
                print(f"  failed: {' '.join(process.args)}\n{err[-2000:]}", flush=True)  # type: ignore[arg-type]
                return None
            found.append(json.loads(out.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        print(f"  no answer within {limit:g} s: {' '.join(commands[0])}", flush=True)
        return None
    finally:
        for process in running:
            process.kill()
    return found


def rates(args: argparse.Namespace, what: str, sides: dict[str, list[Command]]) -> dict[str, list[float]]:
    """`what` a second of each side, in `--repeats` alternations. One beside which other processes used more than a
    tenth of a core is made again (unless processor time is compared), up to three times as many in all.
    """
    told: dict[str, list[float]] = {name: [] for name in sides}
    clock = "seconds" if args.clock == "wall" else "cpu"
    for i in range(3 * args.repeats):
        order, used = list(sides) if i % 2 == 0 else list(reversed(sides)), besides()
        found = {name: measure(sides[name], args.limit) for name in order}
        others = used()
        each = {n: sum(m[what] / m[clock] for m in all_of) if all_of else 0.0 for n, all_of in found.items()}
        print(f"  { ({n: round(r, 1) for n, r in each.items()}) }; others used {others:.2f} cores", flush=True)
        if others <= 0.1 or clock == "cpu":
            for name, rate in each.items():
                told[name].append(rate)
        if min(map(len, told.values())) == args.repeats:
            break
    return told


def against(case: str, what: str, mine: list[float], theirs: list[float], bar: float | None) -> Iterator[Row]:
    """The row of a ratio and its figures; none where the peer gave nothing, one that falls short where fnrl did."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if b > 0.0]
    if not pairs:
        print(f"  {case}: nothing to compare (no quiet minute, or a peer that gave nothing)", flush=True)
        return
    yield ratio(case, what, [a / b for a, b in pairs], bar, True, pairs)


def case_lanes_jax_1(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on pure CartPole, 4 x 128, compiled, against the same jitted whole in JAX: 1 seed."""
    told = rates(args, "steps", {"fnrl": [ours("cartpole", 1, 60)], "jax": [in_jax(1, 60)]})
    yield from against("lanes-jax-1", "1 seed: steps/s over jax", told["fnrl"], told["jax"], 0.3)


def case_lanes_jax_8(args: argparse.Namespace) -> Iterator[Row]:
    """The same with 8 seeds."""
    yield from many_against_jax(args, "lanes-jax-8", 8, 40, (8,), 0.8)


def case_lanes_jax_32(args: argparse.Namespace) -> Iterator[Row]:
    """The same with 32 seeds, against what JAX reaches with 8 or 32 (16 lie between)."""
    yield from many_against_jax(args, "lanes-jax-32", 32, 20, (8, 32), 1.2)


def many_against_jax(
    args: argparse.Namespace, case: str, seeds: int, plans: int, counts: tuple[int, ...], bar: float
) -> Iterator[Row]:
    """The bar is for JAX's seeds vmapped; the row of two devices says how the other way compares."""
    peers = {d: {f"jax {n} x{d}": [in_jax(n, plans, d)] for n in counts} for d in (1, 2)}
    told = rates(args, "steps", {"fnrl": [ours("cartpole", seeds, plans, shards=2)], **peers[1], **peers[2]})
    vmapped, split = ([max(r) for r in zip(*(told[n] for n in peers[d]), strict=True)] for d in (1, 2))
    name = f"{seeds} seeds: steps/s over jax" + (" at its best" if len(counts) > 1 else "")
    yield from against(case, name, told["fnrl"], vmapped, bar)
    yield from against(case, f"{name}, two devices", told["fnrl"], split, None)


def case_lanes_gpu(args: argparse.Namespace) -> Iterator[Row]:
    """The same on a GPU with 1, 32 and 1,024 seeds, against JAX on it; nothing where there is none."""
    if not torch.cuda.is_available():
        print("  no GPU: lanes-gpu is not measured")
        return
    on = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    for seeds, plans in ((1, 60), (32, 60), (1024, 20)):
        mine = [ours("cartpole", seeds, plans, "compiled", device="cuda")]
        told = rates(args, "steps", {"fnrl": mine, "jax": [in_jax_on_gpu(seeds, plans, args.jax)]})
        for side, found in told.items():
            if found:
                yield Row("lanes-gpu", f"{seeds} seeds, {side}: steps/s", statistics.median(found), detail=on)
        yield from against("lanes-gpu", f"{seeds} seeds: steps/s over jax", told["fnrl"], told["jax"], None)


def case_lanes_sb3(args: argparse.Namespace) -> Iterator[Row]:
    """The same against stable-baselines3, whose seeds run one after another: 1 and 32 seeds."""
    sides = {"one": [ours("cartpole", 1, 60)], "many": [ours("cartpole", 32, 20, shards=2)]}
    told = rates(args, "steps", {**sides, "sb3": [in_sb3("CartPole-v1", 4, 128, 128, 10)]})
    yield from against("lanes-sb3", "1 seed: steps/s over stable-baselines3", told["one"], told["sb3"], 8.0)
    yield from against("lanes-sb3", "32 seeds: steps/s over stable-baselines3", told["many"], told["sb3"], 40.0)


def case_lanes_mujoco(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on HalfCheetah-v5 (MuJoCo), 8 x 256: 8 seeds in two processes of lanes, theirs two processes at a time."""
    needs = [
        SB3,
        "mujoco==4.0.0",
        "imageio==2.38.1",
        *(f"{p}=={pinned(p)}" for p in ("packaging", "safetensors", "filelock", "rich")),
    ]
    python = peer_python("mujoco", needs)
    sb3 = in_sb3("HalfCheetah-v5", 8, 256, 256, 4, python)
    told = rates(args, "steps", {"fnrl": [ours("cheetah", 4, 2, "compiled", python)] * 2, "sb3": [sb3] * 2})
    yield from against("lanes-mujoco", "8 seeds: steps/s over stable-baselines3", told["fnrl"], told["sb3"], 1.6)


THREADS = (1, 2)
PLANS = {"sac": 30, "dqn": 150}  # of ten updates each, about two seconds
FASTER = "updates/s over stable-baselines3, each at its faster thread count"


def off_policy(args: argparse.Namespace, work: str, sides: dict[str, Command]) -> Iterator[tuple[str, Any, Any]]:
    """The updates a second of each side that is named `NAME THREADS`, at the better of its thread counts, by name; and
    stable-baselines3's alike.
    """
    script = [peer_python("sb3", [SB3]), str(HERE / "peers" / "off_policy_sb3.py"), work, str(10 * PLANS[work])]
    told = rates(
        args, "updates", {n: [c] for n, c in sides.items()} | {f"sb3 {n}": [[*script, str(n)]] for n in THREADS}
    )
    names = dict.fromkeys(side.rsplit(" ", 1)[0] for side in told)
    best = {
        name: [max(each) for each in zip(*(told[s] for s in told if s.rsplit(" ", 1)[0] == name), strict=True)]
        for name in names
    }
    yield from ((name, best[name], best["sb3"]) for name in names if name != "sb3")


def case_off_policy_sac(args: argparse.Namespace) -> Iterator[Row]:
    """SAC on Pendulum-v1, batch 256, 2 x 256, an update a step: updates/s, from end to end."""
    yield from _off_policy(args, "sac")


def case_off_policy_dqn(args: argparse.Namespace) -> Iterator[Row]:
    """DQN on CartPole-v1, likewise."""
    yield from _off_policy(args, "dqn")


def _off_policy(args: argparse.Namespace, work: str) -> Iterator[Row]:
    hows = {"eager": 1.0, "compiled": 1.6}
    sides = {f"{how} {n}": ours(work, 1, PLANS[work], how, threads=n) for how in hows for n in THREADS}
    for how, mine, theirs in off_policy(args, work, sides):
        yield from against(f"off-policy-{work}", f"{how}: {FASTER}", mine, theirs, hows[how])


def case_off_policy_lanes(args: argparse.Namespace) -> Iterator[Row]:
    """The same SAC, 8 seeds compiled in two shards of a thread each; theirs one after another."""
    for _, mine, theirs in off_policy(args, "sac", {"lanes 1": ours("sac", 8, 5, shards=2)}):
        yield from against("off-policy-lanes", f"8 seeds: {FASTER}", mine, theirs, 3.0)


def case_compiling(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds of compilation of PPO on pure CartPole, 8 seeds: with nothing on disk, and in a later process."""
    with tempfile.TemporaryDirectory() as cache:
        for when, bar in (("cold", 60.0), ("warm", 12.0)):
            places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}  # headers are kept beside the temporary files
            found = measure([ours("cartpole", 8, 1)], 4 * args.limit, **places)
            seconds = found[0]["compile"] if found else float("inf")
            yield Row("compiling", f"seconds to compile, {when}", seconds, bar, False, found)


def case_memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of an extra seed of PPO on pure CartPole, eager and compiled."""
    for how in ("eager", "compiled"):
        found = {n: measure([ours("cartpole", n, 2, how)], args.limit) for n in (2, 66)}
        few, many = (m[0]["memory"] if m else float("nan") for m in found.values())
        yield Row("memory", f"MB for each extra CartPole seed, {how}", (many - few) / 64, 1.0, False, found)


def case_breakdown(args: argparse.Namespace) -> Iterator[Row]:
    """Where the time of PPO on pure CartPole goes for 1, 8 and 32 seeds, and its FLOP/s over those of a matmul."""
    peak = matmul_rate()
    yield Row("breakdown", "GFLOP/s of a 256 x 256 x 256 product, one thread", peak / 1e9)
    for seeds in (1, 8, 32):
        for how in ("eager", "compiled"):
            found = measure([ours("cartpole", seeds, 10, how)], args.limit)
            if found is None:
                continue
            took, name = found[0], f"{seeds} seeds, {how}"
            scale = 1e3 / (took["updates"] / seeds / 16)
            parts = {n: x * scale for n, x in took["report"].items() if n != "time/compile"}
            for part, ms in parts.items():
                yield Row("breakdown", f"{name}: {part.removeprefix('time/')}, ms a plan", ms)
            yield Row("breakdown", f"{name}: host, ms a plan", took["seconds"] * scale - sum(parts.values()))
            flops = took["updates"] * 128 * 3 * 2 * (2 * (4 * 64 + 64 * 64) + 64 * 3)
            spent = took["report"]["time/gradient"] + took["report"]["time/apply"]
            yield Row("breakdown", f"{name}: FLOP/s of updates over the product's", flops / spent / peak)


def matmul_rate() -> float:
    """FLOP/s of a product of 256 x 256 float32 matrices on one thread, the best of many."""
    torch.set_num_threads(1)
    a, times = torch.randn(256, 256), []
    for _ in range(200):
        begin = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - begin)
    return 2 * 256**3 / min(times)


if __name__ == "__main__":
    main(
        __doc__ or "",
        {
            "cartpole": case_cartpole,
            "halfcheetah": case_halfcheetah,
            "lanes-jax-1": case_lanes_jax_1,
            "lanes-jax-8": case_lanes_jax_8,
            "lanes-jax-32": case_lanes_jax_32,
            "lanes-gpu": case_lanes_gpu,
            "lanes-sb3": case_lanes_sb3,
            "lanes-mujoco": case_lanes_mujoco,
            "off-policy-sac": case_off_policy_sac,
            "off-policy-dqn": case_off_policy_dqn,
            "off-policy-lanes": case_off_policy_lanes,
            "compiling": case_compiling,
            "memory": case_memory,
            "breakdown": case_breakdown,
        },
        repeats={"type": int, "default": 5, "help": "alternations of fnrl and the peer"},
        limit={"type": float, "default": 300.0, "help": "seconds that one process may take"},
        jax={"metavar": "PYTHON", "help": "an interpreter that has JAX for the GPU; else one is made"},
        clock={"choices": ("wall", "cpu"), "default": "wall", "help": "which time is compared"},
    )
