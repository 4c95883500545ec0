"""fnrl's side of the throughput benchmark: `ENV ENVS STEPS BATCH EPOCHS ROLLOUTS [WHERE] [compiled]` -> a line of JSON.

WHERE is `one` (process), or what two Ray cells do, which share the environments: `collectors`; `gradients`, computed on
half of each minibatch and averaged; or `decentralised`, where they apply the average as well.
"""

import gc
import json
import sys
import time

import torch
from timed import INSIDE, Timed, peak_memory

import fnrl

name, (envs, steps, batch, epochs, rollouts) = sys.argv[1], map(int, sys.argv[2:7])
where = [*sys.argv[7:], "one"][0]
torch.set_num_threads(1)
normalise = name != "CartPole-v1"
env = fnrl.envs.gym(name, num_envs=envs if where == "one" else envs // 2, wrappers=(Timed,))
parts = fnrl.Parts(
    env,
    fnrl.OnPolicyActorCritic(env.spec),
    fnrl.PPO(epochs=epochs, minibatches=envs * steps // batch),
    fnrl.GAE(steps=steps),
    normalise_obs=fnrl.NormaliseObs() if normalise else None,
    scale_reward=fnrl.ScaleReward() if normalise else None,
)
collect, gradients, synchronous = fnrl.collect, fnrl.gradients, fnrl.synchronous
topology = {
    "one": lambda: fnrl.centralised(gradients(collect)),
    "collectors": lambda: fnrl.centralised(gradients(synchronous(collect, 2))),
    "gradients": lambda: fnrl.centralised(synchronous(gradients(collect), 2)),
    "decentralised": lambda: fnrl.decentralised(gradients(collect), 2),
}[where]()
executor = fnrl.Inline() if where == "one" else fnrl.Ray()
scheme = fnrl.Scheme(parts, topology, executor, compile="compiled" in sys.argv)
updates = parts.algo.plan.updates
state, _ = scheme.step(scheme.init(fnrl.key(0)), updates)  # warm-up
gc.collect()  # else one of a large heap falls, or doesn't, into what is timed
begin, inside = time.perf_counter(), INSIDE[0]
state, info = scheme.step(state, updates * rollouts)
seconds = time.perf_counter() - begin
took = {"steps": envs * steps * rollouts, "seconds": seconds, "simulator": INSIDE[0] - inside, "memory": peak_memory()}
took |= {name: spent for name, spent in info.report.items() if name.startswith("time/")}
scheme.close(state)
print(json.dumps(took))
