"""The directory of a run, or its absence: checkpoints, lines of metrics, configuration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnrl.checkpoint import Checkpoints
from fnrl.errors import CheckpointError
from fnrl.logs import Logs
from fnrl.types import Choice


class RunDirectory:
    """What a learner leaves on disk. Without a directory there is nothing to tell, and saving is refused.

    Errors: CheckpointError when another learner has the directory.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, keep: int) -> None:
        self._store = None if directory is None else Checkpoints(directory, keep)
        self._logs: Logs | None = None

    def __bool__(self) -> bool:
        return self._store is not None

    @property
    def path(self) -> Path | None:
        """The directory, if there is one."""
        return self._store.directory if self._store else None

    def store(self, what: str) -> Checkpoints:
        """Its checkpoints, for what needs them. Errors: ValueError where there is no directory."""
        if self._store is None:
            raise ValueError(f"{what}: this learner was made without log_dir")
        return self._store

    def refuse_a_run(self) -> None:
        """Refuses a directory that holds a run (CheckpointError)."""
        if self._store and self._store.paths():
            raise CheckpointError(
                f"{self._store.directory} already holds a run (newest: {self._store.paths()[-1].name}): go on with "
                "it (fnrl resume, or Learner.resume), or give this run a directory of its own"
            )

    def begin(self, since: int | None, config: dict[str, Any]) -> None:
        """Opens the logs; of a run that goes on, lines later than version `since` are dropped."""
        if self._store:
            self._logs = Logs(self._store.directory, since)
            self._logs.config(config)

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics."""
        if self._logs:
            self._logs.write(line)

    def choices(self, version: int, choices: Sequence[Choice]) -> None:
        """What was chosen in the update that led to a version."""
        if self._logs:
            self._logs.choices(version, choices)

    def amend(self, facts: dict[str, Any]) -> None:
        """Facts that the configuration says from now on."""
        if self._logs:
            self._logs.amend(facts)

    def close(self) -> None:
        """Closes the logs, and gives the directory back."""
        try:
            if self._logs:
                self._logs.close()
        finally:
            if self._store:
                self._store.close()
