"""The few functions a topology asks of an executor."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fnrl.lift import Run


@runtime_checkable
class Executor(Protocol):
    """Holds the replicas of a node; `node` has `init`, `step`, `gather` and `restore`."""

    def opening(self, run: Run, node: Any) -> AbstractContextManager[None]:
        """Around the `init` or `restore` of a whole scheme: refuses at the beginning what there is no room for, and has
        every replica ready at the end.
        """
        ...

    def init(self, run: Run, node: Any, key: Tensor) -> Any:
        """The state of a fresh replica: pure, or a token for one that lives elsewhere."""
        ...

    def submit(self, run: Run, node: Any, state: Any, weights: Any) -> Any:
        """Starts one step of a replica and returns what `result` takes."""
        ...

    def result(self, pending: Any) -> tuple[Any, Any, Any]:
        """Waits for a step: `(state, product, info)`. Errors of the replica are raised here."""
        ...

    def gather(self, run: Run, node: Any, state: Any) -> Any:
        """A replica's state as pure records: the same on every executor."""
        ...

    def restore(self, run: Run, node: Any, pure: Any) -> Any:
        """A replica that continues from pure records."""
        ...

    def close(self, run: Run, node: Any, state: Any) -> None:
        """Releases a replica."""
        ...
