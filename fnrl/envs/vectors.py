"""n simulators stepped together, in this process or in one process each; faults are raised as `SimulatorError`."""

import contextlib
import functools
import math
import time
from collections.abc import Iterable, Sequence
from multiprocessing import TimeoutError as WorkerTimeout
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor

from fnrl.envs.simulator import Array, Fault, Make, Simulator
from fnrl.spaces import EnvSpec, Space

_GRACE = 1.0  # seconds that workers get to close after one of them hung or died


class SimulatorError(Exception):
    """Faults by environment index."""

    def __init__(self, faults: dict[int, Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


@functools.lru_cache(maxsize=64)
def _ones(size: int, dtype: Any) -> Array:
    return np.ones(size, dtype)


def non_finite(x: Array) -> list[int]:
    """The rows of `[n, ...]` with a NaN or an infinity."""
    if x.dtype.kind != "f":
        return []
    total = sum(x.tolist()) if x.ndim == 1 else x.ravel().dot(_ones(x.size, x.dtype))
    if math.isfinite(total):  # several times as fast as isfinite(x).all()
        return []
    return np.unique(np.nonzero(~np.isfinite(x))[0]).tolist()


def first_non_finite(x: Array) -> int | None:
    """The first of them, if there is one."""
    rows = non_finite(x)
    return rows[0] if rows else None


class Slot(NamedTuple):
    """Room for the obs, reward, terminated and truncated of a step: tensors `[N, ...]` (`[S, N, ...]` with lanes), and
    arrays `[n, ...]` that share their memory. The flags are False.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    arrays: tuple[Array, Array, Array, Array]


class Slots:
    """Makes slots many at a time, since making four tensors takes longer than filling them.

    Observations begin at multiples of 64 bytes, as torch's own tensors do: the last bit of a product may depend on it.
    """

    def __init__(self, lead: tuple[int, ...], space: Space) -> None:
        self.lead, self.shape, self.dtype, self.left = lead, (*lead, *space.shape), space.stored, list[Slot]()

    def take(self) -> Slot:
        """A fresh one."""
        if not self.left:
            self.left = self._make()
        return self.left.pop()

    def _make(self) -> list[Slot]:
        size = math.prod(self.shape)
        stride = math.ceil(size * self.dtype.itemsize / 64) * 64 // self.dtype.itemsize
        k = max(1, min(64, 2**20 // (stride * self.dtype.itemsize)))
        strides = torch.empty(self.shape, device="meta").stride()
        tensors = [
            torch.empty(k * stride, dtype=self.dtype).as_strided((k, *self.shape), (stride, *strides)),
            torch.empty(k, *self.lead),
            torch.zeros(k, *self.lead, dtype=torch.bool),
            torch.zeros(k, *self.lead, dtype=torch.bool),
        ]
        n, axes = math.prod(self.lead), 1 + len(self.lead)
        rows = zip(*(x.unbind(0) for x in tensors), strict=True)
        arrays = zip(*(x.numpy().reshape(k, n, *x.shape[axes:]) for x in tensors), strict=True)
        return [Slot(*pair) for pair in zip(rows, arrays, strict=True)]


class InProcess:
    """n simulators stepped one after another, as gymnasium's SyncVectorEnv does, but into a slot."""

    def __init__(self, make: Make, spec: EnvSpec, n: int) -> None:
        self.simulators = [Simulator(make, spec) for _ in range(n)]

    def reset(self, seeds: Sequence[int | None], obs: Array) -> None:
        """Resets those that have a seed; writes first observations into `obs` `[n, ...]`. Errors: SimulatorError."""
        for i, seed in enumerate(seeds):
            if seed is not None:
                obs[i], info = self.simulators[i].reset(seed=seed)
                if info:
                    raise SimulatorError({i: info["fault"]})

    def step(self, actions: Iterable[Any], out: Slot) -> list[int]:
        """Steps all into `out`, gives those that ended; None instead of an action holds. Errors: SimulatorError."""
        obs, rewards, terminated, truncated = out.arrays
        ended = []
        for i, (simulator, action) in enumerate(zip(self.simulators, actions, strict=True)):
            obs[i], rewards[i], end, cut, info = simulator.step(action)
            if info:
                raise SimulatorError({i: info["fault"]})
            if end or cut:
                terminated[i], truncated[i] = end, cut
                ended.append(i)
        return ended

    def close(self) -> None:
        """Closes every simulator."""
        for simulator in self.simulators:
            simulator.close()


class Subprocesses:
    """n simulators in a process each: gymnasium's AsyncVectorEnv, guarded.

    A worker that died, or took more than `deadline` seconds for a call, is a fault; closing waits for neither.
    """

    def __init__(self, make: Make, spec: EnvSpec, n: int, deadline: float) -> None:
        self.deadline = self.grace = deadline
        one = functools.partial(Simulator, make, spec, portable=True)
        self.vector = AsyncVectorEnv([one] * n, copy=False, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, seeds: Sequence[int | None], obs: Array) -> None:
        """As in one process."""
        mask = np.array([seed is not None for seed in seeds])
        with self._watched():
            self.vector.reset_async(seed=list(seeds), options={"reset_mask": mask})
            found, info = self.vector.reset_wait(timeout=self.deadline)
        self._refuse(info)
        obs[mask] = found[mask]

    def step(self, actions: Iterable[Any], out: Slot) -> list[int]:
        """As in one process."""
        with self._watched():
            self.vector.step_async(actions)
            obs, rewards, ends, cuts, info = self.vector.step_wait(timeout=self.deadline)
        self._refuse(info)
        for array, x in zip(out.arrays, (obs, rewards, ends, cuts), strict=True):
            array[...] = x
        return np.flatnonzero(ends | cuts).tolist()

    def _refuse(self, info: dict[str, Any]) -> None:
        if info:
            raise SimulatorError({i: f for i, f in enumerate(info["fault"]) if f is not None})

    @contextlib.contextmanager
    def _watched(self) -> Any:
        try:
            yield
        except (EOFError, OSError, WorkerTimeout) as e:
            self.grace = _GRACE
            raise SimulatorError(
                self._lost(e) or {0: Fault(f"the pipe to its process broke: {e!r}", e, lost=True)}
            ) from e

    def _lost(self, error: Exception) -> dict[int, Fault]:
        workers = self.vector.processes
        if isinstance(error, WorkerTimeout):
            late = [i for i, pipe in enumerate(self.vector.parent_pipes) if not pipe.poll(0)]
            return {i: Fault(f"its process gave no answer within {self.deadline:g} s", error, True) for i in late}
        gone = connection.wait([w.sentinel for w in workers], timeout=_GRACE)
        dead = {i: w for i, w in enumerate(workers) if w.sentinel in gone}
        for worker in dead.values():
            worker.join(_GRACE)  # its pipes close a moment before it can be waited for
        return {i: Fault(f"its process died (exit code {w.exitcode})", error, True) for i, w in dead.items()}

    def close(self) -> None:
        """Asks every worker to close, and kills those that don't within the deadline (1 s once one hung or died)."""
        vector = self.vector
        if vector.closed:
            return
        vector.closed = True  # gymnasium's own close and __del__ would wait for a dead worker without end
        pipes = [p for p in vector.parent_pipes if p is not None]
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        end = time.monotonic() + self.grace
        for worker in vector.processes:
            worker.join(max(0.0, end - time.monotonic()))
        for worker in vector.processes:
            worker.kill()
            worker.join()
            worker.close()
        for pipe in pipes:
            pipe.close()
        vector.error_queue.cancel_join_thread()
        vector.error_queue.close()
