"""A tree as JSON and tensors, and back: what a checkpoint says about its state. No files are touched here.

The structure of a tree is JSON in which the first key of an object is its kind: `{"leaf": name, "dtype": .., ..}`,
`{"record": class, "fields": [[name, node], ..]}`, `plain` too, `tuple`, `list`, `dict` (pairs), `float` (inf, nan),
`{"apart": node, "pieces": [[file, {name: leaf}], ..]}` (see `fnrl.pieces`); all else is itself. `decode` builds
records of `fnrl.record.RECORDS` and dataclasses of `PLAIN`: nothing is imported or run because a file names it.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnrl.component import printed
from fnrl.errors import CheckpointError
from fnrl.pieces import DamagedError, Pieces
from fnrl.record import PLAIN, RECORDS, is_record, name_of, plain, short
from fnrl.types import Layout

FORMAT = 2
LIMIT = 64 * 2**20  # bytes of JSON read at most, in a manifest and in the header of the tensors

_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_ABSENT = type("Absent", (), {"__repr__": lambda _: "(absent)"})()
_DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    )
}

plain(Layout)


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()  # stands in a `like` for a part that may be anything


def encode(x: Any) -> tuple[Any, dict[str, Tensor], Pieces]:
    """The structure of a tree as JSON, its tensors by path, and its pieces.

    Errors: CheckpointError for what can't be saved (a token, an unregistered class, a sparse tensor), naming its path.
    """
    leaves: dict[str, Tensor] = {}
    pieces = Pieces()
    return _encode(x, (), leaves, pieces), leaves, pieces


def _encode(x: Any, path: tuple[str, ...], leaves: dict[str, Tensor], pieces: Pieces) -> Any:
    kind, where = type(x), ".".join(path) or "the state itself"
    if isinstance(x, Tensor | np.ndarray | np.generic):
        name = ".".join(path)
        while name in leaves or name == "__metadata__":  # keys with dots may read alike; safetensors reserves a name
            name += "'"
        leaves[name] = _tensor(x, where)
        return _leaf(name, x)
    if is_record(x) or name_of(kind) in PLAIN:
        registry = "record" if is_record(x) else "plain"
        known = (RECORDS if registry == "record" else PLAIN).get(name_of(kind))
        if known is None or _names(known) != _names(kind):
            raise CheckpointError(f"{where}: {name_of(kind)} is not, or no longer, the class registered by that name")
        small, cut = x.apart() if hasattr(kind, "apart") else (x, ())
        fields = [[n, _encode(getattr(small, n), (*path, n), leaves, pieces)] for n in _names(kind)]
        node = {registry: name_of(kind), "fields": fields}
        if not cut:
            return node
        kept = [pieces.add(where, make) for make in cut]
        return {"apart": node, "pieces": [[name, {n: _leaf(n, x) for n, x in held.items()}] for name, held in kept]}
    if kind is tuple or kind is list:
        return {kind.__name__: [_encode(v, (*path, str(i)), leaves, pieces) for i, v in enumerate(x)]}
    if kind is dict and all(type(k) in (str, int) for k in x):
        return {"dict": [[k, _encode(v, (*path, str(k)), leaves, pieces)] for k, v in x.items()]}
    if kind is float and not math.isfinite(x):
        return {"float": repr(x)}
    if x is None or kind in (bool, int, float, str):
        return x
    raise CheckpointError(
        f"{where}: {short(x)} of type {kind.__name__} can't be saved; expected tensors, arrays, records, tuples, "
        "lists, dicts with str or int keys, numbers, strings, or a class registered by fnrl.record.plain. "
        "A state that holds tokens is gathered first: scheme.gather(state)"
    )


def _leaf(name: str, x: Any) -> dict[str, Any]:
    dtype = str(x.dtype).removeprefix("torch.")
    return {"leaf": name, "dtype": dtype, "shape": list(x.shape), "numpy": not isinstance(x, Tensor)}


def _tensor(x: Any, where: str) -> Tensor:
    try:
        tensor = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: an array of {x.dtype} can't be saved: {error}") from error
    if tensor.layout != torch.strided or str(tensor.dtype).removeprefix("torch.") not in _DTYPES or tensor.is_meta:
        raise CheckpointError(f"{where}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} can't be saved")
    return tensor.cpu().resolve_conj().resolve_neg()


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def payload(structure: Any) -> int:
    """The bytes of all leaves that are not in pieces."""
    if isinstance(structure, dict):
        if "leaf" in structure:
            return math.prod(structure["shape"]) * _DTYPES[structure["dtype"]].itemsize
        structure = [v for k, v in structure.items() if k != "pieces"]
    return sum(payload(child) for child in structure) if isinstance(structure, list) else 0


def pieces_of(structure: Any) -> dict[str, int]:
    """The files of the pieces, and the bytes of the leaves of each."""
    if isinstance(structure, dict):
        mine = {str(name): payload(list(leaves.values())) for name, leaves in structure.get("pieces", ())}
        return mine | pieces_of([v for k, v in structure.items() if k != "pieces"])
    found: dict[str, int] = {}
    for child in structure if isinstance(structure, list) else ():
        found |= pieces_of(child)
    return found


def decode(node: Any, tensors: dict[str, Tensor], piece: Callable[[str], dict[str, Tensor]]) -> Any:
    """The tree of a structure; what it uses is taken out of `tensors`, and read by `piece(file)`.

    Errors: CheckpointError for a class that isn't registered here or has other fields, DamagedError for a leaf that is
    not as the structure says.
    """
    if not isinstance(node, dict):
        return node
    kind = next(iter(node), None)
    value = node[kind]
    if kind == "apart":
        small = decode(value, tensors, piece)
        return small.together([functools.partial(_piece, piece, *said) for said in node["pieces"]])
    if kind == "leaf":
        x = tensors.pop(value)
        if x.dtype != _DTYPES[node["dtype"]] or list(x.shape) != node["shape"]:
            raise DamagedError(f"{value} is {short(x)}, its manifest says {node['dtype']}{node['shape']}")
        return x.numpy() if node["numpy"] else x
    if kind in ("record", "plain"):
        return _build(kind, value, {n: decode(v, tensors, piece) for n, v in node["fields"]})
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)([decode(v, tensors, piece) for v in value])
    if kind == "dict":
        return {k: decode(v, tensors, piece) for k, v in value}
    if kind == "float":
        return float(value)
    raise DamagedError(f"its structure holds an unknown kind {kind!r}")


def _piece(read: Callable[[str], dict[str, Tensor]], name: str, said: dict[str, Any]) -> dict[str, Tensor]:
    tensors = read(name)
    found = {n: decode(leaf, tensors, read) for n, leaf in said.items()}
    if tensors:
        raise DamagedError(f"{name} has tensors that the manifest doesn't name: {sorted(tensors)}")
    return found


def _build(kind: str, name: str, values: dict[str, Any]) -> Any:
    cls = (RECORDS if kind == "record" else PLAIN).get(name)
    if cls is None:
        raise CheckpointError(f"it holds a {name}, not a {kind} known here: import the module that defines it first")
    lacking = {f.name for f in dataclasses.fields(cls) if f.name not in values}
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    if set(values) - set(_names(cls)) or lacking - optional:
        raise CheckpointError(f"its {name} has the fields {sorted(values)}, the class here has {sorted(_names(cls))}")
    try:
        return cls(**values)
    except Exception as error:
        raise CheckpointError(f"its {name} is refused by the class here: {error}") from error


def differences(found: Any, like: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where a tree differs from `like` in classes, keys, static fields, shapes and dtypes; `ANY` fits anything."""
    where, cls = ".".join(path) or "the state itself", type(like)
    if like is ANY:
        return
    if isinstance(like, Tensor | np.ndarray | np.generic):
        if _say(found) != _say(like):
            yield f"{where}: expected {_say(like)}, the checkpoint has {_say(found)}"
    elif type(found) is not cls:
        yield f"{where}: expected {_say(like)}, the checkpoint has {_say(found)}"
    elif is_record(like):
        for name in cls.__fields__.data:
            yield from differences(getattr(found, name), getattr(like, name), (*path, name))
        for name in cls.__fields__.static:
            there, here = printed(getattr(found, name)), printed(getattr(like, name))
            yield from (f"{line} (checkpoint -> expected)" for line in _diff(there, here, ".".join((*path, name))))
    elif cls in (tuple, list, dict):
        there, here = ({str(k): v for k, v in (x.items() if cls is dict else enumerate(x))} for x in (found, like))
        for key in dict.fromkeys((*here, *there)):
            if key not in there:
                yield f"{'.'.join((*path, key))}: missing, expected {_say(here[key])}"
            elif key not in here:
                yield f"{'.'.join((*path, key))}: extra, the checkpoint has {_say(there[key])}"
            else:
                yield from differences(there[key], here[key], (*path, key))
        if [*there] != [*here] and {*there} == {*here}:
            yield f"{where}: expected the order {[*here]}, the checkpoint has {[*there]}"


