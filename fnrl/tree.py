"""Trees of tensors: records, tuples, lists and dicts, with tensors (or numpy arrays) as leaves.

`None` is refused: "nothing yet" is `()`, a tree without leaves. Dicts keep their insertion order, which is part of
the structure.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fnrl.record import HOST_ONLY, fields_of, is_record, made

T = TypeVar("T")

_LARGE = 2**16  # bytes from which an array is worth sharing


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is left of a tree without its leaves: hashable, comparable, and able to rebuild the tree."""

    kind: Any  # a record class, tuple, list, dict, or None for a leaf
    children: tuple["Structure", ...] = ()
    extra: tuple[Any, ...] = ()  # static and host values of a record, keys of a dict


LEAF = Structure(None)


def flatten(tree: Any, host: bool = True) -> tuple[list[Any], Structure]:
    """The leaves of a tree in order, and its structure; with `host=False` host fields are replaced by `HOST_ONLY`.

    Errors: TypeError for a leaf that is neither a tensor nor an array, naming its path.
    """
    out: list[Any] = []
    return out, _flatten(tree, host, out, ())


def _flatten(x: Any, host: bool, out: list[Any], path: tuple[str, ...]) -> Structure:
    if isinstance(x, Tensor):
        out.append(x)
        return LEAF
    cls = type(x)
    if is_record(x):
        f = cls.__fields__
        children = tuple(_flatten(getattr(x, n), host, out, (*path, n)) for n in f.data)
        ends = tuple(getattr(x, n) if host else HOST_ONLY for n in f.host)
        return Structure(cls, children, tuple(getattr(x, n) for n in f.static) + ends)
    if cls is tuple or cls is list:
        return Structure(cls, tuple(_flatten(v, host, out, (*path, str(i))) for i, v in enumerate(x)))
    if cls is dict:
        return Structure(cls, tuple(_flatten(v, host, out, (*path, str(k))) for k, v in x.items()), tuple(x))
    if isinstance(x, np.ndarray | np.generic):
        out.append(x)
        return LEAF
    where = ".".join(path) or "the tree itself"
    hint = "; 'nothing yet' is ()" if x is None else "; a host number belongs in a host() or static() field"
    raise TypeError(f"{where}: expected a tensor, record, tuple, list or dict, got {cls.__name__} {x!r}{hint}")


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Any:
    """The tree of this structure with these leaves."""
    return _unflatten(structure, iter(leaves))


def _unflatten(s: Structure, leaves: Any) -> Any:
    if s.kind is None:
        return next(leaves)
    if s.kind is tuple:
        return tuple([_unflatten(c, leaves) for c in s.children])
    if s.kind is list:
        return [_unflatten(c, leaves) for c in s.children]
    if s.kind is dict:
        return {k: _unflatten(c, leaves) for k, c in zip(s.extra, s.children, strict=True)}
    values = [_unflatten(c, leaves) for c in s.children]
    return made(s.kind, dict(zip(s.kind.__fields__.all, (*values, *s.extra), strict=True)))


def builder(structure: Structure) -> Callable[[Sequence[Any]], Any]:
    """`unflatten` for one structure, written out as an expression: a quarter of the time."""
    held: dict[str, Any] = {"made": made}
    places = itertools.count()

    def constant(x: Any) -> str:
        held[f"c{len(held)}"] = x
        return f"c{len(held) - 1}"

    def write(s: Structure) -> str:
        if s.kind is None:
            return f"x[{next(places)}]"
        inside = [write(c) for c in s.children]
        if s.kind is tuple or s.kind is list:
            return f"({''.join(c + ', ' for c in inside)})" if s.kind is tuple else f"[{', '.join(inside)}]"
        keys = s.extra if s.kind is dict else s.kind.__fields__.all
        if s.kind is not dict:
            inside += [constant(x) for x in s.extra]
        pairs = "{" + ", ".join(f"{constant(k)}: {c}" for k, c in zip(keys, inside, strict=True)) + "}"
        return pairs if s.kind is dict else f"made({constant(s.kind)}, {pairs})"

    return eval(f"lambda x: {write(structure)}", held)  # of our own words alone: values stand beside them


