"""One level down: collect, append, batches, grad and apply called by hand, without any topology.

python examples/loop_parts.py
"""

import torch

import fnrl
from fnrl.apply import apply_update, first_algo
from fnrl.collect import collect_rollout, first_state
from fnrl.lift import Run
from fnrl.types import Update

torch.set_num_threads(1)


def main(env_steps: int = 40_000) -> float:
    """PPO on CartPole; returns the mean of ten deterministic episodes."""
    env = fnrl.envs.CartPole(num_envs=8)
    actor, storage = fnrl.OnPolicyActorCritic(env.spec), fnrl.GAE(steps=64)
    algo = fnrl.PPO(lr=1e-3, entropy_coef=0.01)
    parts = fnrl.Parts(env, actor, algo, storage)
    run = Run(parts, fnrl.Inline())  # one process, one seed

    key_algo, key_collect, key_plans = fnrl.random.split(fnrl.key(0), 3)
    learner, collector = first_algo(run, key_algo), first_state(run, key_collect)
    plan, memory = algo.plan, storage.init()
    for i in range(env_steps // (64 * 8)):
        collector, rollout, episodes = collect_rollout(run, collector, learner.weights)  # [T, N]
        memory = storage.append(memory, rollout)
        facts = actor, learner.weights, plan, env.num_envs
        memory, data, rows = storage.batches(run.lift, memory, *facts, fnrl.random.fold_in(key_plans, i))
        for k in range(len(rows)):
            grads, aux = algo.grad(actor, learner.weights, storage.take(data, rows[k]))
            first, last = k == 0, k == len(rows) - 1
            update = Update(
                grads, aux.info, (), first, last, rollout.env_steps if first else 0, learner.weights.version
            )
            learner, metrics = apply_update(run, learner, update, pinned=())
        if i % 10 == 9 and bool(episodes.end.any()):
            mean = float(episodes.returns[episodes.end].mean())
            print(f"{learner.weights.env_steps:6d} steps, return {mean:5.1f}, loss {metrics['loss']:.3f}")

    result = fnrl.evaluate(parts, learner.weights, fnrl.key(1), episodes=10)
    print(f"evaluation: {result.mean:.1f} +- {result.std:.1f}")
    return result.mean


if __name__ == "__main__":
    main()
