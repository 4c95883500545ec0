"""One process that chooses as another run did: which call arrived first, and after how many steps a rollout ended."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fnrl.errors import ExecutorError
from fnrl.executor.inline import Inline
from fnrl.lift import Run
from fnrl.record import host, record
from fnrl.types import Choice, Info, Tree

FILE = "arrivals.jsonl"  # in a run directory, a line an update: {"updates": 3, "choices": [["arrival", "root", 2, 0]]}


class _Ended(ExecutorError):
    """The record says nothing of a choice."""


@record
class Beyond:
    """A call that reaches beyond the end of the record: whoever asks for its result is told."""

    state: Tree
    error: Exception = host()


@dataclasses.dataclass(frozen=True)
class Recorded(Inline):
    """The executor of one process that repeats the choices of a run, and so its bits: what arrived when on a cluster.

    `choices` is a run directory (its `arrivals.jsonl`), or choices as `info.choices` tells them.
    Errors: ExecutorError where the record ends, or is another topology's.
    """

    choices: Any

    def __post_init__(self) -> None:
        if isinstance(self.choices, str | Path):
            path = Path(self.choices)
            found = read(path / FILE if path.is_dir() else path)
        else:
            found = self.choices
        object.__setattr__(self, "_known", {(c.kind, c.node, c.count): c.value for c in found})

    def __repr__(self) -> str:
        return f"Recorded({self.choices!r})" if isinstance(self.choices, str | Path) else "Recorded(...)"

    def submit(self, run: Run, node: Any, state: Any, weights: Any) -> Any:
        """Steps at once; what the record does not reach is an error only for who needs it."""
        try:
            return super().submit(run, node, state, weights)
        except _Ended as error:
            return Beyond(state, error)

    def result(self, call: Any) -> tuple[Any, Any, Info]:
        """What `submit` computed. Errors: ExecutorError."""
        if isinstance(call, Beyond):
            raise call.error
        return super().result(call)

    def arrival(self, run: Run, calls: Sequence[Any], taken: int) -> int:
        """The one that arrived then. Errors: ExecutorError."""
        at = self._of("arrival", run, taken)
        if at >= len(calls):
            raise ExecutorError(
                f"the record of node {run.name} has number {at} of the calls in flight arrive, there are {len(calls)}: "
                "it is another topology's"
            )
        return at

    def stopped(self, run: Run, rollout: int, steps: int) -> bool:
        """Whether that rollout ended here. Errors: ExecutorError."""
        return self._of("length", run, rollout) == steps

    def _of(self, kind: str, run: Run, count: int) -> int:
        known: dict[tuple[str, str, int], int] = self.__dict__["_known"]
        if (kind, run.name, count) not in known:
            raise _Ended(
                f"the record does not say which {kind} was number {count} at node {run.name}: it ends before, or is "
                "another topology's"
            )
        return known[kind, run.name, count]


def line(version: int, choices: Iterable[Choice]) -> dict[str, Any]:
    """The choices of an update as a line of the file."""
    return {"updates": version, "choices": [[c.kind, c.node, c.count, c.value] for c in choices]}


def read(path: Path) -> list[Choice]:
    """The choices in a file; a last line that was cut short is left out.

    Errors: ExecutorError when there is none, or it can't be read.
    """
    try:
        lines = [json.loads(text) for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]
        return [Choice(*choice) for said in lines for choice in said["choices"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExecutorError(
            f"{path} can't be read as the record of a run ({error}): a Learner with log_dir writes one where something "
            "is not synchronous"
        ) from error
