"""Parts: the components of an agent, checked against each other before anything starts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from fnrl.component import Schedule, check_hyper, component, hypers, option, setting
from fnrl.envs.base import Environment
from fnrl.errors import CompositionError
from fnrl.spaces import Box


@component
class NormaliseObs:
    """Observations minus their running mean, over their running deviation, clipped to `+-clip`; updated once a plan."""

    clip: float = setting(default=10.0, low=0.0, help="limit of normalised observations")


@component
class ScaleReward:
    """Rewards over the running deviation of the discounted return, clipped to `+-clip` (arXiv 2005.12729)."""

    clip: float = setting(default=10.0, low=0.0, help="limit of scaled rewards")


@component
class Parts:
    """Environment, actor, algorithm and storage; swap one and touch nothing else.

    Errors: CompositionError naming the two parts that don't fit, and what would.
    """

    env: Environment = option(help="the vector of environments of one collector")
    actor: Any = option(help="what acts")
    algo: Any = option(help="what learns")
    storage: Any = option(help="what remembers")
    normalise_obs: NormaliseObs | None = option(default=None, help="running normalisation of observations")
    scale_reward: ScaleReward | None = option(default=None, help="running scaling of rewards")

    def __post_init__(self) -> None:
        family = {n: getattr(getattr(self, n), "family", None) for n in ("actor", "algo", "storage")}
        for name, kind in family.items():
            part = getattr(self, name)
            if isinstance(part, type):
                raise CompositionError(
                    f"{name}={part!r} is not a component with a `family`: pass a value such as PPO(), not a class"
                )
            if kind not in ("on-policy", "off-policy"):
                raise CompositionError(
                    f"{name}={part!r} has family={kind!r}: expected a component of the family 'on-policy' or "
                    f"'off-policy' (family: ClassVar[str] = ... in {type(part).__name__})"
                )
        for other in ("actor", "storage"):
            if family[other] != family["algo"]:
                algo, part = type(self.algo).__name__, type(getattr(self, other)).__name__
                raise CompositionError(
                    f"{algo} is an {family['algo']} algorithm and {part} is an {family[other]} {other}: "
                    f"{algo} needs an {family['algo']} {other}"
                )
        made, given = self.actor.spec, self.env.spec
        if (made.obs, made.action) != (given.obs, given.action):
            raise CompositionError(
                f"the actor was made for {made}, the environment is {given}: pass env.spec to the actor"
            )
        if self.scale_reward and family["algo"] == "off-policy":
            raise CompositionError(
                f"scale_reward changes with time, and {type(self.storage).__name__} would hold rewards of many scales: "
                "leave it out with off-policy parts"
            )
        self.algo.check_actions(given)
        self.algo.check(self.actor)
        obs = self.env.spec.obs
        if self.normalise_obs and not (isinstance(obs, Box) and obs.dtype != "uint8"):
            raise CompositionError(f"normalise_obs needs a float Box observation, got {obs}")
        missing = {"lr", "gamma"} - {f.name for f in dataclasses.fields(self.algo)}
        if missing:
            raise CompositionError(
                f"{type(self.algo).__name__} has no hyper-parameter {' and no '.join(sorted(missing))}: declare it by "
                "hyper(default=..., help=...)"
            )
        try:
            hypers(self.algo, self.storage, self.actor)
        except ValueError as e:
            raise CompositionError(str(e)) from e

    def hypers(self) -> Mapping[str, float | Schedule]:
        """Every numeric hyper-parameter of the parts, by name."""
        return self._hypers

    @functools.cached_property
    def _hypers(self) -> dict[str, float | Schedule]:  # asked for at every update
        return hypers(self.algo, self.storage, self.actor)

    @functools.cached_property
    def moving(self) -> tuple[str, ...]:
        """The names of those that are not the same number throughout."""
        return tuple(n for n, x in self._hypers.items() if not isinstance(x, int | float))

    def check_hyper(self, name: str, value: Any) -> None:
        """Refuses an unknown hyper-parameter or a value out of range."""
        check_hyper(name, value, self.algo, self.storage, self.actor)
