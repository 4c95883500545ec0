"""What a goal earns in a hosted environment: its own `compute_reward`, asked of a simulator that never trains."""

import os
import weakref
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from fnrl.envs.simulator import Array, Make, shut
from fnrl.errors import CompositionError, EnvironmentFault
from fnrl.spaces import EnvSpec, Goal

Ask = Callable[[Array, Array], Any]

_TRIAL = 16  # steps in which it must agree with `step`


class Judge:
    """`compute_reward` of one simulator (and `compute_terminated`, if it has that), tried on an episode when opened.

    Errors: CompositionError without `compute_reward`; EnvironmentFault where it raises, gives another shape, or does
    not say what `step` said.
    """

    def __init__(self, make: Make, spec: EnvSpec) -> None:
        self.name, self.env = spec.name, make()
        self.finalizer = weakref.finalize(self, shut, self.env, os.getpid())
        reward = self._method("compute_reward")
        if reward is None:
            raise CompositionError(
                f"{self.name} has goals, but no compute_reward(achieved_goal, desired_goal, info): hindsight can't "
                "know what another goal would have earned. Add it in a wrapper"
            )
        self.reward = reward
        self.terminated = self._method("compute_terminated") or _solved(self.env)
        assert spec.goal is not None
        self._try(spec.goal)

    def __call__(self, achieved: Tensor, desired: Tensor) -> tuple[Tensor, Tensor | tuple[()]]:
        """Rewards and terminations `[...]` of goals achieved `[..., G]` where others were desired; `()` where
        termination does not depend on the goal.
        """
        lead = achieved.shape[:-1]
        given = [x.reshape(-1, x.shape[-1]).numpy(force=True).copy() for x in (achieved, desired)]
        if not len(given[0]):
            return achieved.new_zeros(lead), ()
        reward = torch.from_numpy(self._ask("compute_reward", self.reward, *given).astype(np.float32))
        if self.terminated is None:
            return reward.reshape(lead).to(achieved.device), ()
        ended = torch.from_numpy(self._ask("compute_terminated", self.terminated, *given).astype(np.bool_))
        return reward.reshape(lead).to(achieved.device), ended.reshape(lead).to(achieved.device)

    def _method(self, name: str) -> Ask | None:
        if not self.env.has_wrapper_attr(name):
            return None
        method = self.env.get_wrapper_attr(name)
        return lambda achieved, desired: method(achieved, desired, {})

    def _ask(self, what: str, method: Ask, achieved: Array, desired: Array) -> Array:
        try:
            found = np.array(method(achieved, desired))
        except Exception as e:
            raise EnvironmentFault(f"{self.name}: {what} raised {type(e).__name__}: {e}") from e
        if found.shape != (len(achieved),):
            raise EnvironmentFault(
                f"{self.name}: {what} gave {list(found.shape)} for goals {list(achieved.shape)}, expected "
                f"[{len(achieved)}]: it must take many goals at once, one a row"
            )
        return found

    def _try(self, layout: Goal) -> None:
        self.env.reset(seed=0)
        self.env.action_space.seed(0)
        shown = []
        for _ in range(_TRIAL):
            obs, reward, terminated, truncated, _ = self.env.step(self.env.action_space.sample())
            shown.append((torch.from_numpy(layout.join(obs, self.name)).float(), float(reward), bool(terminated)))
            if terminated or truncated:
                break
        flat = torch.stack([obs for obs, _, _ in shown])
        reward, terminated = self(layout.achieved(flat), layout.desired(flat))
        for t, (_, given, end) in enumerate(shown):
            if abs(float(reward[t]) - given) > 1e-4 * (1.0 + abs(given)):
                raise EnvironmentFault(
                    f"{self.name}: at step {t + 1} compute_reward gives {float(reward[t])}, step gave {given}: rewards "
                    "of hindsight would not be the environment's own"
                )
            if isinstance(terminated, Tensor) and bool(terminated[t]) != end:
                raise EnvironmentFault(
                    f"{self.name}: at step {t + 1} compute_terminated gives {bool(terminated[t])}, step gave {end}"
                )


def _solved(env: gymnasium.Env[Any, Any]) -> Ask | None:
    """What ends an episode of panda-gym, which has no `compute_terminated`: that its task is solved."""
    if type(env.unwrapped).__module__.startswith("panda_gym."):
        return env.get_wrapper_attr("task").is_success
    return None
