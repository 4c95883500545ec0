"""What the tests of checkpoints share: states, a run directory, a forger."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from fnrl import manifest
from fnrl.checkpoint import Checkpoints
from fnrl.component import Linear
from fnrl.errors import CheckpointError
from fnrl.record import host, is_record, record, static
from fnrl.types import Moments, Params

laws = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@record
class Pair:
    leaf: Any  # a name that the structure's own JSON uses too
    record: Any
    label: Any = static(default=())
    count: Any = host(default=0)


@record
class Single:
    inside: Any


def a_state(seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    params = Params.of({"policy.w": torch.randn(3, 2, generator=rng), "value.w": torch.randn(4, generator=rng)})
    return Pair({"params": params, "flags": torch.tensor([True, False])}, (Moments.zeros((2,)), ()), 0.5, seed)


def facts(x: Any) -> Any:
    """All of a tree, with the types of host values (1 == 1.0 == True, and 0.0 == -0.0 would pass otherwise)."""
    if isinstance(x, torch.Tensor):
        return "tensor", x.dtype, tuple(x.shape), x.detach().resolve_neg().contiguous().reshape(-1).tolist().__repr__()
    if isinstance(x, np.ndarray | np.generic):
        return "array", np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()
    if is_record(x):
        return type(x), [(f.name, facts(getattr(x, f.name))) for f in dataclasses.fields(type(x))]
    if isinstance(x, dict):
        return dict, [(type(k), k, facts(v)) for k, v in x.items()]
    return (type(x), [facts(v) for v in x]) if isinstance(x, tuple | list) else (type(x), repr(x))


def write_run(directory: Path) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    with Checkpoints(directory) as runs:
        for n in (1, 2):
            runs.save(a_state(n), step=n, config=Linear(0.0, 1.0), metrics={"return": 1.5})
    return directory


def refused(action: Callable[[], Any]) -> CheckpointError | None:
    """The CheckpointError of an action, if it raises one; any other error is the test's failure."""
    try:
        action()
    except CheckpointError as error:
        return error
    return None


def step(directory: Path, n: int) -> Path:
    return directory / f"step-{n:012d}"


def forge(path: Path, state: bytes | None = None, **changes: Any) -> None:
    """Rewrites a checkpoint with right hashes, as someone who means harm would."""
    said = manifest.unseal((path / "manifest.json").read_bytes())
    del said["sha256"]
    if state is not None:
        (path / "state.safetensors").write_bytes(state)
        said["files"]["state.safetensors"] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (path / "manifest.json").write_bytes(manifest.seal(said | changes))


def nodes(x: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every place in JSON."""
    pairs = list(x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ())
    return [(x, k) for k, _ in pairs] + [place for _, v in pairs for place in nodes(v)]
