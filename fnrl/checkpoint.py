"""Checkpoints: a gathered state as safetensors and a JSON manifest, hashed, written atomically, read without pickle.

A run directory holds `step-000000123456/` with `state.safetensors` (every tensor by its path) and `manifest.json`:
format, versions, the SHA-256 and size of the tensors, the structure with its host and static values, the printed
configuration, step, metrics and time, under a SHA-256 of its own. The rows of rings lie beside them in pieces, hard
links where an earlier checkpoint has the same (`fnrl.pieces`). A checkpoint is written beside its place, synced and
renamed: it is whole or it is not there. POSIX only.
"""

import dataclasses
import datetime
import errno
import hashlib
import os
import platform
import re
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import fnrl
from fnrl import manifest as _manifest
from fnrl import pieces as _pieces
from fnrl.component import printed
from fnrl.errors import CheckpointError
from fnrl.manifest import ANY, FORMAT, LIMIT, diff
from fnrl.pieces import CheckpointWarning, DamagedError, Pieces

__all__ = ["ANY", "Checkpoint", "CheckpointWarning", "Checkpoints", "best", "diff", "load", "newest", "require"]

_STATE, _MANIFEST, _TEMPORARY = "state.safetensors", "manifest.json", ".tmp-"
_NAME = re.compile(r"step-([0-9]{12,})(?:\.([0-9]+))?(-best)?")


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


class Checkpoints:
    """The checkpoints of one run: takes the lock of `directory`, keeps the `keep` newest and the best one.

    Newest is by step, never by clock. A context manager; reading needs no store (`load`, `newest`).
    Errors: CheckpointError when another run holds the directory (its process and host), or it can't be written.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"Checkpoints(keep={keep!r}): expected an int of at least 1")
        self.directory, self.keep = Path(directory).resolve(), keep
        self._lock = filelock.FileLock(self.directory / ".lock", timeout=0, thread_local=False)
        owner = self.directory / ".lock.owner"
        try:
            new = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in new:
                _sync(path.parent)
            self._lock.acquire()
            owner.write_text(f"{os.getpid()} {socket.gethostname()}\n")
        except filelock.Timeout:
            pid, _, host = owner.read_text().strip().partition(" ") if owner.exists() else ("?", "", "?")
            raise CheckpointError(
                f"{self.directory} is in use by process {pid} on {host}: give each run a directory of its own"
            ) from None
        except OSError as error:
            self._lock.release()
            raise CheckpointError(f"{self.directory} can't be written: {error}") from error

    def close(self) -> None:
        """Gives the directory back; safe to call twice."""
        self._lock.release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def paths(self) -> list[Path]:
        """The checkpoints there are, good or not, the newest last."""
        return [self.directory / str(name) for name in _list(self.directory)]

    def newest(self, like: Any = ANY) -> Checkpoint:
        """As `fnrl.checkpoint.newest`."""
        return newest(self.directory, like)

    def best(self, like: Any = ANY) -> Checkpoint:
        """As `fnrl.checkpoint.best`."""
        return best(self.directory, like)

    def save(
        self, state: Any, *, step: int, config: Any = None, metrics: dict[str, Any] | None = None, best: bool = False
    ) -> Path:
        """Writes a gathered state and returns its directory; rings are written by pieces, others twice in memory.

        `step` orders checkpoints, so it should grow with every save: environment steps, or updates.
        With `best`, it stays until a later best one, whatever `keep` says. The same saved again under one step is
        left alone; something else takes its place. `config` and `metrics` are kept as `printed`.
        Errors: CheckpointError when the state isn't finite or can't be saved (nothing is written), or when writing
        fails (what was there before is still there). ValueError for a bad step.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"save(step={step!r}): expected an int of at least 0")
        if not self._lock.is_locked:
            raise CheckpointError(f"{self.directory}: this store is closed")
        manifest, files, pieces = _compose(state, step, config, metrics or {})
        names = _list(self.directory)
        for leftover in sorted(self.directory.glob(f"{_TEMPORARY}step-*")):  # of a save or a removal that was cut off
            _remove(leftover)
        before = [n for n in names if n.step == step]
        if before and (before[-1].best or not best) and self._holds(before[-1], manifest):
            return self.directory / str(before[-1])
        name = _Name(step, before[-1].revision + 1 if before else 0, best or any(n.best for n in before))
        self._publish(name, files, pieces)
        if names and names[-1].step > step:
            hint = "newest() looks there first: remove it if the run was taken back on purpose"
            warnings.warn(f"saved {name}, but {names[-1]} is later: {hint}", CheckpointWarning, stacklevel=2)
        self._rotate(name)
        return self.directory / str(name)

    def _holds(self, name: "_Name", manifest: dict[str, Any]) -> bool:
        try:
            _, there = _read(self.directory / str(name))
        except CheckpointError:
            return False
        return {**there, "time": None, "sha256": None} == {**manifest, "time": None, "sha256": None}

    def _publish(self, name: "_Name", files: dict[str, bytes], pieces: Pieces) -> None:
        temporary = self.directory / f"{_TEMPORARY}{name}"
        try:
            temporary.mkdir()
            pieces.write(temporary, self.paths()[::-1])
            for file, data in files.items():
                _pieces.write(temporary / file, data)
            _sync(temporary)
            os.rename(temporary, self.directory / str(name))
            _sync(self.directory)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(f"{self.directory / str(name)} can't be written: {error}") from error
            raise

    def _rotate(self, saved: "_Name") -> None:
        """Removes all but the newest, the best, the one just saved, and of each step the last revision."""
        last = list({n.step: n for n in _list(self.directory)}.values())
        kept = {*last[-self.keep :], *[n for n in last if n.best][-1:], saved}
        for name in _list(self.directory):
            if name not in kept:
                _remove(self.directory / str(name))


