"""On-policy storage: one rollout, an estimator of advantages, and a plan of minibatches."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnrl import random, returns, tree
from fnrl.actors.on_policy import OnPolicyActorCritic
from fnrl.component import Schedule, component, hyper, setting
from fnrl.errors import CompositionError
from fnrl.record import fields_of, record
from fnrl.types import Params, Plan, Rollout, Transition, Tree, Weights

_PIECE = 128  # samples whose values are computed at once, eager


@record
class OnPolicyBatch:
    """Samples `[T, B]` (T is 1 without recurrence); memory `[B, H]` is the one before the first step; obs are
    normalised.
    """

    obs: Tensor
    action: Tensor
    logp: Tensor
    advantage: Tensor
    target: Tensor
    value: Tensor
    memory: Tensor
    starts: Tensor


@record
class RolloutState:
    """The rollout waiting to be used, or `()`."""

    rollout: Tree


class RolloutStorage:
    """Base of on-policy storages: a subclass is a component with `steps` and an `estimate`."""

    family: ClassVar[str] = "on-policy"
    warmup: ClassVar[int] = 0
    corrects: ClassVar[bool] = False  # whether `estimate` makes up for actions of an older policy
    fixed: ClassVar[bool] = True  # whether all that `batches` lifts keeps its shapes, so that it may be compiled
    steps: int

    def estimate(
        self, weights: Weights, steps: Transition, logp: Tensor, value: Tensor, next_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`advantage, target [T, N]`; logp is the stored actions' under the present weights where the storage corrects
        for older ones, else as they were stored.
        """
        raise TypeError(f"{type(self).__name__} must define estimate")

    def check(self, plan: Plan, actor: OnPolicyActorCritic, envs: int, env: Any = None) -> None:
        """Refuses a plan that doesn't divide what a rollout of `envs` environments gives (CompositionError)."""
        recurrent = actor.recurrent is not None
        total = envs if recurrent else self.steps * envs
        if total % plan.minibatches:
            fits = [m for m in range(1, total + 1) if total % m == 0]
            near = sorted(sorted(fits, key=lambda m: abs(m - plan.minibatches))[:3])
            what = f"{self.steps} steps x {envs} environments = {total} samples"
            if recurrent:
                what = f"{envs} environments (a recurrent plan takes whole columns)"
            raise CompositionError(
                f"minibatches={plan.minibatches} does not divide {what}; near values that do: {near}"
            )

    def check_unequal(self, actor: OnPolicyActorCritic) -> None:
        """Refuses an actor that needs rollouts of one length (CompositionError)."""
        if actor.recurrent is not None:
            raise CompositionError(
                "a recurrent plan takes whole columns of a rollout; leave quorum out, or use an actor without memory"
            )

    def check_interleaved(self) -> None:
        """Rollouts of several collectors may come in any order."""

    def init(self) -> RolloutState:
        """Nothing yet."""
        return RolloutState(())

    def append(self, state: RolloutState, rollout: Rollout) -> RolloutState:
        """Takes a rollout; the one before it must have been used."""
        if not isinstance(state.rollout, tuple):
            raise ValueError("append: the storage already holds a rollout; make its batches first")
        return RolloutState(rollout)

    def ready(self, state: RolloutState, plan: Plan, envs: int) -> bool:
        """Whether there is a rollout to learn from."""
        return not isinstance(state.rollout, tuple)

    def updates(self, plan: Plan, envs: int) -> int:
        """Updates that a rollout of `envs` environments gives."""
        return plan.updates

    def batches(
        self,
        lift: Callable[..., Any],
        state: RolloutState,
        actor: OnPolicyActorCritic,
        weights: Weights,
        plan: Plan,
        envs: int,
        key: Tensor,
        env: Any = None,
    ) -> tuple[RolloutState, OnPolicyBatch, Tensor]:
        """The storage without its rollout, the rollout's samples, and the rows of each minibatch `[K, B]`."""
        return (
            RolloutState(()),
            lift(self.prepare)(state, actor, weights),
            lift(self.order)(actor, plan, envs, key, state.rollout.valid),
        )

    def feedback(self, state: RolloutState, data: OnPolicyBatch, rows: Tensor, priority: Tree) -> RolloutState:
        """On-policy storage has no use for priorities."""
        return state

    def gather(self, state: RolloutState, copy: bool = True) -> RolloutState:
        """It is a record already."""
        return state

    def restore(self, pure: RolloutState, copy: bool = True) -> RolloutState:
        """The same."""
        return pure

    def order(self, actor: OnPolicyActorCritic, plan: Plan, envs: int, key: Tensor, valid: Tree = ()) -> Tensor:
        """Rows of each minibatch `[K, B]`.

        Without recurrence every epoch is a permutation of all T x N samples; with it, of the N environments, whole
        columns each. Where only some samples are `valid` `[T, N]`, it is a permutation of those, begun again to fill
        the epoch.
        """
        total = envs if actor.recurrent is not None else self.steps * envs
        index = torch.stack([random.permutation(k, total) for k in random.split(key, plan.epochs).unbind(0)])
        if not isinstance(valid, tuple):
            good = valid.flatten()
            first = torch.argsort((~good)[index].int(), dim=-1, stable=True)
            again = torch.arange(total, device=index.device) % good.sum()
            index = index.gather(-1, first).index_select(-1, again)
        return index.reshape(plan.updates, total // plan.minibatches)

    def take(self, data: OnPolicyBatch, rows: Tensor) -> OnPolicyBatch:
        """The minibatch of some rows `[B]`."""
        fields = {n: getattr(data, n).index_select(1, rows) for n in fields_of(OnPolicyBatch).data if n != "memory"}
        return OnPolicyBatch(**fields, memory=data.memory.index_select(0, rows))

    def prepare(self, state: RolloutState, actor: OnPolicyActorCritic, weights: Weights) -> OnPolicyBatch:
        """The rollout as samples under `weights`: `[T, N]` with recurrence, `[1, T*N]` without."""
        steps: Transition = state.rollout.steps
        normalise = (lambda x: x) if isinstance(weights.normaliser, tuple) else weights.normaliser
        obs, next_obs = normalise(steps.obs), normalise(steps.next_obs)
        done = steps.terminated | steps.truncated
        starts = torch.cat([torch.zeros_like(done[:1]), done[:-1]])
        memory, params = steps.memory[0], weights.params
        if self.corrects:
            logp, _, value, memories = actor.evaluate(params, obs, memory, starts, steps.action)
        else:
            logp, (value, memories) = steps.logp, _values(actor, params, obs, memory, starts)
        # V of each true successor, with the memory that the step before left: one step from T*N separate starts
        one = next_obs.flatten(0, 1)[None]
        next_value, _ = _values(actor, params, one, memories.flatten(0, 1), torch.zeros_like(done).reshape(1, -1))
        next_value = next_value.reshape(done.shape)
        advantage, target = self.estimate(weights, steps, logp, value, next_value)
        old = logp if self.corrects else steps.logp  # what a ratio of the loss is to
        if actor.recurrent is not None:
            return OnPolicyBatch(obs, steps.action, old, advantage, target, value, memory, starts)
        flat = tree.map(lambda x: x.flatten(0, 1)[None], (obs, steps.action, old, advantage, target, value))
        return OnPolicyBatch(*flat, memory=steps.memory.flatten(0, 1), starts=starts.reshape(1, -1))


def _values(
    actor: OnPolicyActorCritic, params: Params, obs: Tensor, memory: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """`actor.values`, eager and without recurrence in pieces of about `_PIECE` samples: what layers give of a whole
    rollout is the most memory that a lane takes. (A graph writes it over what it has used.)
    """
    length, width = obs.shape[:2]
    if actor.recurrent is not None or torch.compiler.is_compiling() or length * width <= _PIECE:
        return actor.values(params, obs, memory, starts)
    axis, size = (0, max(1, _PIECE // width)) if length > 1 else (1, _PIECE)
    pieces = obs.split(size, axis), starts.split(size, axis)
    found = [actor.values(params, x, memory, s)[0] for x, s in zip(*pieces, strict=True)]
    return torch.cat(found, axis), memory.expand(length, *memory.shape)


@component
class GAE(RolloutStorage):
    """Generalised advantage estimation, arXiv 1506.02438: see `fnrl.returns.gae`."""

    steps: int = setting(default=128, help="steps of each environment in a rollout")
    gae_lambda: float | Schedule = hyper(default=0.95, high=1.0, help="weight of longer returns")

    def estimate(
        self, weights: Weights, steps: Transition, logp: Tensor, value: Tensor, next_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`advantage, target [T, N]`."""
        h = weights.hyper
        return returns.gae(
            steps.reward, value, next_value, steps.terminated, steps.truncated, h["gamma"], h["gae_lambda"]
        )


@component
class Returns(RolloutStorage):
    """Plain discounted returns, bootstrapped where the rollout or a time limit cuts an episode: see
    `fnrl.returns.discounted_returns`.
    """

    steps: int = setting(default=128, help="steps of each environment in a rollout")

    def estimate(
        self, weights: Weights, steps: Transition, logp: Tensor, value: Tensor, next_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`target - V, target [T, N]`."""
        target = returns.discounted_returns(
            steps.reward, next_value, steps.terminated, steps.truncated, weights.hyper["gamma"]
        )
        return target - value, target


@component
class VTrace(RolloutStorage):
    """V-trace, arXiv 1802.01561: see `fnrl.returns.vtrace`. For rollouts of an older policy, as `asynchronous` gives.

    Advantages and targets are those of the present policy; with A2C it is IMPALA. Ratios of a loss (PPO's) are to the
    policy at the beginning of the plan: that of the rollout is corrected for already.
    """

    corrects: ClassVar[bool] = True

    steps: int = setting(default=128, help="steps of each environment in a rollout")
    rho_clip: float | Schedule = hyper(default=1.0, help="limit of the ratios that weigh an advantage")
    c_clip: float | Schedule = hyper(default=1.0, help="limit of the ratios that carry later errors back")
    trace_lambda: float | Schedule = hyper(default=1.0, high=1.0, help="weight of longer returns")

    def estimate(
        self, weights: Weights, steps: Transition, logp: Tensor, value: Tensor, next_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`advantage, target [T, N]`."""
        h = weights.hyper
        return returns.vtrace(
            logp,
            steps.logp,
            steps.reward,
            value,
            next_value,
            steps.terminated,
            steps.truncated,
            h["gamma"],
            h["trace_lambda"],
            h["rho_clip"],
            h["c_clip"],
        )
