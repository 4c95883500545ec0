"""Off-policy storage: one ring, and how samples are drawn from it."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.actors.off_policy import OffPolicyActorCritic
from fnrl.component import Schedule, component, hyper, option, setting
from fnrl.errors import CheckpointError, CompositionError
from fnrl.record import host, plain, record, replace
from fnrl.storages.frames import Frames
from fnrl.storages.hindsight import Hindsight, Relabelled
from fnrl.storages.priorities import by_priority
from fnrl.storages.ring import Ring, RingRecord, Rows, rows_of
from fnrl.storages.take import ones, places, transitions
from fnrl.token import Token
from fnrl.types import OffPolicyBatch, Rollout, Sampling, Tree, Weights

_AHEAD = 64  # updates that random bits are drawn for at once


@record
class ReplayState:
    """The reference to the ring (`()` before the first rollout), and what was collected and learnt from so far."""

    token: Token | tuple[()] = host(default=())
    collected: int = host(default=0)  # transitions of one lane
    updates: int = host(default=0)
    words: Tree = ()  # 32 random bits for each sample of updates to come `[R, B]`, and those of them that are used
    used: int = host(default=0)
    rate: "Rate | None" = host(default=None)
    planned: int = host(default=0)  # what was collected when updates were last made


@record
class ReplayRecord:
    """A replay as a pure record."""

    ring: Tree  # RingRecord, or ()
    collected: int = host()
    updates: int = host()
    words: Tree = ()
    used: int = host(default=0)
    rate: "Rate | None" = host(default=None)
    planned: int = host(default=0)  # what was collected when updates were last made


@plain
@dataclasses.dataclass(frozen=True)
class Rate:
    """What updates are earned by: `ratio` a transition since `collected`, when there had been `updates`."""

    ratio: float
    collected: int
    updates: int


@record
class Samples:
    """The samples of a plan `[K * B]`, and where in the ring they were drawn."""

    batch: OffPolicyBatch
    index: Tensor


@component
class Prioritised:
    """Samples drawn by their last error: arXiv 1511.05952, proportional.

    P(i) = p_i^alpha / sum_j p_j^alpha,   p = |error| + eps;   w_i = (M P(i))^-beta / max_j w_j
    """

    alpha: float = setting(default=0.6, low=0.0, help="0 draws uniformly, 1 in proportion to the error")
    priority_beta: float | Schedule = hyper(default=0.4, high=1.0, help="how far weights correct; 1 in full")
    eps: float = setting(default=1e-6, low=1e-12, help="added to the error")


@component
class Replay:
    """The last `capacity` transitions; a plan draws its batches from them, with replacement.

    A rollout is `steps` steps of every environment, and the algorithm's `ratio` says how many updates it earns. The
    first `warmup` transitions are of random actions and earn none but the last rollout's. With `n_step` returns,
    `reward` is the discounted sum up to there, or to the end of an episode, or to the newest transition.

    Appending writes in place, so of a state only the newest can be stepped (StaleStateError); `fork` copies.
    """

    family: ClassVar[str] = "off-policy"
    capacity: int = setting(default=1_000_000, help="transitions kept, over all environments")
    steps: int = setting(default=1, help="steps of each environment in a rollout")
    warmup: int = setting(default=1000, low=0, help="transitions of random actions before the first update")
    n_step: int = setting(default=1, help="steps of a return before it bootstraps")
    prioritised: Prioritised | None = option(default=None, help="draw by error; None for uniformly")
    frames: Frames | None = option(default=None, help="keep one frame of each stack; None keeps observations whole")
    hindsight: Hindsight | None = option(default=None, help="learn from goals that were reached, too")

    @property
    def fixed(self) -> bool:
        """Whether all that `batches` lifts is a program of fixed shapes, which rounding can't lead elsewhere."""
        return self.prioritised is None and self.hindsight is None

    def check(self, plan: Any, actor: OffPolicyActorCritic, envs: int, env: Any = None) -> None:
        """Refuses sizes that don't fit each other, or the machine's memory (CompositionError)."""
        if not isinstance(plan, Sampling):
            raise CompositionError(f"Replay needs an algorithm whose plan is a Sampling, such as SAC; it is {plan}")
        if self._rows(envs) < self.steps:
            raise CompositionError(
                f"capacity={self.capacity} of Replay is less than one rollout of {self.steps} steps x {envs} "
                f"environments = {self.steps * envs} transitions"
            )
        first = self._first(envs)
        if plan.batch > min(first, self._rows(envs) * envs):
            raise CompositionError(
                f"a batch of {plan.batch} is more than the {min(first, self.capacity)} transitions stored at the first "
                f"update: pass Replay(warmup={plan.batch}) or more, or a smaller batch"
            )
        if self.frames is not None:
            self.frames.check(actor.spec.obs)
        if self.hindsight is not None:
            self.hindsight.check(actor.spec, env)
            if self.frames is not None:
                raise CompositionError(f"Replay takes {self.frames!r} or {self.hindsight!r}, not both")
        need, have = self.nbytes(actor, envs), memory()
        if need > have:
            raise CompositionError(
                f"Replay(capacity={self.capacity}) needs {need / 1e9:.1f} GB for {actor.spec.obs}, the machine has "
                f"{have / 1e9:.1f} GB: a capacity of {int(self.capacity * 0.5 * have / need)} takes half of it"
            )

    def check_unequal(self, actor: OffPolicyActorCritic) -> None:
        """Refuses: a row of the ring is a step of every environment (CompositionError)."""
        raise CompositionError("a replay's row is a step of every environment; leave quorum out")

    def check_interleaved(self) -> None:
        """Refuses rollouts of several collectors in any order, where a row is read from those before it
        (CompositionError).
        """
        if self.frames is not None:
            raise CompositionError(
                "Replay(frames=...) makes a stack from the rows before, and asynchronous collectors take turns in the "
                "ring: pass frames=None, or use synchronous(collect, ...)"
            )
        for name, need in (("n_step", self.n_step), ("hindsight", 1 if self.hindsight is None else 2)):
            if need > self.steps:
                raise CompositionError(
                    f"asynchronous collectors take turns in the ring, so Replay({name}={getattr(self, name)!r}) can't "
                    f"look beyond a rollout, which has steps={self.steps}: pass steps={max(need, 8)} or more, or use "
                    "synchronous(collect, ...)"
                )

    def init(self) -> ReplayState:
        """Nothing yet."""
        return ReplayState()

    def append(self, state: ReplayState, rollout: Rollout) -> ReplayState:
        """Takes a rollout in, in place. Errors: StaleStateError."""
        steps = rollout.steps
        if isinstance(state.token, tuple):
            envs = steps.reward.shape[-1]
            ring = self._followed(Ring.empty(self._rows(envs), steps, self.prioritised is not None, self.frames))
        else:
            ring = state.token.take()
        token, count = ring.append(steps, rollout.sound), steps.reward.shape[-1] * steps.reward.shape[-2]
        return replace(state, token=token, collected=state.collected + count)

    def ready(self, state: ReplayState, plan: Sampling, envs: int) -> bool:
        """Whether the warm-up is over (or was, when there were updates) and an update is earned."""
        over = state.updates > 0 or state.collected >= max(self.warmup, 1)
        return over and self._earned(state, plan, envs) > 0

    def updates(self, plan: Sampling, envs: int) -> int:
        """Updates that a rollout of `envs` environments earns, rounded up."""
        return math.ceil(plan.ratio * self.steps * envs - 1e-9)

    def batches(
        self,
        lift: Callable[..., Any],
        state: ReplayState,
        actor: OffPolicyActorCritic,
        weights: Weights,
        plan: Sampling,
        envs: int,
        key: Tensor,
        env: Any = None,
    ) -> tuple[ReplayState, Samples, Tensor]:
        """The storage, the samples of all updates earned, and the rows of each batch `[K, B]`."""
        assert isinstance(state.token, Token)
        ring: Ring = state.token.take()
        updates = self._earned(state, plan, envs)
        words, used = state.words, state.used
        if isinstance(words, tuple) or words.shape[-1] != plan.batch or words.shape[-2] < used + updates:
            draw = _words if key.dim() == 1 else torch.func.vmap(_words, in_dims=(0, None, None))
            words, used = draw(key, max(updates, _AHEAD), plan.batch), 0
        now = words.narrow(-2, used, updates)
        where = ring.where if now.is_cpu else ring.where.to(now.device)
        where = where.expand(*now.shape[:-2], 2) if now.dim() > 2 else where
        if self.hindsight is None:
            index, batch = lift(self.drawn)(ring.rows, weights, now, where)
        else:
            index, weight = lift(self.draw)(ring.rows, weights.hyper, now, where)
            given = self.hindsight.relabel(lift, env, ring, key, index, self.n_step)
            batch = lift(self.sample)(ring.rows, weights, index, weight, where, given)
        rows = _in_turn(updates, plan.batch, index.device)
        rows = rows.expand(now.shape) if now.dim() > 2 else rows
        rate, made = self._rate(state, plan, envs), state.updates + updates
        state = ReplayState(state.token, state.collected, made, words, used + updates, rate, state.collected)
        return state, Samples(batch, index), rows

    def drawn(self, ring: Rows, weights: Weights, words: Tensor, where: Tensor) -> tuple[Tensor, OffPolicyBatch]:
        """`draw` and `sample`: lanes, or a graph, are entered once for both."""
        index, weight = self.draw(ring, weights.hyper, words, where)
        return index, self.sample(ring, weights, index, weight, where)

    def draw(self, ring: Rows, hyper: dict[str, Tensor], words: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the ring `[K * B]` (row x N + environment) by random words `[K, B]`, and the weight of each;
        `where` `[2]` are the oldest row and the number of rows that can be drawn.
        """
        whole, n = ring.reward.shape
        if self.prioritised is None:
            place = places(words, where, n, whole)
            return place, ones(place)
        place, chance = by_priority(ring.priority, ring.sums, (words >> 9) * 2.0**-23)
        weight = _power(where[1] * n * chance, -hyper["priority_beta"])
        return place.flatten(), (weight / weight.amax(-1, keepdim=True)).flatten()

    def sample(
        self,
        ring: Rows,
        weights: Weights,
        index: Tensor,
        weight: Tensor,
        where: Tensor,
        given: Relabelled | tuple[()] = (),
    ) -> OffPolicyBatch:
        """The transitions at some places `[B]`, with other goals where they are `given`; observations normalised."""
        gamma = weights.hyper["gamma"]
        if self.n_step == 1:
            obs, action, reward, terminated, next_obs = self._transitions(ring, index, index)
            discount = gamma
            if isinstance(given, Relabelled):
                reward, terminated = given.earned(0, reward, terminated)
        else:
            last, reward, terminated, discount = self._returns(ring, gamma, index, where, given)
            obs, action, _, _, next_obs = self._transitions(ring, index, last)
        discount = torch.where(terminated, 0.0, discount)
        if isinstance(given, Relabelled):
            obs, next_obs = given.obs(obs), given.obs(next_obs)
        normalise = (lambda x: x) if isinstance(weights.normaliser, tuple) else weights.normaliser
        return OffPolicyBatch(normalise(obs), action, reward, normalise(next_obs), discount, weight)

    def _returns(
        self, ring: Rows, gamma: Tensor, index: Tensor, where: Tensor, given: Relabelled | tuple[()]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last places of n-step returns `[B]`, the returns, whether they end there, and what comes after counts."""
        (whole, n), (start, size) = ring.reward.shape, where.unbind(0)
        rewards, ends, final_at = (x.flatten() for x in (ring.reward, ring.terminated, ring.final_at))

        def earned(k: int, place: Tensor) -> tuple[Tensor, Tensor]:
            """Reward and termination of the k-th step."""
            reward, terminated = rewards.index_select(0, place), ends.index_select(0, place)
            return given.earned(k, reward, terminated) if isinstance(given, Relabelled) else (reward, terminated)

        place, (reward, terminated) = index, earned(0, index)
        last, now, discount = place, terminated, gamma.expand(reward.shape)
        alive: Any = True
        for k in range(1, self.n_step):
            done = now | (final_at.index_select(0, place) >= 0)
            alive = ~done & alive & ((index - start * n) % (whole * n) < (size - k) * n)
            place = (index + k * n) % (whole * n)
            more, now = earned(k, place)
            reward = torch.where(alive, reward + discount * more, reward)
            discount = torch.where(alive, discount * gamma, discount)
            last, terminated = torch.where(alive, place, last), torch.where(alive, now, terminated)
        return last, reward, terminated, discount

    def _transitions(self, ring: Rows, index: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `transitions`, observations stacked."""
        obs, action, reward, terminated, following = transitions(ring, index, last)
        if self.frames is not None:
            rows, final_at, n = ring.obs.flatten(0, 1), ring.final_at.flatten(), ring.reward.shape[1]
            obs = self.frames.stack(rows, final_at, index, n)
            newest = obs if self.n_step == 1 else self.frames.stack(rows, final_at, last, n)
            following = torch.cat([newest[:, 1:], following[:, None]], 1)
        return obs, action, reward, terminated, following

    def take(self, data: Samples, rows: Tensor) -> OffPolicyBatch:
        """The batch of some rows `[B]`."""
        if rows.shape == data.index.shape:  # all of a plan of one update
            return data.batch
        return tree.map(lambda x: x.index_select(0, rows), data.batch)

    def feedback(self, state: ReplayState, data: Samples, rows: Tensor, priority: Tree) -> ReplayState:
        """The errors `[B]` of the samples at `rows` become their priorities, in place."""
        if self.prioritised is None or isinstance(priority, tuple) or isinstance(state.token, tuple):
            return state
        bad = ~torch.isfinite(priority).all(-1)
        if bool(bad.all()):
            return state  # the loss isn't either, and the update is about to be refused
        ring: Ring = state.token.take()
        token = ring.advance()
        index, new = data.index.gather(-1, rows), _power(priority + self.prioritised.eps, self.prioritised.alpha)
        if priority.dim() > 1 and bool(bad.any()):  # a lane that is about to be given up keeps what it had
            new = torch.where(bad[..., None], ring.rows.priority.gather(-1, index), new)
        ring.prioritise(index, new)
        return replace(state, token=token)

    def gather(self, state: ReplayState, copy: bool = True) -> ReplayRecord:
        """The ring as a record, or (`copy=False`) one that shares its memory until the next step.

        Errors: StaleStateError.
        """
        ring: Tree = ()
        if isinstance(state.token, Token):
            owner: Ring = state.token.take()
            ring = owner.gather() if copy else owner.view()
        return ReplayRecord(ring, state.collected, state.updates, state.words, state.used, state.rate, state.planned)

    def restore(self, pure: ReplayRecord, copy: bool = True) -> ReplayState:
        """A ring of its own from a record, or (`copy=False`) in the record's memory.

        Errors: CheckpointError when it does not fit the capacity.
        """
        if isinstance(pure.ring, tuple):
            return ReplayState((), pure.collected, pure.updates, pure.words, pure.used, pure.rate, pure.planned)
        ring: RingRecord = pure.ring
        if isinstance(ring.rows.priority, Tensor) != (self.prioritised is not None):
            raise CheckpointError(
                f"a ring {'without' if self.prioritised else 'with'} priorities is not that of {self!r}"
            )
        filled, envs = ring.rows.reward.shape[-2:]
        rows = self._rows(envs)
        if filled != rows_of(min(pure.collected // envs, rows), self.frames):
            of = f"capacity={self.capacity}" + ("" if self.frames is None else f", frames={self.frames!r}")
            raise CheckpointError(
                f"a ring of {ring.size} rows, {filled} with those around, is not that of Replay({of})"
            )
        restored = self._followed(Ring.restore(rows, ring, self.frames, copy))
        return ReplayState(
            restored.token(), pure.collected, pure.updates, pure.words, pure.used, pure.rate, pure.planned
        )

    def _followed(self, ring: Ring) -> Ring:
        if self.hindsight is not None:
            ring.mark_episodes()
        return ring

    # -- sizes ----------------------------------------------------------------------------------------------------

    def _rows(self, envs: int) -> int:
        return -(-self.capacity // envs)

    def _first(self, envs: int) -> int:
        """Transitions collected when the first update comes."""
        rollout = self.steps * envs
        return max(1, -(-self.warmup // rollout)) * rollout

    def _earned(self, state: ReplayState, plan: Sampling, envs: int) -> int:
        rate = self._rate(state, plan, envs)
        return math.floor(plan.ratio * (state.collected - rate.collected) + 1e-9) - (state.updates - rate.updates)

    def _rate(self, state: ReplayState, plan: Sampling, envs: int) -> Rate:
        """The first one counts from the rollout before the first update; another ratio from the last updates on."""
        if state.rate is None:
            return Rate(plan.ratio, self._first(envs) - self.steps * envs, 0)
        if state.rate.ratio == plan.ratio:
            return state.rate
        return Rate(plan.ratio, state.planned, state.updates)

    def nbytes(self, actor: OffPolicyActorCritic, envs: int) -> int:
        """Of a ring for so many environments."""
        spec = actor.spec
        obs = spec.obs.nbytes // (1 if self.frames is None else self.frames.count)
        each = obs + spec.action.nbytes + 4 + 1 + 1 + 4 + (0 if self.prioritised is None else 4)
        each += 0 if self.hindsight is None else 8
        return rows_of(self._rows(envs), self.frames) * envs * each


@functools.lru_cache(maxsize=16)
def _in_turn(updates: int, batch: int, device: torch.device) -> Tensor:
    """The rows of each update's batch `[K, B]`, one after another: made once, since a plan may be of one update."""
    return torch.arange(updates * batch, device=device).reshape(updates, batch)


def _words(key: Tensor, updates: int, batch: int) -> Tensor:
    """Words of 32 random bits `[R, B]`, for many plans: a draw costs little more than one for a single plan."""
    return random.bits(key, (updates, batch)).long() & 0xFFFFFFFF


def _power(x: Tensor, exponent: float | Tensor) -> Tensor:
    """`x^exponent`, x > 0: torch.pow rounds by where an element lies, and lanes would differ."""
    return torch.exp(exponent * torch.log(x))


def memory() -> int:
    """Bytes of memory there are to be had: what is available of the machine's, within the limit of a control group."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        found.append(int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)
