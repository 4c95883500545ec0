"""The training loop in your own hands, at the level of a scheme: PPO on CartPole in one process.

python examples/loop_scheme.py
"""

import torch

import fnrl

torch.set_num_threads(1)


def main(env_steps: int = 40_000) -> float:
    """Trains, then returns the mean of ten deterministic episodes."""
    env = fnrl.envs.CartPole(num_envs=8)
    parts = fnrl.Parts(
        env,
        actor=fnrl.OnPolicyActorCritic(env.spec),
        algo=fnrl.PPO(lr=fnrl.Linear(1e-3, 0.0, steps=env_steps), entropy_coef=0.01),
        storage=fnrl.GAE(steps=64),
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    print(scheme.topology)

    state = scheme.init(fnrl.key(0))
    while state.env_steps < env_steps:
        state, info = scheme.step(state, updates=16)
        ended = [float(r) for e in info.episodes for r in e.returns[e.end]]
        if ended and state.version % 160 == 0:
            print(f"{state.env_steps:6d} steps, return {sum(ended) / len(ended):5.1f}, loss {info.metrics['loss']:.3f}")

    result = fnrl.evaluate(parts, state.weights, fnrl.key(1), episodes=10)
    print(f"evaluation: {result.mean:.1f} +- {result.std:.1f}")
    return result.mean


if __name__ == "__main__":
    main()
