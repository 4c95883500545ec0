"""fnrl's side of the benchmarks of lanes and of compilation: `WORK SEEDS PLANS eager|compiled [SHARDS [THREADS
[DEVICE]]]` -> JSON.

The work is `cartpole` (PPO on the pure environment), `cheetah` (PPO on MuJoCo's HalfCheetah-v5), `sac` or `dqn`. Lanes
of seeds where there are several; of `cheetah` a plan is a rollout and what it earns, of the off-policy works ten of
those. Over several SHARDS the lanes are sharded on Ray, and processor time is wall time times shards.
"""

import dataclasses
import gc
import json
import sys
import time
from collections import defaultdict

import torch
from timed import peak_memory

import fnrl


def parts_of(work: str) -> fnrl.Parts:
    """The settings that the peers' scripts have, too."""
    if work == "cartpole":
        env = fnrl.envs.CartPole(num_envs=4)
        algo = fnrl.PPO(lr=2.5e-4, entropy_coef=0.01, epochs=4, minibatches=4)
        return fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, fnrl.GAE(steps=128))
    if work == "cheetah":
        env = fnrl.envs.gym("HalfCheetah-v5", num_envs=8)
        algo = fnrl.PPO(epochs=4, minibatches=8)
        actor, storage = fnrl.OnPolicyActorCritic(env.spec), fnrl.GAE(steps=256)
        return fnrl.Parts(env, actor, algo, storage, fnrl.NormaliseObs(), fnrl.ScaleReward())
    replay = fnrl.Replay(capacity=50_000, warmup=512)
    if work == "sac":
        env = fnrl.envs.gym("Pendulum-v1")
        return fnrl.Parts(env, fnrl.OffPolicyActorCritic(env.spec), fnrl.SAC(batch=256), replay)
    env = fnrl.envs.gym("CartPole-v1")
    actor = fnrl.OffPolicyActorCritic(env.spec, policy=None, critics=1, explore=fnrl.EpsilonGreedy())
    return fnrl.Parts(env, actor, fnrl.DQN(batch=256, ratio=1.0, double=False), replay)


def settled(device: str) -> None:
    """Waits for what a GPU has still to do."""
    if device != "cpu":
        torch.cuda.synchronize(device)


work, seeds, plans, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
shards, threads = (int(x) for x in (*sys.argv[5:7], "1", "1")[:2])
device = [*sys.argv[7:], "cpu"][0]
torch.set_num_threads(threads)
parts = parts_of(work)
topology = fnrl.centralised(fnrl.gradients(fnrl.collect))
scheme = fnrl.Scheme(parts, topology, compile=how == "compiled", device=device)
if shards > 1:
    scheme = dataclasses.replace(scheme, topology=fnrl.sharded(topology, shards), executor=fnrl.Ray())
at_once = scheme.updates * (10 if work in ("sac", "dqn") else 1)
key = fnrl.key(0) if seeds == 1 else torch.stack([fnrl.key(i) for i in range(seeds)])
state, begin, compiling = scheme.init(key), time.perf_counter(), 0.0
for _ in range(3):
    state, info = scheme.step(state, at_once)
    compiling += info.report.get("time/compile", 0.0)
first, before = time.perf_counter() - begin, state.env_steps
report: dict[str, float] = defaultdict(float)
gc.collect()  # else one of a large heap falls, or doesn't, into what is timed
settled(device)
begin, cpu = time.perf_counter(), time.process_time()
together = 1 if shards == 1 else plans  # shards go on by themselves through one call, as JAX does
for _ in range(plans // together):
    state, info = scheme.step(state, together * at_once)
    for name, value in info.report.items():
        report[name] += value
settled(device)
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
cpu = cpu if shards == 1 else shards * seconds
took = {"steps": seeds * (state.env_steps - before), "updates": seeds * plans * at_once, "seconds": seconds}
took |= {"cpu": cpu, "first": first, "compile": compiling, "memory": peak_memory(), "report": report}
scheme.close(state)
print(json.dumps(took))
