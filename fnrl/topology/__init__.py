"""Topology: stages of an architecture as values, composed by combinators. Weights flow down, products flow up.

`collect` makes rollouts, `gradients` makes updates of them; `synchronous` and `asynchronous` are replicas of either;
`centralised` applies updates in one place, `decentralised` in every replica; `sharded` splits the lanes of either.
"""

from fnrl.topology.base import Node
from fnrl.topology.nodes import Collect, Gradients, GradientsState, collect, gradients
from fnrl.topology.roots import Centralised, Decentralised, RootState, centralised, decentralised
from fnrl.topology.shards import Sharded, sharded
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
    "Decentralised",
    "Gradients",
    "GradientsState",
    "Node",
    "RootState",
    "Sharded",
    "Synchronous",
    "SynchronousState",
    "asynchronous",
    "centralised",
    "collect",
    "decentralised",
    "gradients",
    "sharded",
    "synchronous",
]
