"""The clock of both sides of a throughput benchmark: time inside the simulator's own step and reset; peak memory."""

import resource
import time
from typing import Any

import gymnasium

INSIDE = [0.0]


class Timed(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Adds the time of every step and reset to `INSIDE`."""

    def step(self, action: Any) -> Any:
        """The simulator's step."""
        begin = time.perf_counter()
        out = self.env.step(action)
        INSIDE[0] += time.perf_counter() - begin
        return out

    def reset(self, **kwargs: Any) -> Any:
        """The simulator's reset."""
        begin = time.perf_counter()
        out = self.env.reset(**kwargs)
        INSIDE[0] += time.perf_counter() - begin
        return out


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
