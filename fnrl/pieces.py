"""Parts of a state that a checkpoint keeps as files of their own, each named by its SHA-256.

A record with `apart() -> (what is small, pieces)` and `together(pieces)`, such as a replay's ring, is saved so. A piece
that an earlier checkpoint holds is linked, not written again: a file goes when the last checkpoint that needs it does,
and one that is damaged spoils those that need it, and no other. Pieces are made one at a time.
"""

import contextlib
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from fnrl.errors import CheckpointError

_PIECE = re.compile(r"[0-9a-f]{64}\.safetensors")


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, going on can't be promised exact, or something could not be tidied up."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written: an earlier one may do. Other errors are the user's to settle."""


class Pieces:
    """The pieces of one state: `files` are their sizes by name, as a manifest has them."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self._make: dict[str, Callable[[], dict[str, Tensor]]] = {}

    def add(self, where: str, make: Callable[[], dict[str, Tensor]]) -> tuple[str, dict[str, Tensor]]:
        """Takes in a piece, and gives its name and what it holds. Errors: CheckpointError when it isn't finite."""
        tensors = make()
        if wrong := not_finite(tensors):
            raise CheckpointError(f"a state that isn't finite is not saved: {', '.join(f'{where}.{n}' for n in wrong)}")
        data = serialise(tensors)
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest}.safetensors"
        self.files[name] = {"size": len(data), "sha256": digest}
        self._make[name] = make
        return name, tensors

    def read(self, name: str) -> dict[str, Tensor]:
        """A piece, made again."""
        return self._make[name]()

    def write(self, directory: Path, earlier: Iterable[Path]) -> None:
        """Puts every piece into `directory`: a link to the file of an `earlier` one, if that is good."""
        earlier = list(earlier)
        for name, make in self._make.items():
            data = serialise(make())
            if not any(_link(place / name, directory / name, data) for place in earlier):
                write(directory / name, data)


def is_name(name: str) -> bool:
    """Whether a file's name is that of a piece."""
    return _PIECE.fullmatch(name) is not None


def _link(there: Path, here: Path, data: bytes) -> bool:
    """Whether `there` holds `data`, and could be linked; else it is written (also where links can't be)."""
    try:
        with opened(there) as file:
            same = os.fstat(file.fileno()).st_size == len(data) and file.read() == data
        if same:
            os.link(there, here)
        else:
            warnings.warn(f"{there} is damaged: it is written anew", CheckpointWarning, stacklevel=6)
        return same
    except (OSError, DamagedError):
        return False


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A plain file, open to be read. Errors: DamagedError when it is something else; OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DamagedError(f"{path.name} is not a plain file")
        yield file


def write(path: Path, data: bytes) -> None:
    """A new file that lasts."""
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    floats = {n: x for n, x in tensors.items() if x.is_floating_point() or x.is_complex()}
    return [n for n, x in floats.items() if not bool(torch.isfinite(x).all())]


def serialise(leaves: dict[str, Tensor]) -> bytes:
    """The tensors as safetensors, made contiguous, those that share memory copied apart."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, x in leaves.items():
        storage = x.untyped_storage().data_ptr()
        apart[name] = x.clone(memory_format=torch.contiguous_format) if storage in seen else x.contiguous()
        seen.add(storage)
    return safetensors.torch.save(apart)
