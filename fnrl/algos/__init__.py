"""What learns: an algorithm is its loss; gradients, clipping and the optimiser step are shared."""

from fnrl.algos.base import Algorithm, AlgoState
from fnrl.algos.dqn import DQN
from fnrl.algos.ppo import A2C, PPO
from fnrl.algos.sac import SAC
from fnrl.algos.td3 import DDPG, TD3

__all__ = ["A2C", "DDPG", "DQN", "PPO", "SAC", "TD3", "AlgoState", "Algorithm"]
