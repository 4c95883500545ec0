"""A robot arm that is told where to reach, and learns it from the places it reached instead: hindsight on PandaReach.

pip install -e '.[panda]'; python examples/hindsight.py
"""

import torch

import fnrl

torch.set_num_threads(1)


def main(env_steps: int = 8_000) -> float:
    """Returns the mean of twenty deterministic episodes: minus the steps that were not at the goal, at most 50."""
    env, hidden = fnrl.envs.gym("PandaReach-v3"), fnrl.MLP((64, 64), torch.relu)
    parts = fnrl.Parts(
        env,
        actor=fnrl.OffPolicyActorCritic(env.spec, hidden, hidden),
        algo=fnrl.SAC(lr=1e-3, gamma=0.95, ratio=0.5),
        storage=fnrl.Replay(
            capacity=50_000,
            steps=10,
            hindsight=fnrl.Hindsight(goals=4.0, strategy=fnrl.FutureGoals()),
        ),
        normalise_obs=fnrl.NormaliseObs(),
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.key(0))
    while state.env_steps < env_steps:
        state, info = scheme.step(state, updates=500)
        print(f"{state.env_steps:6d} steps, mean Q {info.metrics['q']:6.2f}, entropy {info.metrics['entropy']:5.2f}")
    result = fnrl.evaluate(parts, state.weights, fnrl.key(1), episodes=20)
    print(f"evaluation: {result.mean:.2f} +- {result.std:.2f}")
    scheme.close(state)
    return result.mean


if __name__ == "__main__":
    main()
