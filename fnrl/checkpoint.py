"""Checkpoints: a gathered state as safetensors and a JSON manifest, hashed, written atomically, read without pickle.

A run directory holds `step-000000123456/` with `state.safetensors` (every tensor by its path) and `manifest.json` (structure, host and
static values, printed configuration, versions, the SHA-256 of the tensors). The manifest's first line is the SHA-256 of the rest.
Reading builds records of `fnrl.record.RECORDS`, dataclasses of `PLAIN`, tuples, lists, dicts and plain values; it imports and runs
nothing that a file names. A directory is written beside its place, synced, renamed: it is whole or it is not there.
"""

import dataclasses
import datetime
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import fnrl
from fnrl.component import printed
from fnrl.errors import CheckpointError
from fnrl.record import PLAIN, RECORDS, is_record, name_of, plain, short
from fnrl.types import Layout

FORMAT = 1
LIMIT = 64 * 2**20  # bytes of JSON that are read at most: of a manifest, and of a header of tensors

_STATE, _MANIFEST, _TEMPORARY = "state.safetensors", "manifest.json", ".tmp-"
_NAME = re.compile(r"step-([0-9]{12,})(?:\.([0-9]+))?(-best)?")
_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)
    + (torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
}

plain(Layout)


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, exactness can't be promised, or something could not be tidied up."""


class _Damaged(CheckpointError):
    """A checkpoint that is not what was written: the one before it may do. Any other CheckpointError is the user's to settle."""


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()  # stands in a `like` for a part that may be anything


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the gathered state (on the CPU), and what was said about it when it was saved."""

    path: Path
    state: Any
    step: int
    config: Any
    metrics: dict[str, Any]
    versions: dict[str, Any]
    time: str


# -- a tree as JSON and tensors -------------------------------------------------------------------------------------


def _encode(x: Any, path: tuple[str, ...], leaves: dict[str, Any]) -> Any:
    """The structure of `x` as JSON; tensors and arrays are put into `leaves`."""
    kind, where = type(x), ".".join(path) or "the state itself"
    if isinstance(x, Tensor | np.ndarray | np.generic):
        name = ".".join(path)
        while name in leaves or name == "__metadata__":  # dict keys with dots may read alike; the format keeps one name
            name += "'"
        leaves[name] = tensor = _tensor(x, where)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"leaf": name, "dtype": dtype, "shape": list(tensor.shape), "numpy": not isinstance(x, Tensor)}
    if is_record(x) or name_of(kind) in PLAIN:
        registry = "record" if is_record(x) else "plain"
        known = (RECORDS if registry == "record" else PLAIN).get(name_of(kind))
        if known is None or _names(known) != _names(kind):
            raise CheckpointError(f"{where}: {name_of(kind)} is not, or no longer, the class registered by that name")
        return {registry: name_of(kind), "fields": {n: _encode(getattr(x, n), (*path, n), leaves) for n in _names(kind)}}
    if kind is tuple or kind is list:
        return {kind.__name__: [_encode(v, (*path, str(i)), leaves) for i, v in enumerate(x)]}
    if kind is dict:
        pairs = [(_encode(k, (*path, "a key"), {}), _encode(v, (*path, str(k)), leaves)) for k, v in x.items()]
        return {"dict": pairs}
    if kind is float and not math.isfinite(x):
        return {"float": repr(x)}
    if x is None or kind in (bool, int, float, str):
        return x
    raise CheckpointError(
        f"{where}: a {kind.__name__} can't be saved, got {short(x)}; expected tensors, arrays, records, tuples, lists, dicts, numbers, "
        "strings, or a dataclass registered by fnrl.record.plain. A state that can be stepped is gathered first: scheme.gather(state)"
    )


def _tensor(x: Any, where: str) -> Tensor:
    try:
        x = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: an array of {x.dtype} can't be saved: {error}") from error
    if x.layout != torch.strided or str(x.dtype).removeprefix("torch.") not in _DTYPES:
        raise CheckpointError(f"{where}: a {x.layout} tensor of {x.dtype} can't be saved; dtypes are {', '.join(_DTYPES)}")
    return x.resolve_conj().resolve_neg()


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _serialise(leaves: dict[str, Tensor]) -> bytes:
    seen: set[int] = set()
    for name, x in leaves.items():
        storage = x.untyped_storage().data_ptr()
        leaves[name] = x.clone(memory_format=torch.contiguous_format) if storage in seen else x.contiguous()
        seen.add(storage)
    return safetensors.torch.save(leaves)


def _payload(structure: Any) -> Iterator[int]:
    """Bytes of each leaf."""
    if isinstance(structure, dict):
        if "leaf" in structure:
            yield math.prod(structure["shape"]) * _DTYPES[structure["dtype"]].itemsize
            return
        structure = list(structure.values())
    if isinstance(structure, list):
        for child in structure:
            yield from _payload(child)


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of a structure; takes what it uses out of `tensors`."""
    if not isinstance(node, dict):
        return node
    kind, value = next(iter(node.items()))
    if kind == "leaf":
        x = tensors.pop(value)
        if x.dtype != _DTYPES[node["dtype"]] or list(x.shape) != node["shape"]:
            raise _Damaged(f"{value} is {short(x)}, its manifest says {node['dtype']}{node['shape']}")
        return x.numpy() if node["numpy"] else x
    if kind in ("record", "plain"):
        return _build(kind, value, {n: _decode(v, tensors) for n, v in node["fields"].items()})
    if kind == "tuple":
        return tuple([_decode(v, tensors) for v in value])
    if kind == "list":
        return [_decode(v, tensors) for v in value]
    if kind == "dict":
        return {_decode(k, {}): _decode(v, tensors) for k, v in value}
    if kind == "float":
        return float(value)
    raise _Damaged(f"its structure holds an unknown kind {kind!r}")


