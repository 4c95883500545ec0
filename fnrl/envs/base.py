"""The protocol of environments: a vector of N that starts a new episode by itself, and says so."""

from typing import Any, Protocol, runtime_checkable

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
    """A pure environment: the observation to act on `[N, ...]` (after a reset, the first of the new episode), and
    the rest.
    """

    obs: Tensor
    inside: Tree


@runtime_checkable
class Environment(Protocol):
    """N environments as one component.

    `pure` ones are functions of tensors: `noise` is drawn for a whole rollout `[T, ...]`, and `step` takes one slice.
    Hosted ones keep a token in their state and take `()` for noise; `gather` and `restore` turn it into pure records
    and back, `restarted` says in which environments `[N]` that began another episode (or `()` for in none), `close`
    releases the simulators.

    An environment whose spec has a `goal` may offer `judge(achieved [..., G], desired [..., G]) -> reward, terminated
    [...]`, a function of the two alone, with `()` where termination does not depend on them: hindsight asks it.
    """

    @property
    def num_envs(self) -> int: ...

    @property
    def pure(self) -> bool: ...

    @property
    def spec(self) -> EnvSpec: ...

    def noise(self, key: Tensor, steps: int) -> Tree: ...

    def init(self, key: Tensor) -> Any: ...

    def step(self, state: Any, action: Tensor, noise: Tree) -> tuple[Any, Step]: ...

    def gather(self, state: Any) -> Any: ...

    def restore(self, record: Any) -> Any: ...

    def restarted(self, record: Any, state: Any) -> Tree: ...

    def close(self, state: Any) -> None: ...


class PureEnvironment:
    """Base of environments that are functions of tensors: their state is already what a checkpoint holds."""

    @property
    def pure(self) -> bool:
        """Lifted and compiled."""
        return True

    def gather(self, state: Any) -> Any:
        """The state itself."""
        return state

    def restore(self, record: Any) -> Any:
        """The record itself."""
        return record

    def restarted(self, record: Any, state: Any) -> tuple[()]:
        """None: they go on as they were."""
        return ()

    def close(self, state: Any) -> None:
        """Nothing to release."""
