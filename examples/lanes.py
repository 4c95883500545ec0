"""Four seeds as lanes of one program: every tensor of the state has a leading axis `[4]`.

python examples/lanes.py
"""

import torch

import fnrl
from fnrl import tree

torch.set_num_threads(1)


def main(updates: int = 320) -> list[float]:
    """Trains four seeds together; returns each lane's evaluation."""
    env = fnrl.envs.CartPole(num_envs=8)
    parts = fnrl.Parts(
        env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(lr=1e-3, entropy_coef=0.01), fnrl.GAE(steps=64)
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(torch.stack([fnrl.key(seed) for seed in range(4)]))
    state, info = scheme.step(state, updates=updates)
    print("loss of each lane:", [round(x, 3) for x in info.metrics["loss"].tolist()])
    scores = []
    for lane in range(4):
        weights = tree.index(state.weights, lane)
        scores.append(fnrl.evaluate(parts, weights, fnrl.key(100 + lane), episodes=8).mean)
    print("evaluation of each lane:", scores)
    return scores


if __name__ == "__main__":
    main()
