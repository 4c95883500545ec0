"""fnrl: reinforcement learning for PyTorch in the functional style of JAX.

Actors, algorithms and storages are frozen configurations with pure methods on immutable records; a training
architecture is a composition of nodes that runs in one process or, unchanged, in Ray cells.
`docs/architecture.md` shows how it fits together.
"""

from fnrl import envs, random, report, results, schemes
from fnrl.actors import EpsilonGreedy, Gaussian, OffPolicyActorCritic, OnPolicyActorCritic, OrnsteinUhlenbeck
from fnrl.algos import A2C, DDPG, DQN, PPO, SAC, TD3, Algorithm
from fnrl.component import Linear, PerLane, component, hyper, option, setting
from fnrl.errors import (
    CheckpointError,
    CompilerWarning,
    CompositionError,
    DeadLaneWarning,
    DivergedError,
    EnvironmentFault,
    ExecutorError,
    LagWarning,
    NonFiniteError,
    StaleStateError,
)
from fnrl.evaluate import Evaluation, evaluate
from fnrl.executor import Inline, Ray, Recorded, Resources
from fnrl.lanes import seeds
from fnrl.learner import Evaluate, Learner
from fnrl.networks import CNN, GRU, MLP, module
from fnrl.optim import SGD, Adam, RMSProp
from fnrl.parts import NormaliseObs, Parts, ScaleReward
from fnrl.policy import Policy, load_policy, policy_of
from fnrl.random import key
from fnrl.record import host, record, static
from fnrl.scheme import Scheme, SchemeState
from fnrl.storages import (
    GAE,
    EpisodeGoals,
    FinalGoals,
    Frames,
    FutureGoals,
    Hindsight,
    Prioritised,
    Replay,
    Returns,
    VTrace,
)
from fnrl.sweep import LogUniform, Sweep, Uniform, sweep
from fnrl.topology import asynchronous, centralised, collect, decentralised, gradients, sharded, synchronous
from fnrl.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "A2C",
    "CNN",
    "DDPG",
    "DQN",
    "GAE",
    "GRU",
    "MLP",
    "PPO",
    "SAC",
    "SGD",
    "TD3",
    "Adam",
    "Algorithm",
    "CheckpointError",
    "CompilerWarning",
    "CompositionError",
    "DeadLaneWarning",
    "DivergedError",
    "EnvironmentFault",
    "EpisodeGoals",
    "EpsilonGreedy",
    "Evaluate",
    "Evaluation",
    "ExecutorError",
    "FinalGoals",
    "Frames",
    "FutureGoals",
    "Gaussian",
    "Hindsight",
    "Inline",
    "LagWarning",
    "Learner",
    "Linear",
    "LogUniform",
    "NonFiniteError",
    "NormaliseObs",
    "OffPolicyActorCritic",
    "OnPolicyActorCritic",
    "OrnsteinUhlenbeck",
    "Parts",
    "PerLane",
    "Policy",
    "Prioritised",
    "RMSProp",
    "Ray",
    "Recorded",
    "Replay",
    "Resources",
    "Returns",
    "ScaleReward",
    "Scheme",
    "SchemeState",
    "StaleStateError",
    "Sweep",
    "Uniform",
    "VTrace",
    "asynchronous",
    "centralised",
    "collect",
    "component",
    "decentralised",
    "envs",
    "evaluate",
    "gradients",
    "host",
    "hyper",
    "key",
    "load_policy",
    "module",
    "option",
    "policy_of",
    "random",
    "record",
    "report",
    "results",
    "schemes",
    "seeds",
    "setting",
    "sharded",
    "static",
    "sweep",
    "synchronous",
    "tune",
]
