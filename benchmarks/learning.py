"""Learning: do the algorithms reach what is known to be reachable, and what a peer reaches run alike?

Every seed is a process of its own that keeps checkpoints under `--dir` and goes on where it stopped, so a run can be
cut and lengthened. A figure is the mean return of 100 deterministic evaluation episodes; a bar is on the
interquartile mean over seeds, or on the worst of them where it says so. Hyper-parameters were declared before the
runs (`fnrl/presets.py`), chosen on other seeds: one set for an environment (or the Bullet robots) and an algorithm.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harness import HERE, Row, main, one_thread, peer_python
from scipy.stats import trim_mean

import fnrl
from fnrl.checkpoint import Checkpoints
from fnrl.cli.options import build, options
from fnrl.presets import preset
from fnrl.results import improvement, improvement_interval, interval
from fnrl.testing import probes

SEEDS = (100, 200, 300, 400, 500)
BITS = 20
SAVE_EVERY = 50_000  # steps between two checkpoints of a seed
SB3 = "stable-baselines3==2.9.2"


def cartpole() -> fnrl.Scheme:
    """PPO as CleanRL and PureJaxRL run CartPole: 4 x 128 steps, 4 x 4 minibatches, 2x64 tanh."""
    env = fnrl.envs.gym("CartPole-v1", num_envs=4)
    algo = fnrl.PPO(lr=fnrl.Linear(1e-3, 0.0, steps=100_000), entropy_coef=0.01, epochs=4, minibatches=4)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, fnrl.GAE(steps=128))
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


def halfcheetah() -> fnrl.Scheme:
    """PPO with a plain Gaussian: 8 x 256 steps, 10 x 16 minibatches, 2x64 tanh, normalised observations and rewards."""
    env = fnrl.envs.gym("HalfCheetahBulletEnv-v0", num_envs=8)
    algo = fnrl.PPO(lr=3e-4, epochs=10, minibatches=16)
    parts = fnrl.Parts(
        env,
        fnrl.OnPolicyActorCritic(env.spec, log_std=-1.0),
        algo,
        fnrl.GAE(steps=256, gae_lambda=0.95),
        normalise_obs=fnrl.NormaliseObs(),
        scale_reward=fnrl.ScaleReward(),
    )
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


def reach() -> fnrl.Scheme:
    """SAC with hindsight as rl-baselines3-zoo runs PandaReach (future, 4 goals, discount 0.95, 1e-3, 256, 2x64,
    normalised), but half an update a step.
    """
    env, net = fnrl.envs.gym("PandaReach-v3"), fnrl.MLP((64, 64), torch.relu)
    parts = fnrl.Parts(
        env,
        fnrl.OffPolicyActorCritic(env.spec, net, net),
        fnrl.SAC(lr=1e-3, gamma=0.95, ratio=0.5),
        fnrl.Replay(capacity=100_000, steps=10, hindsight=fnrl.Hindsight(goals=4.0, strategy=fnrl.FutureGoals())),
        normalise_obs=fnrl.NormaliseObs(),
    )
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


def tuned(env: str, algo: str, steps: int) -> fnrl.Scheme:
    """An algorithm as `fnrl train --compile --env ENV --algo ALGO --steps STEPS` sets it up."""
    found = options(env, preset(env, algo), {}, steps)
    values = {o.name: o.read(o.default) if o.read and isinstance(o.default, str) else o.default for o in found}
    return fnrl.Scheme(build(env, values), fnrl.centralised(fnrl.gradients(fnrl.collect)), compile=True)


def bits(hindsight: fnrl.Hindsight | None) -> fnrl.Scheme:
    """DQN on bit flipping: 64 environments, an update in 32 steps of 128 samples, one layer of 256."""
    env, net = fnrl.envs.BitFlipping(BITS, num_envs=64), fnrl.MLP((256,), torch.relu)
    explore = fnrl.EpsilonGreedy(epsilon=0.2)
    parts = fnrl.Parts(
        env,
        fnrl.OffPolicyActorCritic(env.spec, None, net, critics=1, explore=explore),
        fnrl.DQN(lr=1e-3, gamma=0.95, ratio=1 / 32, batch=128, target_every=50),
        fnrl.Replay(capacity=1_000_000, steps=4, hindsight=hindsight),
    )
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


PROBES = (
    probes.ConstantReward,
    probes.ObservationReward,
    probes.DiscountedReward,
    probes.ActionReward,
    probes.ActionObservationReward,
)
# of case, environment, algorithm: steps, and the bar on the mean of three seeds
OFF_POLICY = {
    "sac-pendulum": ("Pendulum-v1", "SAC", 20_000, -160.0),
    "td3-pendulum": ("Pendulum-v1", "TD3", 30_000, -170.0),
    "ddpg-pendulum": ("Pendulum-v1", "DDPG", 30_000, -170.0),
    "dqn-cartpole": ("CartPole-v1", "DQN", 60_000, 475.0),
    "sac-halfcheetah": ("HalfCheetahBulletEnv-v0", "SAC", 300_000, 1400.0),
}
SCHEMES = {
    **{case: functools.partial(tuned, env, algo, steps) for case, (env, algo, steps, _) in OFF_POLICY.items()},
    "ppo-cartpole": cartpole,
    "ppo-halfcheetah": halfcheetah,
    "her-reach": reach,
    "her-bitflip": functools.partial(bits, fnrl.Hindsight()),
    "dqn-bitflip": functools.partial(bits, None),
}


def train(name: str, seed: int, marks: list[int], directory: Path) -> None:
    """Trains one seed up to the last mark, from its newest checkpoint if there is one; evaluates at each mark."""
    torch.set_num_threads(1)
    scheme = SCHEMES[name]()
    home = directory / name / str(seed)
    told = home / "evaluations.json"
    with Checkpoints(home, keep=1) as store:
        done: dict[str, list[float]] = json.loads(told.read_text()) if told.exists() else {}
        state = scheme.restore(store.newest().state) if store.paths() else scheme.init(fnrl.key(seed))
        saved = state.env_steps
        for mark in marks:
            while state.env_steps < mark:
                state, _ = scheme.step(state, scheme.updates)
                if state.env_steps - saved >= SAVE_EVERY:
                    saved = state.env_steps
                    store.save(scheme.gather(state), step=saved)
            if str(mark) not in done:
                key = fnrl.random.fold_in(fnrl.key(seed), 0xE7A1)
                done[str(mark)] = fnrl.evaluate(scheme.parts, state.weights, key, episodes=100).returns.tolist()
                store.save(scheme.gather(state), step=state.env_steps)
                told.write_text(json.dumps(done))
        scheme.close(state)


def seeds_of(
    name: str, args: argparse.Namespace, marks: list[int], seeds: tuple[int, ...] = SEEDS
) -> dict[int, dict[str, list[float]]]:
    """Evaluations of every seed at the marks, by as many processes as asked."""

    def one(seed: int) -> dict[str, list[float]]:
        told = args.dir / name / str(seed) / "evaluations.json"
        if not has(told, marks):
            command = [
                sys.executable,
                __file__,
                "--seed-run",
                name,
                str(seed),
                *map(str, marks),
                "--dir",
                str(args.dir),
            ]
            subprocess.run(command, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
        return json.loads(told.read_text())

    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(seeds, pool.map(one, seeds), strict=True))


def has(told: Path, marks: list[int]) -> bool:
    """Whether all marks have been evaluated."""
    return told.exists() and {str(m) for m in marks} <= set(json.loads(told.read_text()))


def iqm(scores: list[float]) -> float:
    """Interquartile mean over seeds (arXiv 2108.13264)."""
    return float(trim_mean(scores, 0.25))


def scores_at(found: dict[int, dict[str, list[float]]], mark: int) -> dict[int, float]:
    """Mean return of each seed."""
    return {seed: sum(r[str(mark)]) / len(r[str(mark)]) for seed, r in found.items()}


def case_cartpole(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on CartPole-v1 (hosted), 100k steps, 5 seeds: at least 475."""
    scores = scores_at(seeds_of("ppo-cartpole", args, [100_000]), 100_000)
    yield Row("ppo-cartpole", "IQM of 5 seeds at 100k", iqm(list(scores.values())), 475.0, detail=scores)