def _build(kind: str, name: str, values: dict[str, Any]) -> Any:
    cls = (RECORDS if kind == "record" else PLAIN).get(name)
    if cls is None:
        raise CheckpointError(f"it holds a {name}, which isn't a {kind} known here: import the module that defines it first")
    if set(values) != set(_names(cls)):
        raise CheckpointError(f"its {name} has the fields {sorted(values)}, the class here has {sorted(_names(cls))}")
    try:
        return cls(**values)
    except Exception as error:
        raise CheckpointError(f"its {name} is refused by the class here: {error}") from error


# -- reading --------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The checkpoint at `path`, which must have the structure of `like`.

    `like` is a tree whose values don't matter: what is compared are the classes, dict keys, static fields, and the shapes and dtypes
    of leaves; host fields are the checkpoint's own. `ANY` stands where anything goes (a plan, a ring, simulators: what they hold
    depends on where the run stood), so `SchemeState(CentralisedState(algo, ANY), lanes)` checks the parameters, and by their leading
    axis the lanes.
    Errors: CheckpointError when it is missing, damaged, of a newer format, or differs from `like` (with every path that does).
    """
    return _load(Path(path).resolve(), like)


def newest(directory: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The newest good checkpoint of a run directory; a damaged one is passed over with a `CheckpointWarning`. Takes no lock.

    Errors: CheckpointError when there is none, or none is good (with what is wrong with each); as `load` does when it doesn't fit.
    """
    return _first(Path(directory), like, lambda names: list(reversed(names)))


