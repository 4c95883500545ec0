"""Exploration as a part of an off-policy actor: what is added to its actions, or put in their place.

It is over when acting is deterministic.
"""

import math
from typing import ClassVar

from torch import Tensor

from fnrl.component import Linear, Schedule, component, hyper, setting

Hyper = dict[str, Tensor]


class Exploration:
    """Base of explorations: for Box actions, without memory, and adding nothing. A subclass is a component."""

    continuous: ClassVar[bool] = True  # whether it needs Box actions

    def memory(self, actions: int) -> int:
        """Numbers carried from step to step of an episode, for so many components of an action."""
        return 0

    def chance(self, hyper: Hyper) -> Tensor | float:
        """Probability of a random action in the place of the actor's."""
        return 0.0

    def placed(self, hyper: Hyper, places: Tensor) -> Hyper:
        """The hyper-parameters of environments that stand at `places [N]`, in [0, 1], among those of all workers."""
        return hyper

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """Standard normals `[..., A]` in the units of `explore`."""
        return draw

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The action `[N, A]` to take in its place, and the memory `[N, H]` to carry on."""
        return action, memory


@component
class Gaussian(Exploration):
    """Independent normal noise on every component of an action in [-1, 1]; the sum is clipped."""

    noise_std: float | Schedule = hyper(default=0.1, help="deviation of the noise, where actions span [-1, 1]")

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """`std n`, for standard normal n."""
        return hyper["noise_std"] * draw

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`clip(a + n, -1, 1)`."""
        return (action + draw).clamp(-1.0, 1.0), memory


@component
class OrnsteinUhlenbeck(Exploration):
    """Noise that drifts back to zero, as DDPG's authors used: arXiv 1509.02971.

    x = x - theta x dt + std sqrt(dt) n;   a = clip(a + x, -1, 1);   x = 0 where an episode begins
    """

    noise_std: float | Schedule = hyper(default=0.2, help="deviation of the noise, where actions span [-1, 1]")
    theta: float = setting(default=0.15, low=0.0, help="how fast it drifts back")
    dt: float = setting(default=0.01, low=1e-6, help="time between two steps")

    def memory(self, actions: int) -> int:
        """x."""
        return actions

    def scale(self, draw: Tensor, hyper: Hyper) -> Tensor:
        """`std sqrt(dt) n`, for standard normal n."""
        return hyper["noise_std"] * math.sqrt(self.dt) * draw

    def explore(self, action: Tensor, draw: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The next x is remembered."""
        x = memory * (1.0 - self.theta * self.dt) + draw
        return (action + x).clamp(-1.0, 1.0), x


@component
class EpsilonGreedy(Exploration):
    """A random action with probability epsilon: of any kind.

    With `spread` (Ape-X, arXiv 1803.00933, takes 7, and epsilon 0.4) each environment has its own, from epsilon down:
    epsilon_i = epsilon^(1 + spread i / (N - 1)), i = 0 ... N - 1 through the environments of all workers.
    """

    continuous: ClassVar[bool] = False

    epsilon: float | Schedule = hyper(
        default=Linear(1.0, 0.05, steps=10_000), high=1.0, help="probability of a random action"
    )

    spread: float = setting(default=0.0, low=0.0, help="how much less the last environment explores; 0 for alike")

    def placed(self, hyper: Hyper, places: Tensor) -> Hyper:
        """`epsilon [N]`, if it is spread."""
        if self.spread == 0.0:
            return hyper
        return {**hyper, "epsilon": hyper["epsilon"] ** (1.0 + self.spread * places)}

    def chance(self, hyper: Hyper) -> Tensor:
        """epsilon, of all environments or `[N]`."""
        return hyper["epsilon"]
