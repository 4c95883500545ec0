"""Hindsight: samples of a ring whose goal gives way to one that was reached in the same episode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnrl import random
from fnrl.component import component, option, setting
from fnrl.errors import CompositionError, EnvironmentFault, NonFiniteError
from fnrl.record import record, static
from fnrl.spaces import EnvSpec, Goal
from fnrl.storages.ring import Ring, Rows, successors
from fnrl.storages.spans import Spans
from fnrl.types import Tree

_OWN = 2**32 - 1  # the child of a plan's key that hindsight draws from; places in the ring are drawn from others


class Goals:
    """Base of strategies: which step of its episode gives a step the goal it reached. A subclass is a component."""

    def steps(self, since: Tensor, left: Tensor, u: Tensor) -> Tensor:
        """How many steps on `[B]` (back, where negative), by uniforms `[B]`, of `since` before and `left` after."""
        raise TypeError(f"{type(self).__name__} must define steps")


@component
class FutureGoals(Goals):
    """Any step from this one on, alike."""

    def steps(self, since: Tensor, left: Tensor, u: Tensor) -> Tensor:
        """In `[0, left]`."""
        return _below(left + 1, u)


@component
class FinalGoals(Goals):
    """The last step; of an episode that goes on, the newest."""

    def steps(self, since: Tensor, left: Tensor, u: Tensor) -> Tensor:
        """`left`."""
        return left


@component
class EpisodeGoals(Goals):
    """Any step of the episode that is still stored, alike: those before this one, too."""

    def steps(self, since: Tensor, left: Tensor, u: Tensor) -> Tensor:
        """In `[-since, left]`."""
        return _below(since + left + 1, u) - since


@record
class Relabelled:
    """Samples `[B]` with a goal in the place of their own, where `chosen`, and what the steps `[B, n]` of their returns
    earn under it.
    """

    chosen: Tensor
    goal: Tensor  # [B, G]
    reward: Tensor
    terminated: Tree  # or (), where the goal has no say in it
    layout: Goal = static()

    def earned(self, k: int, reward: Tensor, terminated: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and termination of the k-th steps `[B]`, in the place of those that were stored."""
        reward = torch.where(self.chosen, self.reward[:, k], reward)
        if isinstance(self.terminated, Tensor):
            terminated = torch.where(self.chosen, self.terminated[:, k], terminated)
        return reward, terminated

    def obs(self, obs: Tensor) -> Tensor:
        """Observations `[B, O]` that say the goal."""
        return torch.where(self.chosen[:, None], self.layout.with_desired(obs, self.goal), obs)


@component
class Hindsight:
    """Hindsight experience replay: arXiv 1707.01495.

    Of `goals + 1` samples, `goals` are learnt from as if they had aimed at a goal that was reached in their episode:
    reward and termination are what the environment's `judge` says under it, along the whole n-step return. A
    truncation bootstraps under any goal alike. Errors: EnvironmentFault for rewards of another shape,
    NonFiniteError.
    """

    goals: float = setting(default=4.0, low=0.0, help="samples with a goal that was reached, for each with its own")
    strategy: Goals = option(default=FutureGoals(), help="which goals that were reached")

    def check(self, spec: EnvSpec, env: Any) -> None:
        """Refuses an environment without goals, or one that can't say what they earn (CompositionError)."""
        if spec.goal is None:
            raise CompositionError(
                f"Hindsight needs a goal environment, whose observations are observation, achieved_goal and "
                f"desired_goal (such as PandaReach-v3 or BitFlipping); that of {spec.name} is {spec.obs}"
            )
        if not hasattr(env, "judge"):
            raise CompositionError(
                f"Hindsight needs to know what a goal earns: {env!r} has no judge(achieved, desired) -> reward, "
                f"terminated"
            )
        goals = torch.zeros(0, spec.goal.goal)  # a hosted one is tried on an episode when it is first asked
        if env.pure:
            goals = spec.goal.achieved(env.init(random.key(0)).obs)
        _judged(env, env.judge, goals[:, None], goals)

    def relabel(
        self, lift: Callable[..., Any], env: Any, ring: Ring, key: Tensor, index: Tensor, n_step: int
    ) -> Relabelled:
        """Other goals for the samples at `index` `[B]`, and what they earn. A function of the ring and the key."""
        assert ring.spans is not None
        given = ring.rows, ring.spans, env.spec.goal, key, index, n_step, ring.start, ring.size
        chosen, goal, achieved = lift(self.choose)(*given)
        judge = lift(env.judge) if env.pure else env.judge
        return Relabelled(chosen, goal, *_judged(env, judge, achieved, goal), env.spec.goal)

    def choose(
        self, ring: Rows, spans: Spans, layout: Goal, key: Tensor, index: Tensor, n_step: int, start: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which samples `[B]` get another goal, that goal `[B, G]`, and what their n steps achieved `[B, n, G]`."""
        whole, n = ring.reward.shape
        row, env = index // n, index % n
        age = (row - start) % whole
        left = spans.left.flatten()[index].long()
        left = torch.where(left < 0, size - 1 - age, left)
        since = torch.minimum(spans.since.flatten()[index].long(), age)
        share, pick = random.uniform(random.fold_in(key, _OWN), (2, *index.shape)).unbind(0)
        chosen = share * (self.goals + 1.0) < self.goals

        def achieved(steps: Tensor) -> Tensor:
            return layout.achieved(successors(ring, (row + steps) % whole * n + env))

        window = [achieved(left.clamp(max=k)) for k in range(n_step)]  # past the end nothing is earned
        return chosen, achieved(self.strategy.steps(since, left, pick)), torch.stack(window, 1)


def _below(count: Tensor, u: Tensor) -> Tensor:
    """Integers in `[0, count)` by uniforms in `[0, 1)`."""
    return torch.minimum((u * count).long(), count - 1)


def _judged(env: Any, judge: Callable[..., Any], achieved: Tensor, goal: Tensor) -> tuple[Tensor, Tree]:
    """Reward and termination of what was achieved `[..., B, n, G]` under goals `[..., B, G]`."""
    reward, terminated = judge(achieved, goal[..., None, :].expand_as(achieved))
    for what, x in (("rewards", reward), ("terminations", terminated)):
        if isinstance(x, Tensor) and x.shape != achieved.shape[:-1]:
            raise EnvironmentFault(
                f"{env.spec.name}: judge gave {what} {list(x.shape)} for goals {list(achieved.shape)}, expected "
                f"{list(achieved.shape[:-1])}"
            )
    if not bool(torch.isfinite(reward).all()):
        i = tuple(torch.nonzero(~torch.isfinite(reward))[0].tolist())
        raise NonFiniteError(
            f"{env.spec.name}: judge gave the reward {float(reward[i])} for {achieved[i].tolist()} achieved"
        )
    return reward, terminated