# -- reading --------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The checkpoint at `path`, which must have the structure of `like`.

    `like` is a tree whose values don't matter: compared are classes, dict keys, static fields, and the shapes and
    dtypes of leaves; host fields are the checkpoint's own. `ANY` stands where anything goes (plans, rings, simulators:
    what they hold depends on where the run stood), so `SchemeState(RootState(algo, ANY), lanes)` checks the
    algorithm's state with its parameters and, by their leading axis, the lanes.
    Errors: CheckpointError when it is missing, damaged, of a newer format, or differs from `like` (at the paths named).
    """
    return _load(Path(path).resolve(), like)


def newest(directory: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The newest good checkpoint of a run directory, without its lock; passes over damage with a `CheckpointWarning`.

    Errors: CheckpointError when there is none, or none is good (saying what is wrong with each); as `load` when it
    doesn't fit.
    """
    return _first(Path(directory).resolve(), like, lambda names: names[::-1])


def best(directory: str | os.PathLike[str], like: Any = ANY) -> Checkpoint:
    """The checkpoint last saved as the best one. Errors: as `newest`."""
    return _first(Path(directory).resolve(), like, lambda names: [n for n in names if n.best][-1:])


class _Name(NamedTuple):
    step: int
    revision: int  # a step saved again takes the next one: there is no moment without either
    best: bool

    def __str__(self) -> str:
        return f"step-{self.step:012d}{f'.{self.revision}' if self.revision else ''}{'-best' if self.best else ''}"


def _list(directory: Path) -> list[_Name]:
    """The checkpoints in a directory, oldest first."""
    try:
        found = [m for m in map(_NAME.fullmatch, os.listdir(directory)) if m]
    except OSError as error:
        raise CheckpointError(f"{directory} can't be read: {error}") from error
    names = [(_Name(int(m[1]), int(m[2] or 0), bool(m[3])), m[0]) for m in found]
    return sorted(name for name, text in names if str(name) == text)


def _first(directory: Path, like: Any, order: Callable[[list[_Name]], list[_Name]]) -> Checkpoint:
    wrong: list[str] = []
    for name in order(_list(directory)):
        try:
            found = _load(directory / str(name), like)
            if found.step != name.step:
                raise DamagedError(f"{found.path} holds step {found.step}: it was renamed")
            return found
        except DamagedError as error:
            if not os.path.lexists(directory / str(name)):  # rotated away by the run that goes on here: look again
                return _first(directory, like, order)
            warnings.warn(f"a damaged checkpoint is passed over: {error}", CheckpointWarning, stacklevel=3)
            wrong.append(str(error))
    raise CheckpointError("\n  ".join([f"there is no good checkpoint in {directory}", *wrong]))


def require(found: Checkpoint, like: Any) -> None:
    """Refuses a checkpoint that has not the structure of `like` (CheckpointError)."""
    wrong = list(_manifest.differences(found.state, like))
    if wrong:
        raise CheckpointError("\n  ".join([f"{found.path} doesn't fit:", *wrong]))


