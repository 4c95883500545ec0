"""What every node is: weights flow down, products flow up.

A node has `init(run, key) -> state` and `step(run, state, weights) -> (state, product, info)`; `gather` and `restore`
turn its state into pure records and back. Keys are folded in along the path, so what a replica draws depends on where
it stands, not on when or where it runs.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fnrl import random
from fnrl.errors import CheckpointError, CompositionError
from fnrl.graphs import SPENT
from fnrl.lift import Run
from fnrl.merge import merge_infos
from fnrl.parts import Parts
from fnrl.record import replace
from fnrl.types import Info

_FITS = {"rollouts": "collect", "updates": "gradients(collect)", "weights": "centralised(gradients(collect))"}


class Node(Protocol):
    """A stage of an architecture."""

    produces: ClassVar[str]

    def envs(self, parts: Parts) -> int:
        """Environments behind one product."""
        ...

    def check(self, parts: Parts) -> None:
        """Refuses parts that don't fit (CompositionError)."""
        ...

    def init(self, run: Run, key: Tensor) -> Any: ...

    def step(self, run: Run, state: Any, weights: Any) -> tuple[Any, Any, Info]: ...

    def gather(self, run: Run, state: Any) -> Any: ...

    def restore(self, run: Run, pure: Any) -> Any: ...

    def close(self, run: Run, state: Any) -> None: ...


class Root:
    """Base of nodes that produce weights: what stands at the top, and may do several updates in one call."""

    produces: ClassVar[str] = "weights"

    def step(self, run: Run, state: Any, weights: Any = ()) -> tuple[Any, Any, Info]:
        """One update, and the weights after it."""
        raise TypeError(f"{type(self).__name__} must define step")

    def steps(self, run: Run, state: Any, updates: int) -> tuple[Any, Info]:
        """Some updates, one after another; what is told of them is merged, with the seconds that compiling took."""
        before = SPENT.seconds

        def told() -> Iterator[Info]:
            nonlocal state
            for _ in range(updates):
                state, _, info = self.step(run, state)
                yield info

        info = merge_infos(told())
        if SPENT.seconds > before:
            info = replace(info, report={**info.report, "time/compile": SPENT.seconds - before})
        return state, info


def fold(run: Run, key: Tensor, i: int) -> Tensor:
    """The key of the i-th thing below a node."""
    return run.lift(random.fold_in)(key, i)


def require(outer: str, node: Any, *products: str) -> None:
    """Refuses a node that doesn't produce what `outer` takes (CompositionError)."""
    made = getattr(node, "produces", None)
    if made is None or isinstance(node, type):
        raise CompositionError(f"{outer} takes a node such as collect or gradients(collect), got {node!r}")
    if made not in products:
        raise CompositionError(
            f"{outer} takes a node that produces {' or '.join(products)} (such as {_FITS[products[0]]}), "
            f"got {node!r}, which produces {made}"
        )


def whole(outer: str, name: str, value: Any) -> None:
    """Refuses what is not an int of at least 1 (CompositionError)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CompositionError(f"{outer}: {name} = {value!r}, expected an int of at least 1")


def own(run: Run, node: Any, pure: Any, kind: type) -> None:
    """Refuses to restore the record of another node (CheckpointError)."""
    if not isinstance(pure, kind):
        raise CheckpointError(
            f"node {run.name} is {node!r}, but what was saved there is a {type(pure).__name__}, not a {kind.__name__}: "
            "give the scheme the topology it was saved with"
        )


def as_many(run: Run, node: Any, saved: int, here: int, what: str) -> None:
    """Refuses to restore a record of another number of `what` (CheckpointError)."""
    if saved != here:
        raise CheckpointError(
            f"node {run.name} was saved with {saved} {what}, {node!r} has {here}: a run goes on with as many as it was "
            "begun with"
        )
