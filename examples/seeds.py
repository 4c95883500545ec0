"""Eight seeds as lanes of one program: every tensor of the state has a leading axis `[8]`.

python examples/seeds.py
"""

import torch

import fnrl

torch.set_num_threads(1)


def main(env_steps: int = 40_000, seeds: int = 8) -> float:
    """Trains the seeds together; returns the interquartile mean of their evaluations."""
    env = fnrl.envs.CartPole(num_envs=8)
    parts = fnrl.Parts(
        env,
        fnrl.OnPolicyActorCritic(env.spec),
        fnrl.PPO(lr=fnrl.Linear(1e-3, 0.0, steps=env_steps), entropy_coef=0.01),
        fnrl.GAE(steps=64),
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.seeds(seeds))
    while state.env_steps < env_steps:  # of each lane
        state, info = scheme.step(state, updates=scheme.updates)
    print("loss of each lane:", [round(x, 3) for x in info.metrics["loss"].tolist()])

    found = fnrl.evaluate(parts, state.weights, fnrl.random.split(fnrl.key(100), seeds), episodes=8)  # all at once
    scores = found.returns.mean(-1).tolist()
    print("evaluation of each lane:", scores)
    best = max(range(seeds), key=scores.__getitem__)
    state = scheme.select(state, [best, (best + 1) % seeds])  # these two go on, bit for bit as they would have
    print("lanes left:", state.which)
    low, high = fnrl.results.interval([scores])
    print(f"interquartile mean {fnrl.results.iqm(scores):.1f}, 95 % interval {low:.1f} to {high:.1f}")
    return fnrl.results.iqm(scores)


if __name__ == "__main__":
    main()
