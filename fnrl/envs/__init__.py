"""What is acted upon: pure environments on tensors, and vectors of hosted simulators."""

from fnrl.envs.base import Environment, EnvState, PureEnvironment, Step
from fnrl.envs.bitflipping import BitFlipping
from fnrl.envs.cartpole import CartPole
from fnrl.envs.hosted import GymVector, gym

__all__ = ["BitFlipping", "CartPole", "EnvState", "Environment", "GymVector", "PureEnvironment", "Step", "gym"]
