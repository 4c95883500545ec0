"""The connection to a cluster: joined, or started for this process alone and ended with its last cell."""

import contextlib
import logging
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fnrl.errors import ExecutorError
from fnrl.executor.ray.wire import Packed, packed

_OURS: set[str] = set()  # names of the sessions started here
_SESSIONS: weakref.WeakValueDictionary[str, "Session"] = weakref.WeakValueDictionary()


class Session:
    """A connection, for as long as cells live on it: its cells, and the weights that they were sent last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()
        self.store = int(min(node.get("object_store_memory", 0.0) for node in self.nodes()))
        self._published: list[tuple[Any, Packed]] = []

    @staticmethod
    def nodes() -> list[dict[str, float]]:
        """What each living node of the cluster was started with."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    @property
    def alive(self) -> bool:
        """Whether this process is still connected to it."""
        import ray

        return ray.is_initialized() and ray.get_runtime_context().get_session_name() == self.name

    def publish(self, weights: Any) -> Packed:
        """These weights, packed: once a version, however many cells take them."""
        for known, made in self._published:
            if known is weights:
                return made
        made = packed(weights)
        self.adopt(weights, made)
        return made

    def adopt(self, weights: Any, made: Packed) -> None:
        """These weights are packed already: those of a cell above, which go on to the cells below as they came."""
        self._published = [*self._published[-1:], (weights, made)]

    def release(self, owner: Any = None) -> None:
        """Forgets a cell that is closed; the last one ends a cluster that was started here."""
        import ray

        if owner is not None:
            self.owners.discard(owner)
        if not self.owners:
            self._published = []
            if self.name in _OURS and self.alive:
                ray.shutdown()


def connect(address: str | None, store: int | None) -> Session:
    """The session of this process; one begins if there is none: a cluster of this machine's, or the one at `address`.

    Errors: ExecutorError when it can't be joined: none there, other versions of Ray or Python, no or a wrong token.
    """
    import ray
    from ray.exceptions import RayError

    if not ray.is_initialized():
        named = address or os.environ.get("RAY_ADDRESS")
        threads = str(torch.get_num_threads())
        options: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        }
        try:
            if named:
                _knock(named)
                ray.init(address=named, **options)
            else:
                with _loopback():
                    ray.init(address="local", include_dashboard=False, object_store_memory=store, **options)
                _OURS.add(ray.get_runtime_context().get_session_name())
        except (RayError, RuntimeError, ConnectionError, ValueError, OSError) as error:
            where = f"the Ray cluster at {named}" if named else "a Ray cluster on this machine"
            what = "can't be joined" if named else "did not start"
            hint = ". Is it running, and is its token in RAY_AUTH_TOKEN or ~/.ray/auth_token?" if named else ""
            raise ExecutorError(f"{where} {what}: {error}{hint}") from error
        _hide_token()
    context = ray.get_runtime_context()
    if address not in (None, "auto", "local", context.gcs_address) and not str(address).startswith("ray://"):
        raise ExecutorError(
            f"this process is connected to the Ray cluster at {context.gcs_address}, not to the one at {address}: "
            f"call ray.shutdown() first, or leave the address out"
        )
    name = context.get_session_name()
    session = _SESSIONS.get(name)
    if session is None:
        session = _SESSIONS[name] = Session(name)
    return session


def joined() -> list[Session]:
    """The session of this process, if there is one."""
    return [s for s in _SESSIONS.values() if s.alive]


def _knock(address: str) -> None:
    """Whether anybody listens at `host:port`: Ray asks for a minute and more. Errors: OSError, ValueError."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Ray listens on every interface of a Linux machine; asked as on other systems, on the loopback only."""
    from ray._private import ray_constants

    variable, constant = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(variable)
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _hide_token() -> None:
    """The token that admits to a cluster is for this user alone: Ray leaves it readable for all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
