"""What learns: an algorithm is its loss; gradients, clipping and the optimiser step are shared."""

from fnrl.algos.base import Algorithm, AlgoState
from fnrl.algos.ppo import A2C, PPO

__all__ = ["A2C", "PPO", "AlgoState", "Algorithm"]
