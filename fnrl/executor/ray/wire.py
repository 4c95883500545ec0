"""What travels: numpy arrays, never torch tensors; what is small inside the call, what is large once by the store."""

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

from fnrl import tree
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
