"""Replicas in Ray cells: one process each, holding one node's state and stepping it when asked.

A cell runs the same node as `Inline` does, with the same key and the driver's thread count, so its products have the
same bits. Numpy travels, never torch tensors (45 times dearer to fetch); weights are put into the object store once a
version.
"""

import dataclasses
import importlib.util
import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from fnrl import tree
from fnrl.errors import CompositionError
from fnrl.lift import Run
from fnrl.record import host, record
from fnrl.token import Owner, Token


@record
class CellState:
    """A replica that lives in a cell."""

    token: Token = host()


class CellOwner(Owner):
    """The driver's end of a cell; closing it, or losing the last state that refers to it, ends the process."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._end = weakref.finalize(self, _kill, handle)

    def close(self) -> None:
        """Ends the cell's process."""
        super().close()
        self._end()


@dataclasses.dataclass(frozen=True)
class Ray:
    """The executor of a Ray cluster: a local one, started when it is first needed, or the one at `address`.

    `num_cpus` is what each cell reserves, `patience` how many seconds it may take to start. Errors: CompositionError
    when ray is not installed, or a cell asks for more than the cluster has.
    """

    address: str | None = None
    num_cpus: float = 1.0
    patience: float = 120.0

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise CompositionError("the Ray executor needs ray: pip install 'fnrl[ray]', or use fnrl.Inline()")
        if not self.num_cpus >= 0:
            raise CompositionError(f"Ray.num_cpus = {self.num_cpus!r}: expected a number of at least 0")

    def init(self, run: Run, node: Any, key: Tensor) -> CellState:
        """A fresh replica in a cell of its own."""
        return self._start(run, node, "init", key.cpu().numpy())

    def submit(self, run: Run, node: Any, state: CellState, weights: Any) -> Any:
        """Asks the cell for one step."""
        owner = state.token.take()
        ref = owner.handle.step.remote(_published(weights))
        return ref, CellState(owner.advance()), run.device

    def result(self, pending: Any) -> tuple[Any, Any, Any]:
        """Waits for the cell; its error is raised here with the type it had there."""
        import ray

        ref, state, device = pending
        product, info = tree.to_torch(ray.get(ref), device)
        return state, product, info

    def gather(self, run: Run, node: Any, state: CellState) -> Any:
        """The state of the node in the cell, as pure records."""
        import ray

        return tree.to_torch(ray.get(state.token.take().handle.gather.remote()), run.device)

    def restore(self, run: Run, node: Any, pure: Any) -> CellState:
        """A new cell that continues from pure records."""
        return self._start(run, node, "restore", tree.to_numpy(pure))

    def close(self, run: Run, node: Any, state: CellState) -> None:
        """Ends the cell."""
        state.token.owner.close()

    def _start(self, run: Run, node: Any, how: str, what: Any) -> CellState:
        import ray
        from ray.exceptions import GetTimeoutError

        connect(self.address)
        have = ray.cluster_resources().get("CPU", 0.0)
        if self.num_cpus > have:
            raise CompositionError(
                f"a cell asks for {self.num_cpus} CPUs, the cluster has {have:g}: lower Ray(num_cpus=...)"
            )
        cell = ray.remote(Cell).options(num_cpus=self.num_cpus)
        handle = cell.remote(run, node, torch.get_num_threads())
        owner = CellOwner(handle)
        try:
            ray.get(getattr(handle, how).remote(what), timeout=self.patience)
        except GetTimeoutError:
            owner.close()
            raise CompositionError(
                f"a cell with num_cpus={self.num_cpus} did not start within {self.patience:g} s; free in the cluster: "
                f"{ray.available_resources().get('CPU', 0.0):g} of {have:g} CPUs. Close states no longer used, or lower"
                " num_cpus"
            ) from None
        return CellState(owner.token())


class Cell:
    """The one actor class: a node, its state, and the run it stands in."""

    def __init__(self, run: Run, node: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        self.run, self.node, self.state = run, node, None

    def init(self, key: Any) -> None:
        """A fresh state."""
        self.state = self.node.init(self.run, torch.from_numpy(key.copy()).to(self.run.device))

    def restore(self, pure: Any) -> None:
        """A state that continues."""
        self.state = self.node.restore(self.run, tree.to_torch(pure, self.run.device))

    def step(self, weights: Any) -> Any:
        """One step; the state moves only if it succeeds."""
        self.state, product, info = self.node.step(self.run, self.state, tree.to_torch(weights, self.run.device))
        return tree.to_numpy((product, info))

    def gather(self) -> Any:
        """The state as pure records of numpy arrays."""
        return tree.to_numpy(self.node.gather(self.run, self.state))


def connect(address: str | None) -> None:
    """Joins the cluster at `address`, or starts a local one for this process; does nothing if there is one already."""
    import ray

    if not ray.is_initialized():
        threads = str(torch.get_num_threads())
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        )


_LAST: list[tuple[Any, Any]] = []


def _published(weights: Any) -> Any:
    """The object-store reference of these weights: one put a version, however many cells take them."""
    import ray

    for known, ref in _LAST:
        if known is weights:
            return ref
    ref = ray.put(tree.to_numpy(weights))
    _LAST.append((weights, ref))
    del _LAST[:-2]
    return ref


def _kill(handle: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.kill(handle)
