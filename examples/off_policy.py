"""Another family of parts under the same scheme: double, duelling DQN with priorities on CartPole.

python examples/off_policy.py
"""

import torch

import fnrl

torch.set_num_threads(1)


def main(env_steps: int = 30_000) -> float:
    """Returns the mean of ten deterministic episodes."""
    env = fnrl.envs.CartPole(num_envs=8)
    explore = fnrl.EpsilonGreedy(epsilon=fnrl.Linear(1.0, 0.05, steps=env_steps // 3))
    hidden = fnrl.MLP((64, 64), torch.relu)
    parts = fnrl.Parts(
        env,
        actor=fnrl.OffPolicyActorCritic(env.spec, None, hidden, critics=1, duelling=True, explore=explore),
        algo=fnrl.DQN(lr=1e-3, ratio=0.125, batch=64, target_every=50),
        storage=fnrl.Replay(capacity=20_000, steps=2, n_step=3, prioritised=fnrl.Prioritised()),
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.key(0))
    while state.env_steps < env_steps:
        state, info = scheme.step(state, updates=500)
        print(f"{state.env_steps:6d} steps, mean Q {info.metrics['q']:6.2f}, loss {info.metrics['loss']:.4f}")
    result = fnrl.evaluate(parts, state.weights, fnrl.key(1), episodes=10)
    print(f"evaluation: {result.mean:.1f} +- {result.std:.1f}")
    return result.mean


if __name__ == "__main__":
    main()