def case_seeds(args: argparse.Namespace) -> Iterator[Row]:
    """32 seeds of PPO on pure CartPole as one compiled program, 200k steps each: at least 31 end above 475."""
    torch.set_num_threads(1)
    steps, env = 200_000, fnrl.envs.CartPole(num_envs=4)
    algo = fnrl.PPO(lr=fnrl.Linear(1e-3, 0.0, steps=steps), entropy_coef=0.01, epochs=4, minibatches=4)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, fnrl.GAE(steps=128))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)), compile=True)
    begin, used = time.perf_counter(), time.process_time()
    state, _ = scheme.step(scheme.init(fnrl.seeds(32)), algo.plan.updates)
    first = time.perf_counter() - begin
    while state.env_steps < steps:
        state, _ = scheme.step(state, algo.plan.updates)
    wall, used = time.perf_counter() - begin, time.process_time() - used
    many, keys = dataclasses.replace(env, num_envs=100), fnrl.random.split(fnrl.key(0xE7A1), 32)
    scores = fnrl.evaluate(parts, state.weights, keys, 100, many).returns.mean(-1)
    yield Row(
        "seeds-cartpole", "seeds of 32 above 475 at 200k", int((scores > 475.0).sum()), 31, detail=scores.tolist()
    )
    yield Row("seeds-cartpole", "seconds of all 32 together", wall, detail={"first plan": first, "of the CPU": used})
    yield Row("seeds-cartpole", "environment steps a second, all together", 32 * state.env_steps / wall)


