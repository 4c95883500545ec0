"""Replicas in this process, one after another: a replica's state is the node's own."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fnrl.lift import Run
from fnrl.types import Info, Landed


@dataclasses.dataclass(frozen=True)
class Inline:
    """The executor of one process."""

    def opening(self, run: Run, node: Any) -> contextlib.AbstractContextManager[None]:
        """Nothing to wait for."""
        return contextlib.nullcontext()

    def init(self, run: Run, node: Any, key: Tensor) -> Any:
        """The node's own fresh state."""
        return node.init(run, key)

    def submit(self, run: Run, node: Any, state: Any, weights: Any) -> Landed:
        """Steps at once."""
        return Landed(*node.step(run, state, weights))

    def result(self, call: Landed) -> tuple[Any, Any, Info]:
        """What `submit` computed."""
        return call.state, call.product, call.info

    def arrival(self, run: Run, calls: Sequence[Landed], taken: int) -> int:
        """The oldest."""
        return 0

    def preempt(self, calls: Sequence[Landed], enough: int) -> None:
        """All have ended."""

    def stopped(self, run: Run, rollout: int, steps: int) -> bool:
        """Nobody waits for it."""
        return False

    def gather(self, run: Run, node: Any, state: Any) -> Any:
        """The node's own."""
        return node.gather(run, state)

    def restore(self, run: Run, node: Any, pure: Any) -> Any:
        """The node's own."""
        return node.restore(run, pure)

    def close(self, run: Run, node: Any, state: Any) -> None:
        """The node's own."""
        node.close(run, state)

    def untold(self) -> dict[str, float]:
        """An error is raised where it is met."""
        return {}