def leaves(tree: Any) -> list[Any]:
    """The leaves in order, without the cost of the structure."""
    out: list[Any] = []
    _leaves(tree, out)
    return out


def _leaves(x: Any, out: list[Any]) -> None:
    cls = type(x)
    if cls is Tensor:
        out.append(x)
    elif is_record(x):
        for name in cls.__fields__.data:
            _leaves(getattr(x, name), out)
    elif cls is tuple or cls is list:
        for v in x:
            _leaves(v, out)
    elif cls is dict:
        for v in x.values():
            _leaves(v, out)
    else:
        _flatten(x, True, out, ())


def sign(x: Any, out: list[Any]) -> Any:
    """What a graph is made for (shapes, dtypes, devices and structure, but for host fields): something to look it up
    by, at less than half the cost of a `Structure`. The leaves are appended to `out`.
    """
    cls = type(x)
    return (_SIGN.get(cls) or _signer(cls))(x, out)


def _signer(cls: type) -> Callable[[Any, list[Any]], Any]:
    """`sign` of the instances of a record class; of whatever else `flatten` takes."""
    if not hasattr(cls, "__fields__"):
        return _sign_other
    data, static = fields_of(cls).data, fields_of(cls).static

    def sign_record(x: Any, out: list[Any]) -> Any:
        held = x.__dict__
        known = held.get("_signed")
        if known is None:
            found: list[Any] = []
            inside = (cls, *_sign_each([held[n] for n in data], found), *[held[n] for n in static])
            known = held["_signed"] = _Signed(_KINDS.setdefault(inside, object()), found)
        out += known.leaves
        return known.kind

    return _SIGN.setdefault(cls, sign_record)


class _Signed:
    """What `sign` has found of a record, kept with it, for records do not change. A copy of one has none: the object
    that stands for its kind is this process's.
    """

    __slots__ = ("kind", "leaves")

    def __init__(self, kind: object, leaves: list[Any]) -> None:
        self.kind, self.leaves = kind, leaves

    def __reduce__(self) -> Any:
        return type(None), ()


_KINDS: dict[Any, object] = {}  # one object for all records of the same classes, shapes, dtypes and devices


def _sign_tensor(x: Tensor, out: list[Any]) -> Any:
    out.append(x)
    return x.shape, x.dtype, x.device


def _sign_each(xs: Iterable[Any], out: list[Any]) -> list[Any]:
    """`sign` of each, without a call for each tensor."""
    kinds: list[Any] = []
    for x in xs:
        if type(x) is Tensor:
            out.append(x)
            kinds.append((x.shape, x.dtype, x.device))
        else:
            kinds.append(sign(x, out))
    return kinds


def _sign_other(x: Any, out: list[Any]) -> Any:
    found, structure = flatten(x, host=False)
    out += found
    return structure, *[(v.shape, v.dtype, v.device) for v in found]


_SIGN: dict[type, Callable[[Any, list[Any]], Any]] = {
    Tensor: _sign_tensor,
    tuple: lambda x, out: (tuple, *_sign_each(x, out)),
    list: lambda x, out: (list, *_sign_each(x, out)),
    dict: lambda x, out: (dict, tuple(x), *_sign_each(x.values(), out)),
}


