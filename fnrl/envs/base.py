"""The protocol of environments: a vector of N that starts a new episode by itself, and says so."""

from typing import Any, Protocol

from torch import Tensor

from fnrl.record import record
from fnrl.spaces import EnvSpec
from fnrl.types import Tree


@record
class Step:
    """What one step of N environments gave; `next_obs` is the true successor, before any reset."""

    next_obs: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


@record
class EnvState:
    """A pure environment: the observation to act on `[N, ...]` (after a reset, the first of the new episode), and the rest."""

    obs: Tensor
    inside: Tree


class Environment(Protocol):
    """N environments as one component.

    `pure` ones are functions of tensors: `noise` is drawn for a whole rollout `[T, ...]`, and `step` takes one slice. Hosted ones keep a
    token in their state, take `()` for noise, and offer `gather`, `restore` and `close` (see `fnrl.envs.hosted`).
    """

    num_envs: int
    pure: bool

    @property
    def spec(self) -> EnvSpec: ...

    def noise(self, key: Tensor, steps: int) -> Tree: ...

    def init(self, key: Tensor) -> Any: ...

    def step(self, state: Any, action: Tensor, noise: Tree) -> tuple[Any, Step]: ...
