"""fnrl's side of the throughput benchmark: `ENV ENVS STEPS BATCH EPOCHS ROLLOUTS` -> one line of JSON."""

import json
import sys
import time

import torch
from timed import INSIDE, Timed, peak_memory

import fnrl

name, (envs, steps, batch, epochs, rollouts) = sys.argv[1], map(int, sys.argv[2:])
torch.set_num_threads(1)
normalise = name != "CartPole-v1"
env = fnrl.envs.gym(name, num_envs=envs, wrappers=(Timed,))
parts = fnrl.Parts(
    env,
    fnrl.OnPolicyActorCritic(env.spec),
    fnrl.PPO(epochs=epochs, minibatches=envs * steps // batch),
    fnrl.GAE(steps=steps),
    normalise_obs=fnrl.NormaliseObs() if normalise else None,
    scale_reward=fnrl.ScaleReward() if normalise else None,
)
scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
updates = parts.algo.plan.updates
state, _ = scheme.step(scheme.init(fnrl.key(0)), updates)  # warm-up
begin, inside = time.perf_counter(), INSIDE[0]
state, _ = scheme.step(state, updates * rollouts)
seconds = time.perf_counter() - begin
took = {"steps": envs * steps * rollouts, "seconds": seconds, "simulator": INSIDE[0] - inside, "memory": peak_memory()}
print(json.dumps(took))
