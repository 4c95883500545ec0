"""What acts: a mapping from observations and parameters to actions, values and memories."""

from fnrl.actors.on_policy import OnPolicyActorCritic

__all__ = ["OnPolicyActorCritic"]
