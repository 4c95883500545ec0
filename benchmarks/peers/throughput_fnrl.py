"""fnrl's side of the throughput benchmark: `ENV ENVS STEPS BATCH EPOCHS ROLLOUTS [WORKERS]` -> one line of JSON.

With WORKERS, so many collectors in Ray cells share the environments.
"""

import json
import sys
import time

import torch
from timed import INSIDE, Timed, peak_memory

import fnrl

name, (envs, steps, batch, epochs, rollouts) = sys.argv[1], map(int, sys.argv[2:7])
workers = int(sys.argv[7]) if sys.argv[7:] else 0
torch.set_num_threads(1)
normalise = name != "CartPole-v1"
env = fnrl.envs.gym(name, num_envs=envs // max(workers, 1), wrappers=(Timed,))
parts = fnrl.Parts(
    env,
    fnrl.OnPolicyActorCritic(env.spec),
    fnrl.PPO(epochs=epochs, minibatches=envs * steps // batch),
    fnrl.GAE(steps=steps),
    normalise_obs=fnrl.NormaliseObs() if normalise else None,
    scale_reward=fnrl.ScaleReward() if normalise else None,
)
node = fnrl.synchronous(fnrl.collect, workers) if workers else fnrl.collect
executor = fnrl.Ray() if workers else fnrl.Inline()
scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(node)), executor)
updates = parts.algo.plan.updates
state, _ = scheme.step(scheme.init(fnrl.key(0)), updates)  # warm-up
begin, inside = time.perf_counter(), INSIDE[0]
state, _ = scheme.step(state, updates * rollouts)
seconds = time.perf_counter() - begin
took = {"steps": envs * steps * rollouts, "seconds": seconds, "simulator": INSIDE[0] - inside, "memory": peak_memory()}
scheme.close(state)
print(json.dumps(took))
