"""The same training on two workers: in this process, and in Ray cells, with the same bits.

python examples/workers.py
"""

import torch

import fnrl
from fnrl import tree

torch.set_num_threads(1)


def main(updates: int = 33) -> list[str]:
    """Returns the paths of the leaves that differ between the two runs: none."""
    env = fnrl.envs.CartPole(num_envs=4)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(), fnrl.GAE(steps=64))
    topology = fnrl.centralised(fnrl.synchronous(fnrl.gradients(fnrl.collect), workers=2))
    gathered = []
    for executor in (fnrl.Inline(), fnrl.Ray(gradients=fnrl.Resources(cpus=0.5))):
        scheme = fnrl.Scheme(parts, topology, executor=executor)
        state, _ = scheme.step(scheme.init(fnrl.key(0)), updates=updates)
        gathered.append(scheme.gather(state))
        scheme.close(state)
    different = tree.different_bits(*gathered)
    print(f"{topology}: {updates} updates, leaves that differ: {different}")
    return different


if __name__ == "__main__":
    raise SystemExit(bool(main()))
