"""What is acted upon: pure environments on tensors, and vectors of hosted simulators."""

from fnrl.envs.base import EnvState, Environment, Step
from fnrl.envs.cartpole import CartPole

__all__ = ["CartPole", "EnvState", "Environment", "Step"]