def paths(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) pairs in order; a path reads like `weights.params.vector`."""
    found, structure = flatten(tree)
    names: list[str] = []
    _name(structure, (), names)
    return list(zip(names, found, strict=True))


def _name(s: Structure, path: tuple[str, ...], names: list[str]) -> None:
    if s.kind is None:
        names.append(".".join(path))
        return
    if s.kind in (tuple, list):
        keys: Sequence[Any] = range(len(s.children))
    else:
        keys = s.extra if s.kind is dict else s.kind.__fields__.data
    for key, child in zip(keys, s.children, strict=True):
        _name(child, (*path, str(key)), names)


def map(f: Callable[..., Any], tree: T, *rest: Any) -> T:
    """Applies `f` leaf by leaf to trees of one structure (host fields are taken from the first).

    Errors: ValueError when structures differ, naming both.
    """
    if not rest:
        return _map(f, tree, tree)
    first, structure = flatten(tree)
    bare = flatten(tree, host=False)[1]
    others = []
    for other in rest:
        more, same = flatten(other, host=False)
        if same != bare:
            raise ValueError(f"trees differ in structure: {describe(tree)} and {describe(other)}")
        others.append(more)
    return unflatten(structure, [f(*xs) for xs in zip(first, *others, strict=True)])


def _map(f: Callable[..., Any], x: Any, whole: Any) -> Any:
    cls = type(x)
    if cls is Tensor:
        return f(x)
    if cls is tuple or cls is list:
        return cls([_map(f, v, whole) for v in x])
    if cls is dict:
        return {k: _map(f, v, whole) for k, v in x.items()}
    if is_record(x):
        held, fields = x.__dict__, cls.__fields__
        values = {n: held[n] for n in fields.all}
        for n in fields.data:
            values[n] = _map(f, held[n], whole)
        return made(cls, values)
    if not isinstance(x, Tensor | np.ndarray | np.generic):
        flatten(whole)  # refuses it by its path
    return f(x)


def describe(tree: Any) -> str:
    """Paths with dtypes and shapes, for error messages."""
    return "{" + ", ".join(f"{p}: {x.dtype}{list(x.shape)}" for p, x in paths(tree)) + "}"


def stack(trees: Sequence[T], axis: int = 0) -> T:
    """Stacks trees of one structure (host fields are the first one's) along a new axis; of one tree, views.

    Errors: ValueError when they have different numbers of leaves.
    """
    if len(trees) == 1:
        return map(lambda x: x.unsqueeze(axis), trees[0])
    structure = flatten(trees[0])[1]
    columns = zip(*(leaves(t) for t in trees), strict=True)
    return unflatten(structure, [torch.stack(xs, axis) for xs in columns])


def concatenate(trees: Sequence[T], axis: int) -> T:
    """Joins trees of one structure along `axis`."""
    return trees[0] if len(trees) == 1 else map(lambda *xs: torch.cat(xs, axis), trees[0], *trees[1:])


def index(tree: T, i: Any) -> T:
    """`x[i]` of every leaf."""
    return map(lambda x: x[i], tree)


def where(mask: Tensor, yes: T, no: T) -> T:
    """Leaf-wise `torch.where`, `mask` broadcast over trailing axes."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.reshape(mask.shape + (1,) * (a.dim() - mask.dim())), a, b)

    return map(pick, yes, no)


def to_numpy(tree: T) -> T:
    """Tensors as numpy arrays on the host (no copy on the CPU)."""
    return map(lambda x: x.detach().cpu().numpy() if isinstance(x, Tensor) else x, tree)


def to_torch(tree: T, device: Any = None, share: bool = False) -> T:
    """Arrays as tensors of their own memory: read-only arrays are copied, so that nothing shared can be written.

    With `share` large arrays are not copied (but for those that begin elsewhere than torch's own memory does, at a
    multiple of 64 bytes: the last bit of a product may depend on it). Such a tensor must not be written to.
    """

    def tensor(x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            held = share and x.nbytes >= _LARGE and x.flags.c_contiguous and x.ctypes.data % 64 == 0
            x = torch.from_numpy(x if held else np.array(x))
        return x.to(device) if device is not None else x

    return map(tensor, tree)


def to(tree: T, device: Any) -> T:
    """Tensors moved to `device`."""
    return map(lambda x: x.to(device), tree)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and equal bits in every leaf (NaN equals NaN, -0.0 differs from 0.0)."""
    return not different_bits(a, b)


def different_bits(a: Any, b: Any) -> list[str]:
    """The paths of the leaves whose bits differ; a difference of structure is told as one entry."""
    left, right = paths(a), paths(b)
    if flatten(a)[1] != flatten(b)[1]:
        return [f"structure: {flatten(a)[1]} != {flatten(b)[1]}"]
    return [p for (p, x), (_, y) in zip(left, right, strict=True) if not _same_bits(x, y)]


def _same_bits(x: Any, y: Any) -> bool:
    x, y = (v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for v in (x, y))
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def non_finite(tree: Any) -> list[str]:
    """The paths of floating-point leaves that hold a NaN or an infinity."""
    return [p for p, x in paths(tree) if x.is_floating_point() and not bool(torch.isfinite(x).all())]
