"""A topology as a picture: what runs where, what flows, and how it is merged."""

from typing import Any

from fnrl.parts import Parts
from fnrl.topology.nodes import Collect, Gradients
from fnrl.topology.roots import Centralised, Decentralised
from fnrl.topology.workers import Asynchronous, Synchronous


def draw(topology: Any, parts: Parts, place: str) -> str:
    """The task graph, root first; `place` is where a replica lives."""
    return "\n".join(_lines(topology, parts, place))


def _lines(node: Any, parts: Parts, place: str) -> list[str]:
    said = {
        Collect: lambda n: f"collect: {parts.env.spec.name}, {parts.env.num_envs} environments",
        Gradients: lambda n: (
            f"gradients: {type(parts.algo).__name__}, {type(parts.storage).__name__}{_plan(parts, n.envs(parts))}"
        ),
        Synchronous: lambda n: f"synchronous: {n.workers} {place}{_merged(n)}{_preempted(n)}",
        Asynchronous: lambda n: (
            f"asynchronous: {n.workers} {place}, one call in flight each, taken as they arrive"
            + ("" if n.max_lag is None else f", at most {n.max_lag} versions behind")
        ),
        Centralised: lambda n: "centralised: applies updates here, sends weights down",
        Decentralised: lambda n: (
            f"decentralised: {n.workers} {place}, each applies the mean of all updates{_preempted(n)}"
        ),
    }.get(type(node), repr)(node)
    child = getattr(node, "child", None)
    if child is None:
        return [said]
    up = {"rollouts": "rollouts", "updates": "updates"}.get(getattr(child, "produces", ""), "products")
    below = _lines(child, parts, place)
    times = f" x{node.workers}" if hasattr(node, "workers") else ""
    return [said, f"│ ▲ {up}{times}", f"└─ {below[0]}", *(f"   {text}" for text in below[1:])]


def _plan(parts: Parts, envs: int) -> str:
    updates = parts.storage.updates(parts.algo.plan, envs)
    return f" of {parts.storage.steps} steps x {envs} environments, {updates} update{'s' * (updates != 1)} of each"


def _merged(node: Synchronous) -> str:
    return ", side by side in worker order" if node.produces == "rollouts" else ", averaged in worker order"


def _preempted(node: Any) -> str:
    if node.quorum == 1.0:
        return ""
    return f", {node.quorum:.0%} of them stop the others after {node.samples:.0%} of a rollout"
