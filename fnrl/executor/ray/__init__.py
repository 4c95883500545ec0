"""Replicas in Ray cells, one process each; those that die are started again, and the bits stay the same."""

from fnrl.executor.ray.executor import Ray
from fnrl.executor.ray.resources import Resources

__all__ = ["Ray", "Resources"]
