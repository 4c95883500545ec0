"""Replicas in this process, one after another: a replica's state is the node's own."""

import contextlib
import dataclasses
from typing import Any

from torch import Tensor

from fnrl.lift import Run


@dataclasses.dataclass(frozen=True)
class Inline:
    """The executor of one process."""

    def opening(self, run: Run, node: Any) -> contextlib.AbstractContextManager[None]:
        """Nothing to wait for."""
        return contextlib.nullcontext()

    def init(self, run: Run, node: Any, key: Tensor) -> Any:
        """The node's own fresh state."""
        return node.init(run, key)

    def submit(self, run: Run, node: Any, state: Any, weights: Any) -> Any:
        """Steps at once."""
        return node.step(run, state, weights)

    def result(self, pending: Any) -> tuple[Any, Any, Any]:
        """What `submit` computed."""
        return pending

    def gather(self, run: Run, node: Any, state: Any) -> Any:
        """The node's own."""
        return node.gather(run, state)

    def restore(self, run: Run, node: Any, pure: Any) -> Any:
        """The node's own."""
        return node.restore(run, pure)

    def close(self, run: Run, node: Any, state: Any) -> None:
        """The node's own."""
        node.close(run, state)
