"""IMPALA on CartPole: collectors that don't wait for the learner, in Ray cells, corrected by V-trace; then the same run
again in one process, bit for bit.

    python examples/impala.py [--steps 100000] [--workers 4]
"""

import argparse
import tempfile

import fnrl

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()

    env = fnrl.envs.CartPole(num_envs=8)
    algo = fnrl.A2C(lr=2e-3, entropy_coef=0.01, optimiser=fnrl.Adam())
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, fnrl.VTrace(steps=16))
    topology = fnrl.schemes.impala(workers=args.workers)
    scheme = fnrl.Scheme(parts, topology, executor=fnrl.Ray(collect=fnrl.Resources(cpus=0.25)))
    print(scheme)
    with tempfile.TemporaryDirectory() as directory:
        with fnrl.Learner(scheme, args.steps, directory) as learner:
            metrics = learner.train()
            reached, version = learner.state.weights, learner.state.version
            learner.print_info()
            lag = metrics["scheme/metrics/collection_lag"]
            print(f"{lag:.1f} versions behind; evaluated: {learner.evaluate(20).mean:.0f}")
        again = fnrl.Scheme(parts, topology, executor=fnrl.Recorded(directory))
        state = again.init(fnrl.key(0))
        while state.version < version:
            state, _ = again.step(state)
    same = fnrl.tree.same_bits(state.weights, reached)
    print(f"replayed {version} updates in one process: {'the same bits' if same else 'other bits'}")
    raise SystemExit(not same)
