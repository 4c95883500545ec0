"""The few functions a topology asks of an executor."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fnrl.lift import Run
from fnrl.types import Info


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
        """Starts one step of a replica and returns the call: a record, which may stand in a state. A `Landed` is taken
        for a call by all functions below: it is what a gathered state holds of one.
        """
        ...

    def result(self, call: Any) -> tuple[Any, Any, Info]:
        """Waits for a call: `(state, product, info)`. Errors of the replica are raised here."""
        ...

    def arrival(self, run: Run, calls: Sequence[Any], taken: int) -> int:
        """Which of the calls in flight (oldest first) the node at `run` takes next, after `taken` that it took before:
        waits until there is one.
        """
        ...

    def preempt(self, calls: Sequence[Any], enough: int) -> None:
        """Waits until `enough` of the calls have ended, and asks the others to end early."""
        ...

    def stopped(self, run: Run, rollout: int, steps: int) -> bool:
        """Asked where a rollout is made (the number `rollout` of the collector at `run`), after `steps` of its steps:
        whether it is to end here.
        """
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

    def untold(self) -> dict[str, float]:
        """The faults of replicas, by kind, that no step has told: those that a `gather` has met."""
        ...
