"""Single-use references to what can't be copied cheaply: a hosted simulator, a donated ring, a Ray cell.

A state holds a `Token` in a `host()` field. Stepping takes the token (`owner.take(token)`), which fails if the owner
has moved on, and puts a new one into the next state. So a stale state can't be stepped by accident, and nothing else
about it is different.
"""

import dataclasses
from typing import Any

from fnrl.errors import StaleStateError


class Owner:
    """Base of what a token refers to: counts its generations."""

    generation: int = 0
    closed: bool = False

    def token(self) -> "Token":
        """The reference to the owner's present state."""
        return Token(self, self.generation)

    def advance(self) -> "Token":
        """Makes every earlier token stale and returns the new one."""
        self.generation += 1
        return self.token()

    def close(self) -> None:
        """Releases what is owned; safe to call twice."""
        self.closed = True


@dataclasses.dataclass(frozen=True, eq=False)
class Token:
    """A reference to `owner` as it was at `generation`."""

    owner: Owner
    generation: int

    def take(self) -> Any:
        """The owner, if it is still at this generation.

        Errors: StaleStateError when a later state exists, or the owner is closed.
        """
        name = type(self.owner).__name__
        if self.owner.closed:
            raise StaleStateError(f"the {name} behind this state is closed; restore the state from a gathered copy")
        if self.owner.generation != self.generation:
            raise StaleStateError(
                f"this state is stale: it refers to generation {self.generation} of its {name}, which is at "
                f"{self.owner.generation}. Step the newest state, or take fork(state) before stepping"
            )
        return self.owner

    def __repr__(self) -> str:
        return f"Token({type(self.owner).__name__}, generation={self.generation})"

    def __reduce__(self) -> Any:
        raise TypeError("a token can't leave its process: gather the state first")
