"""Exploration as a part of an off-policy actor: what is added to its actions, or put in their place.

An exploration has `memory(actions) -> H` (what it carries from step to step of an episode), `chance(hyper)` of a
random action, and `explore(action, draw, memory, hyper) -> action, memory`, with standard normal draws.
Exploration is over when acting is deterministic.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fnrl.component import Linear, Schedule, component, hyper, setting

Hyper = dict[str, Tensor]


class Exploration(Protocol):
    """What an off-policy actor needs of it."""

    continuous: bool

    def memory(self, actions: int) -> int: ...

    def chance(self, hyper: Hyper) -> Any: ...

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor: ...

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]: ...


@component
class Gaussian:
    """Independent normal noise on every component of an action in [-1, 1]; the sum is clipped."""

    noise_std: float | Schedule = hyper(default=0.1, help="deviation of the noise, where actions span [-1, 1]")

    @property
    def continuous(self) -> bool:
        """For Box actions."""
        return True

    def memory(self, actions: int) -> int:
        """None."""
        return 0

    def chance(self, hyper: Hyper) -> float:
        """No action is wholly random."""
        return 0.0

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """`std n`, for standard normal n."""
        return hyper["noise_std"] * draw

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`clip(a + n, -1, 1)`."""
        return (action + draw).clamp(-1.0, 1.0), memory


@component
class OrnsteinUhlenbeck:
    """Noise that drifts back to zero, as DDPG's authors used: arXiv 1509.02971.

    x = x - theta x dt + std sqrt(dt) n;   a = clip(a + x, -1, 1);   x = 0 where an episode begins
    """

    noise_std: float | Schedule = hyper(default=0.2, help="deviation of the noise, where actions span [-1, 1]")
    theta: float = setting(default=0.15, low=0.0, help="how fast it drifts back")
    dt: float = setting(default=0.01, low=1e-6, help="time between two steps")

    @property
    def continuous(self) -> bool:
        """For Box actions."""
        return True

    def memory(self, actions: int) -> int:
        """x."""
        return actions

    def chance(self, hyper: Hyper) -> float:
        """No action is wholly random."""
        return 0.0

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """`std sqrt(dt) n`, for standard normal n."""
        return hyper["noise_std"] * math.sqrt(self.dt) * draw

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The next x is remembered."""
        x = memory * (1.0 - self.theta * self.dt) + draw
        return (action + x).clamp(-1.0, 1.0), x


@component
class EpsilonGreedy:
    """A random action with probability epsilon: of any kind."""

    epsilon: float | Schedule = hyper(
        default=Linear(1.0, 0.05, steps=10_000), high=1.0, help="probability of a random action"
    )

    @property
    def continuous(self) -> bool:
        """For Discrete actions too."""
        return False

    def memory(self, actions: int) -> int:
        """None."""
        return 0

    def chance(self, hyper: Hyper) -> Tensor:
        """epsilon."""
        return hyper["epsilon"]

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """Not used."""
        return torch.zeros_like(draw)

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The action as it is."""
        return action, memory