def case_halfcheetah(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on HalfCheetahBulletEnv-v0, 5 seeds: at least 600 at 300k and 1500 at 1M; not below stable-baselines3 run
    alike.
    """
    bars = {m: bar for m, bar in ((300_000, 600.0), (1_000_000, 1500.0)) if m <= args.until}
    found = seeds_of("ppo-halfcheetah", args, list(bars))
    ours = {mark: scores_at(found, mark) for mark in bars}
    for mark, bar in bars.items():
        yield Row(
            "ppo-halfcheetah", f"IQM of 5 seeds at {mark}", iqm(list(ours[mark].values())), bar, detail=ours[mark]
        )
    if args.peer:
        peer = sb3(args, list(bars))
        for mark in bars:
            theirs = scores_at(peer, mark)
            yield Row("ppo-halfcheetah", f"stable-baselines3, IQM at {mark}", iqm(list(theirs.values())), detail=theirs)
            gap = iqm(list(ours[mark].values())) - iqm(list(theirs.values()))
            yield Row("ppo-halfcheetah", f"fnrl minus stable-baselines3 at {mark}", gap, 0.0)


def case_halfcheetah_seeds(args: argparse.Namespace) -> Iterator[Row]:
    """The same at 300k with `--seeds` seeds each, for five leave open which is above: how sure is a difference?"""
    mark, case, seeds = 300_000, "ppo-halfcheetah-seeds", tuple(range(100, 100 * args.seeds + 1, 100))
    mine = list(scores_at(seeds_of("ppo-halfcheetah", args, [mark], seeds), mark).values())
    theirs = list(scores_at(sb3(args, [mark], seeds), mark).values())
    for name, scores in (("fnrl", mine), ("stable-baselines3", theirs)):
        low, high = interval([scores])
        yield Row(
            case, f"{name}, IQM of {len(scores)} seeds at {mark} [{low:.0f}, {high:.0f}]", iqm(scores), detail=scores
        )
    better = improvement([mine], [theirs])
    low, high = improvement_interval([mine], [theirs])
    yield Row(case, f"chance that a seed of fnrl is above one of theirs [{low:.2f}, {high:.2f}]", better)
    yield Row(case, "and the upper end of that: not below 0.5", high, 0.5)


def sb3(
    args: argparse.Namespace, marks: list[int], seeds: tuple[int, ...] = SEEDS
) -> dict[int, dict[str, list[float]]]:
    """The peer's evaluations: the same settings, seeds, marks and numbers of episodes."""

    def one(seed: int) -> dict[str, list[float]]:
        home = args.dir / "sb3-halfcheetah"
        kept = [x for x in sorted(home.glob(f"{seed}-*.json")) if has(x, marks)]
        told = kept[0] if kept else home / f"{seed}-{max(marks)}.json"
        if not kept:
            told.parent.mkdir(parents=True, exist_ok=True)
            command = [python, str(HERE / "peers" / "sb3_ppo_learning.py"), str(seed), str(told), *map(str, marks)]
            subprocess.run(command, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
        return json.loads(told.read_text())

    python = peer_python("sb3", [SB3])
    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(seeds, pool.map(one, seeds), strict=True))


def case_probes(args: argparse.Namespace) -> Iterator[Row]:
    """PPO on the five probing environments, discrete and continuous: every value within 0.05 of the known one."""
    torch.set_num_threads(1)
    for make in PROBES:
        for continuous in (False, True):
            env = make(num_envs=32, continuous=continuous)
            actor = fnrl.OnPolicyActorCritic(env.spec, fnrl.MLP((32,)), fnrl.MLP((32,)), log_std=-1.0)
            algo = fnrl.PPO(lr=fnrl.Linear(1e-2, 0.0, steps=300 * 512), gamma=0.9, entropy_coef=0.0)
            parts = fnrl.Parts(env, actor, algo, fnrl.GAE(steps=16))
            scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
            state, _ = scheme.step(scheme.init(fnrl.key(0)), 300 * algo.plan.updates)
            obs = env.observations
            no = torch.zeros(1, len(obs), dtype=torch.bool)
            value, _ = actor.values(state.weights.params, obs[None], actor.memory(len(obs)), no)
            off = float((value[0] - env.value(obs, 0.9)).abs().max())
            kind = "continuous" if continuous else "discrete"
            yield Row("probes", f"{make.__name__}, {kind}: error of the value", off, 0.05, above=False)


def off_policy(case: str) -> Callable[[argparse.Namespace], Iterator[Row]]:
    """The case of an off-policy algorithm with its preset, 3 seeds."""
    env, algo, steps, bar = OFF_POLICY[case]

    def run(args: argparse.Namespace) -> Iterator[Row]:
        scores = scores_at(seeds_of(case, args, [steps], SEEDS[:3]), steps)
        yield Row(case, f"mean of 3 seeds at {steps}", iqm(list(scores.values())), bar, detail=scores)

    run.__doc__ = f"{algo} on {env}, {steps} steps, 3 seeds: at least {bar:g}."
    return run


def case_reach(args: argparse.Namespace) -> Iterator[Row]:
    """SAC with hindsight on PandaReach-v3, 20k steps, 5 of 5 seeds: at least -2.0."""
    scores = scores_at(seeds_of("her-reach", args, [20_000]), 20_000)
    yield Row("her-reach", "worst of 5 seeds at 20k", min(scores.values()), -2.0, detail=scores)


def case_bits(args: argparse.Namespace) -> Iterator[Row]:
    """DQN on 20 bits, 1M steps, 3 seeds: at least 95 % solved with hindsight, at most 5 % without."""
    for name, what, bar in (("her-bitflip", "with hindsight", 95.0), ("dqn-bitflip", "without", 5.0)):
        found = seeds_of(name, args, [1_000_000], SEEDS[:3])
        solved = {seed: 100.0 * sum(x > -BITS for x in r["1000000"]) / len(r["1000000"]) for seed, r in found.items()}
        above = bar > 50.0
        worst = (min if above else max)(solved.values())
        yield Row("her-bitflip", f"% solved {what}, worst of 3 seeds at 1M", worst, bar, above, solved)


if __name__ == "__main__":
    if "--seed-run" in sys.argv:
        at = sys.argv.index("--seed-run")
        to = sys.argv.index("--dir")
        train(sys.argv[at + 1], int(sys.argv[at + 2]), [int(m) for m in sys.argv[at + 3 : to]], Path(sys.argv[to + 1]))
    else:
        main(
            __doc__ or "",
            {
                "probes": case_probes,
                "ppo-cartpole": case_cartpole,
                "seeds-cartpole": case_seeds,
                "ppo-halfcheetah": case_halfcheetah,
                "ppo-halfcheetah-seeds": case_halfcheetah_seeds,
                **{case: off_policy(case) for case in OFF_POLICY},
                "her-reach": case_reach,
                "her-bitflip": case_bits,
            },
            dir={"type": Path, "default": Path("runs/benchmarks"), "help": "where runs are kept"},
            jobs={"type": int, "default": 2, "help": "seeds trained at once"},
            seeds={"type": int, "default": 20, "help": "seeds each of ppo-halfcheetah-seeds"},
            until={"type": int, "default": 1_000_000, "help": "leave out marks beyond this many steps"},
            peer={"action": argparse.BooleanOptionalAction, "default": True, "help": "run stable-baselines3 alike"},
        )