def _load(path: Path, like: Any) -> Checkpoint:
    found, _ = _read(path)
    require(found, like)
    was, here = found.versions, _versions()
    other = [f"{k} {was.get(k)} -> {v}" for k, v in here.items() if k != "python" and was.get(k) != v]
    if other:
        warnings.warn(f"{path}: going on may not be bit-exact: {', '.join(other)}", CheckpointWarning, stacklevel=4)
    return found


def _read(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint at `path` and its manifest; every byte is hashed before it is used."""
    try:
        if path.is_symlink():
            raise DamagedError("it is a symbolic link")
        manifest = _manifest.unseal(_bytes(path, _MANIFEST, None))
        files = {_STATE: _manifest.payload(manifest["structure"]), **_manifest.pieces_of(manifest["structure"])}
        named = list(manifest["files"])
        if set(named) != {*files} or not all(_pieces.is_name(n) for n in named if n != _STATE):
            raise DamagedError(f"its manifest names the files {named}, expected {list(files)}")
        for name, least in files.items():
            if not 0 <= manifest["files"][name]["size"] - least <= LIMIT:
                size = manifest["files"][name]["size"]
                raise DamagedError(f"{name} can't have {size} bytes with the structure in its manifest")

        def tensors_of(name: str) -> dict[str, Tensor]:
            data = _bytes(path, name, manifest["files"][name]["size"])
            if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
                raise DamagedError(f"{name} doesn't have the SHA-256 in its manifest: it was changed or swapped")
            return safetensors.torch.load(data)

        tensors = tensors_of(_STATE)
        state = _manifest.decode(manifest["structure"], tensors, tensors_of)
        if tensors:
            raise DamagedError(f"{_STATE} has tensors that its manifest doesn't name: {sorted(tensors)}")
        said = {n: manifest[n] for n in ("step", "config", "metrics", "time")}
        found = Checkpoint(path, state, versions=dict(manifest["versions"]), **said)
        extra = sorted({*os.listdir(path)} - {*files, _MANIFEST})
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error.__cause__
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise DamagedError(f"{path}: {'a symbolic link is not followed' if link else error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a file can be wrong in any way: its hashes may be right and its content not
        raise DamagedError(f"{path}: its content is malformed: {type(error).__name__}: {error}") from error
    if extra:
        warnings.warn(f"{path}: files of someone else's are ignored: {extra}", CheckpointWarning, stacklevel=5)
    return found, manifest


def _bytes(path: Path, name: str, size: int | None) -> bytes:
    """All of a plain file that has `size` bytes, or at most `LIMIT`."""
    with _pieces.opened(path / name) as file:
        found = os.fstat(file.fileno()).st_size
        if found > LIMIT if size is None else found != size:
            raise DamagedError(f"{name} has {found} bytes, expected {f'at most {LIMIT}' if size is None else size}")
        return file.read(found)


# -- writing --------------------------------------------------------------------------------------------------------


def _compose(
    state: Any, step: int, config: Any, metrics: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, bytes], Pieces]:
    """The manifest, the bytes of its files, and the pieces."""
    try:
        structure, leaves, pieces = _manifest.encode(state)
        if wrong := _pieces.not_finite(leaves):
            raise CheckpointError(f"a state that isn't finite is not saved (step {step}): {', '.join(wrong)}")
        data = _pieces.serialise(leaves)
        manifest = {
            "format": FORMAT,
            "versions": _versions(),
            "files": {_STATE: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}, **pieces.files},
            "step": step,
            "metrics": printed({k: v.tolist() if hasattr(v, "tolist") else v for k, v in metrics.items()}),
            "config": printed(config),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "structure": structure,
        }
        sealed = _manifest.seal(manifest)
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the state can't be saved: {error}") from error
    if max(len(sealed), len(data) - _manifest.payload(structure)) > LIMIT:
        raise CheckpointError(f"the state can't be saved: its structure takes more than {LIMIT} bytes")
    return manifest, {_STATE: data, _MANIFEST: sealed}, pieces


def _versions() -> dict[str, Any]:
    """What bit-equality depends on."""
    return {
        "fnrl": fnrl.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    """Takes a checkpoint out of sight in one rename before it is deleted."""
    try:
        hidden = path if path.name.startswith(_TEMPORARY) else path.with_name(f"{_TEMPORARY}{path.name}")
        os.rename(path, hidden)
        shutil.rmtree(hidden) if hidden.is_dir() and not hidden.is_symlink() else hidden.unlink()
    except OSError as error:
        warnings.warn(f"an old checkpoint could not be removed: {error}", CheckpointWarning, stacklevel=4)