def _say(x: Any) -> str:
    if isinstance(x, np.ndarray | np.generic):
        return f"an array {x.dtype}{list(x.shape)}"
    return short(x) if isinstance(x, Tensor) or x is None or x == () else f"a {type(x).__name__}"


def diff(a: Any, b: Any) -> list[str]:
    """Where two configurations, as `printed`, disagree: `algo.lr: 0.0003 -> 0.001`."""
    return list(_diff(a, b, ""))


def _diff(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(itertools.zip_longest(a, b, fillvalue=_ABSENT)):
            yield from _diff(x, y, f"{path}[{i}]")
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):  # the key "" holds the class: it reads as the part's own path
            yield from _diff(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{path}.{key}" if path and key else path or key)
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield f"{path or 'the configuration'}: {a!r} -> {b!r}"


def seal(manifest: dict[str, Any]) -> bytes:
    """JSON whose first line is the SHA-256 of the rest."""
    body = json.dumps(manifest, indent=1, allow_nan=False).encode()[2:] + b"\n"
    return b'{"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body


def unseal(data: bytes) -> dict[str, Any]:
    """What was sealed.

    Errors: DamagedError when a bit of it has changed, CheckpointError when its format is newer than `FORMAT`.
    """
    found = _SEAL.match(data)
    if not found or hashlib.sha256(data[found.end() :]).hexdigest().encode() != found[1]:
        raise DamagedError("the manifest doesn't have the SHA-256 in its first line: it was cut short or changed")
    manifest = json.loads(data)
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"it has format {manifest['format']}, the newest read here is {FORMAT}: update fnrl")
    return manifest
