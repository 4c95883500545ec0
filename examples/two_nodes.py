"""Two nodes on one machine: one is removed in the middle of the run, and no bit of the result is another.

python examples/two_nodes.py
"""

import ray
import torch
from ray.cluster_utils import Cluster

import fnrl
from fnrl import tree

torch.set_num_threads(1)


def main(updates: int = 33) -> tuple[list[str], dict[str, float]]:
    """Returns the paths of the leaves that differ from a run in one process, none, and the faults that were met."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    other = cluster.add_node(num_cpus=2)
    env = fnrl.envs.CartPole(num_envs=4, time_limit=50)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(minibatches=2), fnrl.GAE(steps=64))
    topology = fnrl.centralised(fnrl.synchronous(fnrl.gradients(fnrl.collect), workers=4))
    half = fnrl.Resources(cpus=0.5, placement="SPREAD")  # one node alone has room for all four
    try:
        scheme = fnrl.Scheme(parts, topology, executor=fnrl.Ray(address=cluster.address, gradients=half))
        state, faults = scheme.init(fnrl.key(0)), dict[str, float]()
        for update in range(updates):
            if update == updates // 2:
                cluster.remove_node(other)
            state, info = scheme.step(state)
            faults |= {name: n for name, n in info.report.items() if name.startswith("faults/")}
        there = scheme.gather(state)
        scheme.close(state)
    finally:
        ray.shutdown()
        cluster.shutdown()
    alone = fnrl.Scheme(parts, topology)
    here, _ = alone.step(alone.init(fnrl.key(0)), updates=updates)
    different = tree.different_bits(alone.gather(here), there)
    print(f"{topology}: {updates} updates, faults: {faults}, leaves that differ: {different}")
    return different, faults


if __name__ == "__main__":
    main()
