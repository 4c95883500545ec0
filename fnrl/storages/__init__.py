"""What remembers: rollouts become plans of batches."""

from fnrl.storages.rollout import GAE, Batches, OnPolicyBatch, Returns, RolloutStorage

__all__ = ["GAE", "Batches", "OnPolicyBatch", "Returns", "RolloutStorage"]
