"""Topology: stages of an architecture as values, composed by combinators. Weights flow down, products flow up.

`collect` makes rollouts, `gradients` makes updates of them; `synchronous` and `asynchronous` are replicas of either;
`centralised` applies updates.
"""

from fnrl.topology.base import Node
from fnrl.topology.nodes import Collect, Gradients, GradientsState, collect, gradients
from fnrl.topology.roots import Centralised, RootState, centralised
from fnrl.topology.workers import (
    Asynchronous,
    AsynchronousState,
    Synchronous,
    SynchronousState,
    asynchronous,
    synchronous,
)

__all__ = [
    "Asynchronous",
    "AsynchronousState",
    "Centralised",
    "Collect",
    "Gradients",
    "GradientsState",
    "Node",
    "RootState",
    "Synchronous",
    "SynchronousState",
    "asynchronous",
    "centralised",
    "collect",
    "gradients",
    "synchronous",
]
