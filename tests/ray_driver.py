"""A training run on a cluster of its own, for tests that interrupt it: python ray_driver.py DIRECTORY."""

import sys

import torch
from ray_cases import Once, on_policy, on_ray

import fnrl
from fnrl.topology import centralised, collect, gradients, synchronous

torch.set_num_threads(1)

if __name__ == "__main__":
    env = fnrl.envs.gym(Once, num_envs=2, processes=True)
    scheme = fnrl.Scheme(on_policy(env), centralised(gradients(synchronous(collect, 2))), on_ray())
    learner = fnrl.Learner(scheme, target_steps=10**9, log_dir=sys.argv[1])
    learner.step(9)
    print("running", flush=True)
    learner.train(progress=False)