def best(directory: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The checkpoint last saved as the best one. Errors: as `newest`."""
    return _first(Path(directory), like, lambda names: [n for n in names if n.best][-1:])


class _Name(NamedTuple):
    step: int
    revision: int  # a step saved again takes the next one, so that there is no moment without either
    best: bool

    def __str__(self) -> str:
        return f"step-{self.step:012d}{f'.{self.revision}' if self.revision else ''}{'-best' if self.best else ''}"


def _list(directory: Path) -> list[_Name]:
    """The checkpoints in a directory, oldest first."""
    try:
        found = [m for m in map(_NAME.fullmatch, os.listdir(directory)) if m]
    except OSError as error:
        raise CheckpointError(f"no run directory can be read at {directory}: {error}") from error
    names = (_Name(int(m[1]), int(m[2] or 0), bool(m[3])) for m in found)
    return sorted(n for n, m in zip(names, found, strict=True) if str(n) == m[0])


def _first(directory: Path, like: Any, order: Any) -> Checkpoint:
    names, wrong = _list(directory), []
    for name in order(names):
        try:
            return _load(directory / str(name), like)
        except _Damaged as error:
            warnings.warn(f"passed over a damaged checkpoint: {error}", CheckpointWarning, stacklevel=3)
            wrong.append(str(error))
    if _list(directory) != names:  # a run that goes on in this directory has saved and rotated meanwhile
        return _first(directory, like, order)
    raise CheckpointError("\n".join([f"no good checkpoint in {directory}" + ":" * bool(wrong), *wrong]))


def _load(path: Path, like: Any) -> Checkpoint:
    manifest, state = _read(path)
    wrong = list(_differences(state, like, ()))
    if wrong:
        raise CheckpointError("\n  ".join([f"{path} doesn't fit:", *wrong]))
    was, here = manifest["versions"], _versions()
    other = [f"{k} {was.get(k)} -> {v}" for k, v in here.items() if k != "python" and was.get(k) != v]
    if other:
        warnings.warn(f"{path}: going on may not be bit-exact: {', '.join(other)}", CheckpointWarning, stacklevel=4)
    return Checkpoint(path, state, **{n: manifest[n] for n in ("step", "config", "metrics", "versions", "time")})


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """The manifest and the state at `path`, every byte hashed before it is used."""
    try:
        if path.is_symlink():
            raise _Damaged("it is a symbolic link")
        manifest = _unseal(_bytes(path, _MANIFEST, None))
        size = manifest["files"][_STATE]["size"]
        if list(manifest["files"]) != [_STATE]:
            raise _Damaged(f"its manifest names the files {list(manifest['files'])}, expected {[_STATE]}")
        if not 0 <= size - sum(_payload(manifest["structure"])) <= LIMIT:
            raise _Damaged(f"{_STATE} can't have {size} bytes with the structure of its manifest")
        data = _bytes(path, _STATE, size)
        if hashlib.sha256(data).hexdigest() != manifest["files"][_STATE]["sha256"]:
            raise _Damaged(f"{_STATE} doesn't have the SHA-256 in its manifest: {len(data)} bytes were changed or swapped")
        tensors = safetensors.torch.load(data)
        state = _decode(manifest["structure"], tensors)
        extra = sorted({*os.listdir(path)} - {_STATE, _MANIFEST})
        if tensors or extra:
            warnings.warn(f"{path}: ignored {[*tensors, *extra]}, not in its manifest", CheckpointWarning, stacklevel=2)
        return manifest, state
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error.__cause__
    except (OSError, SafetensorError) as error:
        what = "a symbolic link is refused" if getattr(error, "errno", None) == errno.ELOOP else str(error)
        raise _Damaged(f"{path}: {what}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{path}: its manifest is malformed: {type(error).__name__}: {error}") from error


def _bytes(path: Path, name: str, size: int | None) -> bytes:
    with os.fdopen(os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise _Damaged(f"{name} isn't a plain file")
        if size is None and found.st_size > LIMIT or size is not None and found.st_size != size:
            raise _Damaged(f"{name} has {found.st_size} bytes, expected {f'at most {LIMIT}' if size is None else size}")
        return file.read(found.st_size)


def _seal(manifest: dict[str, Any]) -> bytes:
    body = json.dumps(manifest, indent=1, allow_nan=False).encode()[2:] + b"\n"
    return b'{"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body


def _unseal(data: bytes) -> dict[str, Any]:
    seal = _SEAL.match(data)
    if not seal or hashlib.sha256(data[seal.end() :]).hexdigest().encode() != seal[1]:
        raise _Damaged(f"{_MANIFEST} doesn't have the SHA-256 in its first line: it was cut short or changed")
    manifest = json.loads(data)
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"it has format {manifest['format']}; this fnrl ({fnrl.__version__}) reads up to {FORMAT}")
    return manifest


def _versions() -> dict[str, Any]:
    return {
        "fnrl": fnrl.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _differences(found: Any, like: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Where a tree differs in structure from what is expected."""
    where, cls = ".".join(path) or "the state itself", type(like)
    if like is ANY:
        return
    if isinstance(like, Tensor | np.ndarray | np.generic):
        if not hasattr(found, "dtype") or short(found) != short(like) or found.shape != like.shape:
            yield f"{where}: expected {_say(like)}, the checkpoint has {_say(found)}"
    elif type(found) is not cls:
        yield f"{where}: expected {_say(like)}, the checkpoint has {_say(found)}"
    elif is_record(like):
        for name in cls.__fields__.data:
            yield from _differences(getattr(found, name), getattr(like, name), (*path, name))
        for name in cls.__fields__.static:
            there, here = printed(getattr(found, name)), printed(getattr(like, name))
            yield from (f"{line} (checkpoint -> expected)" for line in _diff(there, here, ".".join((*path, name))))
    elif cls in (tuple, list, dict):
        there, here = ({str(k): v for k, v in (x.items() if cls is dict else enumerate(x))} for x in (found, like))
        for key in dict.fromkeys((*here, *there)):
            if key not in there:
                yield f"{where}.{key}: missing, expected {_say(here[key])}"
            elif key not in here:
                yield f"{where}.{key}: extra, the checkpoint has {_say(there[key])}"
            else:
                yield from _differences(there[key], here[key], (*path, key))
        if [*there] != [*here] and {*there} == {*here}:
            yield f"{where}: expected the order {[*here]}, the checkpoint has {[*there]}"


def _say(x: Any) -> str:
    if isinstance(x, np.ndarray | np.generic):
        return f"an array {x.dtype}{list(x.shape)}"
    return short(x) if isinstance(x, Tensor) or x in ((), None) else f"a {type(x).__name__}"


def diff(a: Any, b: Any) -> list[str]:
    """Where two configurations, as `printed`, disagree: `algo.lr: 0.0003 -> 0.001`."""
    return list(_diff(a, b, ""))


def _diff(a: Any, b: Any, path: str) -> Iterator[str]:
    absent = object()
    if isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(itertools.zip_longest(a, b, fillvalue=absent)):
            yield from _entry(x, y, f"{path}[{i}]", absent)
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):  # the key "" holds the class: it reads as the part's own path
            below = f"{path}.{key}" if path and key else path or key
            yield from _entry(a.get(key, absent), b.get(key, absent), below, absent)
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield f"{path or 'the configuration'}: {_brief(a)} -> {_brief(b)}"
