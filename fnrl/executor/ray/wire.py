"""What travels: numpy arrays, never torch tensors; what is small inside the call, what is large once by the store."""

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

from fnrl import random, tree
from fnrl.apply import first_algo
from fnrl.errors import CompositionError
from fnrl.lift import Run

_SMALL = 64 * 1024  # bytes; up to 100 kB Ray sends with the call, which is 2.5 ms faster than by the store


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree for many cells: bytes if it is small, else a reference to the one copy in the object store."""

    wire: Any
    size: int


def packed(value: Any) -> Packed:
    """A tree of tensors, packed."""
    import ray

    pure = tree.to_numpy(value)
    size = size_of(pure)
    return Packed(dumps(pure) if size <= _SMALL else ray.put(pure), size)


def unpacked(wire: Any) -> Any:
    """What was packed, in the cell: Ray has put the object in the place of a reference."""
    return pickle.loads(wire) if isinstance(wire, bytes) else wire


def size_of(value: Any) -> int:
    """Bytes of a tree's leaves."""
    return sum(x.nbytes for x in tree.leaves(value))


def weights_size(run: Run) -> int:
    """Bytes of the weights, of all lanes."""
    return size_of(first_algo(dataclasses.replace(run, lanes=None), random.key(0)).weights) * (run.lanes or 1)


def product_size(run: Run, node: Any) -> int:
    """Bytes of what a node sends up: a rollout, or a gradient."""
    if node.produces != "rollouts":
        return weights_size(run)
    parts, spec = run.parts, run.parts.env.spec
    each = 2 * spec.obs.nbytes + spec.action.nbytes + 4 * (2 + parts.actor.memory(1).shape[-1]) + 2
    return each * parts.storage.steps * node.envs(parts) * (run.lanes or 1)


def refuse_small_store(store: int, weights: int, products: int) -> None:
    """A round of calls has its products in the store, and two versions of the weights (CompositionError)."""
    need = 2 * weights + products
    if need > store:
        need, weights, products, store = (round(x / 1e6) for x in (need, weights, products, store))
        raise CompositionError(
            f"one round needs {need} MB in the object store (two versions of the weights of {weights} MB, "
            f"{products} MB of products), the cluster's has {store} MB: start it with more (Ray(object_store=...) for "
            "a local one), or take shorter rollouts or fewer workers"
        )


def shipped(run: Run, node: Any) -> bytes:
    """A node and its run, for a cell. Errors: CompositionError naming the field that can't be serialised."""
    try:
        return dumps((run, node))
    except Exception as error:
        for root, name in ((run.parts, "parts"), (node, "topology"), (run.executor, "executor")):
            for path, value in _fields(root, name):
                if not _ships(value):
                    raise CompositionError(
                        f"{path} = {value!r} can't be sent to a Ray cell ({type(error).__name__}: {error}): give "
                        f"a class or function to make it from, or use fnrl.Inline()"
                    ) from error
        raise CompositionError(f"{node!r} and its parts can't be sent to a Ray cell: {error}") from error


def dumps(value: Any) -> bytes:
    """Pickled as Ray does: classes and functions of the main script by value."""
    from ray import cloudpickle

    return cloudpickle.dumps(value, protocol=5)  # type: ignore[attr-defined]


def _ships(value: Any) -> bool:
    try:
        dumps(value)
    except Exception:
        return False
    return True


def _fields(x: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and values of a configuration, the innermost first."""
    inside: Any = ()
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        inside = [(f".{f.name}", getattr(x, f.name)) for f in dataclasses.fields(x)]
    elif isinstance(x, dict):
        inside = [(f"[{k!r}]", v) for k, v in x.items()]
    elif isinstance(x, tuple | list):
        inside = [(f"[{i}]", v) for i, v in enumerate(x)]
    for name, value in inside:
        yield from _fields(value, path + name)
    yield path, x
