"""What the cell that this process is was told besides its weights: to end a call early, or how to choose."""

import dataclasses
from collections.abc import Iterable

from fnrl.types import Choice


@dataclasses.dataclass
class Orders:
    """Of the present call: its number, and, if it is made again, what was chosen the first time."""

    call: int = 0
    stop: int = 0  # the call that is to end early
    chosen: dict[tuple[str, str, int], int] | None = None

    def begin(self, call: int, again: Iterable[Choice] | None = None) -> None:
        """A call begins; one made `again` chooses as before."""
        self.call = call
        self.chosen = None if again is None else {(c.kind, c.node, c.count): c.value for c in again}

    @property
    def stopped(self) -> bool:
        """Whether the present call is to end early."""
        return self.call == self.stop != 0


ORDERS = Orders()
