"""What remembers: rollouts become plans of batches."""

from fnrl.storages.frames import Frames
from fnrl.storages.hindsight import EpisodeGoals, FinalGoals, FutureGoals, Hindsight
from fnrl.storages.replay import Prioritised, Replay
from fnrl.storages.rollout import GAE, OnPolicyBatch, Returns, RolloutStorage, VTrace

__all__ = [
    "GAE",
    "EpisodeGoals",
    "FinalGoals",
    "Frames",
    "FutureGoals",
    "Hindsight",
    "OnPolicyBatch",
    "Prioritised",
    "Replay",
    "Returns",
    "RolloutStorage",
    "VTrace",
]
