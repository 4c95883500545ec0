"""What acts: a mapping from observations and parameters to actions, values and memories."""

from fnrl.actors.base import Actor
from fnrl.actors.exploration import EpsilonGreedy, Gaussian, OrnsteinUhlenbeck
from fnrl.actors.off_policy import OffPolicyActorCritic
from fnrl.actors.on_policy import OnPolicyActorCritic

__all__ = ["Actor", "EpsilonGreedy", "Gaussian", "OffPolicyActorCritic", "OnPolicyActorCritic", "OrnsteinUhlenbeck"]
