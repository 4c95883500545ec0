"""An executor of one process in which the order of arrivals and the lengths of rollouts are drawn."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from fnrl.executor import Inline
from fnrl.lift import Run


@dataclasses.dataclass(frozen=True)
class Shuffled(Inline):
    """Draws what a cluster leaves to chance, by `seed`: the same choices again for the same seed, resumed or not."""

    seed: int = 0

    def arrival(self, run: Run, calls: Sequence[Any], taken: int) -> int:
        """Any of the calls in flight."""
        return self._draw("arrival", run, taken).randrange(len(calls))

    def stopped(self, run: Run, rollout: int, steps: int) -> bool:
        """Half of the rollouts are not stopped, the others at any step alike."""
        drawn = self._draw("length", run, rollout)
        return drawn.random() < 0.5 and steps >= drawn.randint(1, run.parts.storage.steps)

    def _draw(self, kind: str, run: Run, count: int) -> random.Random:
        return random.Random(f"{self.seed} {kind} {run.name} {count}")
