"""What a cell reserves in the cluster, and whether the cluster has it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fnrl.errors import CompositionError

_PLACEMENTS = ("DEFAULT", "SPREAD")
_LEAST = 0.0001  # what Ray can tell from nothing
_RAYS_OWN = {"CPU": "use cpus=", "GPU": "use gpus=", "memory": "leave it out", "object_store_memory": "leave it out"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one cell reserves: CPUs (fractions, too), GPUs, and what a cluster's nodes were started with besides.

    `custom` is a mapping such as `{"simulator": 1}`; `placement` is Ray's: `"DEFAULT"` fills nodes up, `"SPREAD"` uses
    them all. A cell without a GPU computes on the CPU, whatever the scheme's device. Errors: CompositionError.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    custom: Any = ()
    placement: str = "DEFAULT"

    def __post_init__(self) -> None:
        pairs = self.custom.items() if isinstance(self.custom, Mapping) else self.custom
        if not isinstance(self.custom, Mapping | tuple) or any(not isinstance(p, tuple) or len(p) != 2 for p in pairs):
            raise CompositionError(
                f"Resources: custom = {self.custom!r}, expected a mapping such as {{'simulator': 1}}"
            )
        object.__setattr__(self, "custom", tuple(sorted((str(k), v) for k, v in pairs)))
        for name, x in self.custom:
            if name in _RAYS_OWN:
                said = _RAYS_OWN[name]
                raise CompositionError(f"Resources: custom = {{{name!r}: {x!r}}}, which is a name of Ray's own: {said}")
        for name, x in (("cpus", self.cpus), ("gpus", self.gpus), *self.custom):
            none = name == "gpus" and x == 0
            if not none and not (_number(x) and x >= _LEAST):
                least = f"{_LEAST} or more{', or 0' if name == 'gpus' else ''}"
                raise CompositionError(f"Resources: {name} = {x!r}, expected a number, {least}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise CompositionError(f"Resources: gpus = {self.gpus!r}, expected a fraction of one, or a whole number")
        if self.placement not in _PLACEMENTS:
            raise CompositionError(
                f"Resources: placement = {self.placement!r}, expected one of {', '.join(_PLACEMENTS)}"
            )

    def amounts(self) -> dict[str, float]:
        """By the names that Ray gives them."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **dict(self.custom)}
        return {name: x for name, x in named.items() if x}

    def options(self) -> dict[str, Any]:
        """For `ray.remote(...).options`."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "resources": dict(self.custom) or None,
            "scheduling_strategy": self.placement,
        }

    def __str__(self) -> str:
        return " + ".join(f"{x:g} {name}" for name, x in self.amounts().items())


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def kind_of(node: Any) -> str:
    """Which resources a replica of this node gets: those to `collect`, or those for `gradients`."""
    return "collect" if node.produces == "rollouts" else "gradients"


def cells(node: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The nodes that have cells of their own below a node, and how many each."""
    child = getattr(node, "child", None)
    if child is None:
        return
    if hasattr(node, "workers"):
        times *= node.workers
        yield child, times
    yield from cells(child, times)


def refuse_more_than(nodes: Sequence[Mapping[str, float]], wanted: Sequence[tuple[str, int, Resources]]) -> None:
    """Refuses cells that the cluster's nodes can't hold, empty as they may be (CompositionError)."""
    asked: dict[str, float] = {}
    for kind, count, each in wanted:
        room = sum(_room(node, each) for node in nodes)
        if room == 0:
            raise CompositionError(
                f"a {kind} cell asks for {each}, and no node of the cluster has that (they have {_told(nodes, each)}): "
                f"lower Ray({kind}=Resources(...)), or join a cluster that has it with Ray(address=...)"
            )
        whole = {n: count * x for n, x in each.amounts().items()}
        if room < count and all(sum(node.get(n, 0.0) for node in nodes) >= x for n, x in whole.items()):
            raise CompositionError(
                f"{count} {kind} cells ask for {each} each, and the nodes of the cluster have room for {room} (they "
                f"have {_told(nodes, each)}): lower Ray({kind}=Resources(...)), or take fewer workers"
            )
    for _, count, each in wanted:
        for name, x in each.amounts().items():
            asked[name] = asked.get(name, 0.0) + count * x
    for name, x in asked.items():
        have = sum(node.get(name, 0.0) for node in nodes)
        if x > have + 1e-9:
            who = " and ".join(
                f"{n} {k} cells with {r.amounts()[name]:g} each" for k, n, r in wanted if name in r.amounts()
            )
            raise CompositionError(
                f"the scheme's cells ask for {x:g} {name} ({who}), the cluster has {have:g}: lower Ray(collect="
                f"Resources(...), gradients=Resources(...)) (--ray-collect cpus=0.5), or take fewer workers"
            )


def _room(node: Mapping[str, float], each: Resources) -> int:
    """Such cells that a node has room for."""
    return min(int(node.get(name, 0.0) / x + 1e-9) for name, x in each.amounts().items())


def _told(nodes: Sequence[Mapping[str, float]], each: Resources) -> str:
    return "; ".join(", ".join(f"{node.get(name, 0.0):g} {name}" for name in each.amounts()) for node in nodes)
