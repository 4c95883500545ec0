"""What a learner is told besides its scheme, as values: how far to go, and when to evaluate and to save."""

import bisect
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fnrl import random
from fnrl.apply import at
from fnrl.component import PerLane, Schedule, component, option, printed, setting
from fnrl.config import rebuild
from fnrl.envs import Environment
from fnrl.record import plain

_HINT = "pass it again, as Learner.resume(..., evaluation=Evaluate(env=...))"


@component
class Evaluate:
    """When and how a learner evaluates: the deterministic policy, in environments of its own."""

    every: int = setting(default=50_000, help="environment steps between evaluations")
    episodes: int = setting(default=10, help="whole episodes of one evaluation")
    env: Environment | None = option(
        default=None, help="another vector of the same spaces, if not one like the training's"
    )


@plain
@dataclasses.dataclass(frozen=True)
class Settings:
    """What a learner was told, besides the scheme; `every` is 0 without evaluation."""

    seed: int
    target_steps: int
    save_every: int
    keep: int
    every: int
    episodes: int
    env: Any = None  # what it is evaluated in, as printed; None for one like the training's
    seeds: tuple[int, ...] = ()  # of the lanes, if there are any; then `seed` says nothing

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("target_steps", 1), ("save_every", 1), ("keep", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"Learner({name}={value!r}): expected an int of at least {low}")

    def keys(self, which: tuple[int, ...] = ()) -> Tensor:
        """The key of the run `[2]`, or those of its lanes `[S, 2]`, or of the lanes of some numbers."""
        if not self.seeds:
            return random.key(self.seed)
        return torch.stack([random.key(self.seeds[i]) for i in which or range(len(self.seeds))])

    def evaluation(self) -> Evaluate:
        """The evaluation that was asked for. Errors: CheckpointError when its environment is not fnrl's own."""
        return Evaluate(self.every, self.episodes, None if self.env is None else rebuild(self.env, _HINT))


def of_evaluation(evaluation: Evaluate | None) -> dict[str, Any]:
    """The settings that keep an evaluation."""
    if evaluation is None:
        return {"every": 0, "episodes": 0, "env": None}
    if not isinstance(evaluation, Evaluate):
        raise TypeError(f"evaluation={evaluation!r}: expected Evaluate(...) or None")
    env = None if evaluation.env is None else printed(evaluation.env)
    return {"every": evaluation.every, "episodes": evaluation.episodes, "env": env}


def idle_rates(hypers: Mapping[str, float | Schedule], pinned: Collection[str], target: int) -> Iterator[str]:
    """A line for each learning rate that falls to 0 before the target: the rest of the run would learn nothing."""
    for name, value in hypers.items():
        rate = name == "lr" or name.endswith("_lr")
        moves = isinstance(value, Schedule) and not isinstance(value, PerLane)
        if rate and moves and name not in pinned and at(value, target - 1) == 0.0:
            begin = bisect.bisect_left(range(target), True, key=lambda s, v=value: at(v, s) == 0.0)
            yield (
                f"{name} is 0 from {begin:,} environment steps on and this run goes to {target:,}: the rest learns "
                f"nothing. Lay the schedule over the whole run, or set a value: update_algo_parameter({name!r}, ...), "
                f"fnrl resume --set {name}=..."
            )
