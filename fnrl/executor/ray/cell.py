"""The one actor class: a process that holds one node's state and moves it when asked."""

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fnrl import tree
from fnrl.executor.ray.orders import ORDERS
from fnrl.executor.ray.resources import cells
from fnrl.executor.ray.wire import Packed, size_of, unpacked
from fnrl.types import Choice


class Cell:
    """A node, its state, and the run it stands in. Arrays come and go as numpy."""

    def __init__(self) -> None:
        self.run: Any = None
        self.node: Any = None
        self.state: Any = None
        self.worked, self.calls = 0.0, 0  # since the last snapshot
        self.told: list[Warning] = []  # since the last step: nobody reads what a cell prints

    def hello(self) -> int:
        """The process, once there is one."""
        return os.getpid()

    def begin(self, paths: Sequence[str], threads: int, shipped: bytes, how: str, what: Any) -> None:
        """A fresh state from a key (`how` is init), or one that continues from pure records (restore).

        `paths` are where the driver finds its modules: on one machine a cell finds them there, too.
        """
        sys.path.extend(p for p in paths if p not in sys.path and os.path.isdir(p))
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # weights are shared
        show = warnings.showwarning

        def tell(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if category.__module__.partition(".")[0] == "fnrl":
                self.told.append(message)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = tell
        run, self.node = unpacked(shipped)
        self.run = dataclasses.replace(run, copy=True)  # whatever the driver's own records share
        mine = dataclasses.replace(run, copy=False)  # a state may be made in the memory of a record that is used once
        with self.run.executor.opening(self.run, self.node):
            self.state = getattr(self.node, how)(mine, tree.to_torch(what, self.run.device))

    def step(
        self, weights: Any, number: int, passed_on: Sequence[Packed], again: Sequence[Choice] | None = None
    ) -> Any:
        """One step, and what fnrl warned of; the state moves only if it succeeds. Weights that are `passed_on` to cells
        below stay the one copy they are.
        """
        begin = time.perf_counter()
        ORDERS.begin(number, again)
        given = tree.to_torch(unpacked(weights), self.run.device, share=True)
        for made in passed_on:
            self.run.executor.adopt(given, made)
        self.state, product, info = self.node.step(self.run, self.state, given)
        self.worked, self.calls = self.worked + time.perf_counter() - begin, self.calls + 1
        told, self.told = tuple(self.told), []
        return *tree.to_numpy((product, info)), told

    def again(self, weights: Any, number: int, passed_on: Sequence[Packed], choices: Sequence[Choice]) -> None:
        """A step whose product is known already, and what was chosen in it."""
        self.step(weights, number, passed_on, choices)

    def stop(self, number: int) -> None:
        """Asks the step of this number to end early, and the cells below; runs beside it."""
        ORDERS.stop = number
        if ORDERS.stopped and any(cells(self.node)):
            self.run.executor.stop_all()

    def gather(self, copy: bool = True) -> Any:
        """The state as pure records; without a copy they share the memory of rings, until the next step."""
        return tree.to_numpy(self.node.gather(dataclasses.replace(self.run, copy=copy), self.state))

    def gathered(self) -> tuple[Any, dict[str, float]]:
        """The state as pure records, and the faults of cells below that were met in asking for it."""
        return self.gather(), self.run.executor.untold()

    def snapshot(self) -> tuple[Any, float, float]:
        """The state as pure records; what it cost, in seconds; and what a call has cost since the last one."""
        begin = time.perf_counter()
        pure = self.gather(copy=False)  # it is pickled before the next step
        each, self.worked, self.calls = self.worked / max(self.calls, 1), 0.0, 0
        return pure, time.perf_counter() - begin + size_of(pure) / 1e9, each  # it travels at about 1 GB a second

    def finish(self) -> None:
        """Closes simulators and cells below."""
        if self.state is not None:
            self.node.close(self.run, self.state)
