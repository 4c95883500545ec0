"""Collection: a rollout of T steps from N environments, with the present weights."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnrl import random, returns, tree
from fnrl.envs.base import Step
from fnrl.errors import DeadLaneWarning, NonFiniteError
from fnrl.lift import Run
from fnrl.parts import NormaliseObs, ScaleReward
from fnrl.record import host, record, replace
from fnrl.types import Episodes, Moments, Rollout, Transition, Tree, Weights

_AHEAD = 64  # environment steps that noise is drawn for at once, where a rollout has fewer
_UNROLLED = 4  # steps of a pure environment in one graph: more take longer to compile than they save


@record
class ReturnScale:
    """Moments of the discounted return, and the return so far of each environment `[N]`."""

    moments: Moments
    discounted: Tensor


@record
class Tally:
    """What is carried from rollout to rollout: raw return and length so far `[N]`, and the reward scale (or `()`)."""

    returns: Tensor
    lengths: Tensor
    scale: Tree


@record
class CollectState:
    """Environments, the actor's memory `[N, H]`, the tally, the key of all noise, and whether all was finite so far (a
    solo run that isn't has stopped). Noise of this and the next rollouts `[R, T, N, ...]`, where those are short,
    follows from the key, so that no record holds it.
    """

    env: Tree
    memory: Tensor
    tally: Tally
    key: Tensor
    sound: Tensor
    ahead: Tree = ()
    rollouts: int = host(default=0)


def first_state(run: Run, key: Tensor) -> CollectState:
    """Fresh episodes in every environment."""
    parts, fold = run.parts, run.lift(random.fold_in)
    env_key, noise_key = fold(key, 0), fold(key, 1)
    env = run.over_lanes(parts.env.init, env_key) if parts.env.pure else parts.env.init(env_key)
    n = parts.env.num_envs

    def blank(_: Tensor) -> tuple[Tensor, Tally, Tensor]:
        scale = () if parts.scale_reward is None else ReturnScale(Moments.zeros(()), torch.zeros(n))
        tally = Tally(torch.zeros(n), torch.zeros(n, dtype=torch.int64), scale)
        return parts.actor.memory(n), tally, torch.ones((), dtype=torch.bool)

    memory, tally, sound = run.over_lanes(blank, key)
    return CollectState(env, memory, tally, noise_key, sound)


def restored(run: Run, pure: CollectState) -> CollectState:
    """Environments brought back to where they were. Where one had to begin another episode, so do memory and tally."""
    env = run.parts.env.restore(pure.env)
    anew = run.parts.env.restarted(pure.env, env)
    state = replace(pure, env=env)
    if isinstance(anew, tuple) or not bool(anew.any()):
        return state
    anew, tally = anew.to(pure.memory.device), pure.tally
    memory = torch.where(anew[..., None], 0.0, pure.memory)
    returns_, lengths = torch.where(anew, 0.0, tally.returns), torch.where(anew, 0, tally.lengths)
    scale = tally.scale
    if not isinstance(scale, tuple):
        scale = replace(scale, discounted=torch.where(anew, 0.0, scale.discounted))
    return replace(state, memory=memory, tally=Tally(returns_, lengths, scale))


def collect_rollout(run: Run, state: CollectState, weights: Weights) -> tuple[CollectState, Rollout, Episodes]:
    """`storage.steps` steps: `steps` are `[T, N]`, and episodes that ended stand in `Episodes`. One that was stopped
    early is filled up, and says what is `valid`.

    A lane with something in it that is not finite is told once; its rollout is all zeros, and what can be kept of its
    state stays as it was, so that nothing of it disturbs a batch, a ring or a checkpoint.

    Errors: NonFiniteError naming environment, step and key, for a solo run.
    """
    parts = run.parts
    drawn, ahead = _drawn(run, state)
    env_state, memory, rollout = _rolled(run, state, weights, drawn)
    steps, length, sound = parts.storage.steps, rollout.reward.shape[run.axis], state.sound
    facts = parts.scale_reward, parts.normalise_obs
    account = run.graph(_account) if length == steps else run.lift(_account)
    reward, moments, episodes, tally, finite = account(*facts, rollout, state.tally, weights.hyper)
    if not bool(finite if run.lanes is None else finite.all()):
        bad = _non_finite(run, state, rollout)
        if isinstance(bad, Tensor):
            sound = sound & ~bad
            rollout = tree.where(bad, tree.map(torch.zeros_like, rollout), rollout)
            memory = tree.where(bad, state.memory, memory)
            env_state = tree.where(bad, state.env, env_state) if parts.env.pure else env_state
            reward, moments, episodes, tally, _ = account(*facts, rollout, state.tally, weights.hyper)
    count = length * parts.env.num_envs
    made = Rollout(replace(rollout, reward=reward), moments, weights.version, count, sound=sound)
    state = CollectState(env_state, memory, tally, state.key, sound, ahead, state.rollouts + 1)
    return state, made if length == steps else _filled(run, made, steps), episodes


def cut(run: Run, rollout: Rollout) -> Rollout:
    """A rollout that what comes after it does not continue: its last step counts as cut off by a time limit, so that
    nothing looks beyond its true successor.
    """
    steps, axis = rollout.steps, run.axis
    last = torch.arange(steps.truncated.shape[axis], device=steps.truncated.device) == steps.truncated.shape[axis] - 1
    truncated = steps.truncated | (last[:, None] & ~steps.terminated)
    return replace(rollout, steps=replace(steps, truncated=truncated))


def _filled(run: Run, rollout: Rollout, steps: int) -> Rollout:
    """A shorter rollout, cut, filled up to `steps` with repetitions of its last step that don't count."""
    axis, length = run.axis, rollout.steps.reward.shape[run.axis]

    def fill(x: Tensor) -> Tensor:
        last = x.narrow(axis, length - 1, 1)
        return torch.cat([x, last.expand(*x.shape[:axis], steps - length, *x.shape[axis + 1 :])], axis)

    valid = fill(torch.ones_like(rollout.steps.truncated))
    valid.narrow(axis, length, steps - length).zero_()
    return replace(rollout, steps=tree.map(fill, cut(run, rollout).steps), valid=valid)


def _drawn(run: Run, state: CollectState) -> tuple[Any, Tree]:
    """What a rollout draws, as `_rolled` takes it, and what is kept for those after it: a draw for many costs little
    more than for one.
    """
    parts, steps = run.parts, run.parts.storage.steps
    many = max(1, _AHEAD // (steps * parts.env.num_envs))
    if many == 1:
        noise = run.graph(_draw)(parts.env, parts.actor, steps, state.key, run.number(state.rollouts))
        return (noise if _at_once(run) else _steps_of(noise, run.axis)), ()
    ahead, place = state.ahead, state.rollouts % many
    if place == 0 or ahead == ():
        first = run.number(state.rollouts - place)
        noise = run.graph(_draw_many)(parts.env, parts.actor, steps, many, state.key, first)
        if _at_once(run):
            ahead = _steps_of(noise, run.axis)
        else:
            each = _steps_of(tree.map(lambda x: x.flatten(run.axis, run.axis + 1), noise), run.axis)
            ahead = tuple([each[i : i + steps] for i in range(0, len(each), steps)])
    return ahead[place], ahead


def _at_once(run: Run) -> bool:
    """Whether a rollout is made by graphs of several steps, and takes its noise whole; else step by step."""
    return run.compile and run.parts.env.pure and run.least is None


def _steps_of(noise: Tree, axis: int) -> tuple[Tree, ...]:
    """The noise of each step of a rollout, or of each rollout of many."""
    flat, structure = tree.flatten(noise)
    return tuple(map(tree.builder(structure), zip(*(x.unbind(axis) for x in flat), strict=True)))


def _draw(env: Any, actor: Any, steps: int, key: Tensor, number: Tensor) -> tuple[Tree, Tree]:
    """The noise of a rollout, `[T, N, ...]`: the actor's, and a pure environment's."""
    of_actor, of_env = random.split(random.fold_in(key, number)).unbind(0)
    return actor.noise(of_actor, steps, env.num_envs), env.noise(of_env, steps) if env.pure else ()


def _draw_many(env: Any, actor: Any, steps: int, many: int, key: Tensor, first: Tensor) -> tuple[Tree, Tree]:
    """The noise of `many` rollouts, `[R, T, N, ...]`."""
    numbers = first + torch.arange(many, device=key.device)
    return torch.func.vmap(lambda number: _draw(env, actor, steps, key, number))(numbers)


def _rolled(run: Run, state: CollectState, weights: Weights, drawn: Any) -> tuple[Any, Tensor, Transition]:
    """The environments and the memory after a rollout, and its transitions: all, unless it was stopped early."""
    parts, axis, steps = run.parts, run.axis, run.parts.storage.steps
    env_state, memory, made, how = state.env, state.memory, [], acting(run, weights)
    if _at_once(run):
        k = max(n for n in range(1, _UNROLLED + 1) if steps % n == 0)
        facts = parts.env, k, *how
        return run.together(_all_steps)(axis, steps, *facts, env_state, memory, *drawn)
    least = steps if run.least is None else max(1, math.ceil(run.least * steps))
    for t, (noise, env_noise) in enumerate(drawn):
        env_state, memory, transition = advance(run, how, env_state, memory, noise, env_noise)
        made.append(transition)
        if least <= t + 1 < steps and run.executor.stopped(run, state.rollouts, t + 1):
            break
    return env_state, memory, tree.stack(made, axis)


def _all_steps(graph: Callable[..., Any], axis: int, steps: int, env: Any, at_once: int, *args: Any) -> Any:
    """`_rolled` of a pure environment, `at_once` of its steps in a graph."""
    *how, state, memory, noise, env_noise = args
    made = []
    for t in range(0, steps, at_once):
        part = tree.map(lambda x: x.narrow(axis, t, at_once), (noise, env_noise))  # noqa: B023
        state, memory, transitions = graph(_act_and_steps)(env, at_once, *how, state, memory, *part)
        made.append(transitions)
    return state, memory, tree.concatenate(made, axis)


def act(
    actor: Any, params: Any, normaliser: Tree, obs: Tensor, memory: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`actor.act` on the raw observation, normalised first if the parts do so."""
    seen = obs if isinstance(normaliser, tuple) else normaliser(obs)
    return actor.act(params, seen, memory, noise)


Acting = tuple[Any, bool, Any, Tree, dict[str, Tensor], Tensor]


def acting(run: Run, weights: Weights) -> Acting:
    """What acting to learn takes besides observations: the actor, whether any action does, weights, and where the
    environments stand among those of all workers.
    """
    anything = weights.version == 0 and run.parts.storage.warmup > 0
    places = run.places(run.parts.env.num_envs)
    return run.parts.actor, anything, weights.params, weights.normaliser, weights.hyper, places


def _explore(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`act` to learn: of what `acting` gives, the observation, the memory and the noise; without noise, not to."""
    actor, anything, params, normaliser, hyper, places, obs, memory, noise = args
    if noise is not None:
        noise = actor.explored(noise, actor.placed(hyper, places), anything)
    return act(actor, params, normaliser, obs, memory, noise)


def advance(
    run: Run, how: Acting, state: Any, memory: Tensor, noise: Tree, env_noise: Tree
) -> tuple[Any, Tensor, Transition]:
    """One step of the environments: their next state, the memory after it (cleared where an episode ended), what
    happened.
    """
    if run.parts.env.pure:
        return run.graph(_act_and_step)(run.parts.env, *how, state, memory, noise, env_noise)
    return _hosted_step(run, how, state, memory, noise, env_noise)


def _act_and_step(env: Any, *args: Any) -> tuple[Any, Tensor, Transition]:
    *how, state, memory, noise, env_noise = args
    action, env_action, logp, after = _explore(*how, state.obs, memory, noise)
    next_state, step = env.step(state, env_action, env_noise)
    return next_state, _memory_after(after, step), _transition(state.obs, action, logp, step, memory)


def _act_and_steps(env: Any, steps: int, *args: Any) -> tuple[Any, Tensor, Transition]:
    """`steps` of them, and their transitions `[steps, N]`."""
    *how, state, memory, noise, env_noise = args
    made = []
    for t in range(steps):
        drawn = tree.index((noise, env_noise), t)
        state, memory, transition = _act_and_step(env, *how, state, memory, *drawn)
        made.append(transition)
    return state, memory, tree.stack(made)


def _hosted_step(run: Run, how: Acting, state: Any, memory: Tensor, noise: Tree, env_noise: Tree) -> Any:
    obs = state.obs if run.device == "cpu" else state.obs.to(run.device)
    action, env_action, logp, after = run.graph(_explore)(*how, obs, memory, noise)
    next_state, step = run.parts.env.step(state, env_action, env_noise)
    step = tree.to(step, run.device) if run.device != "cpu" else step
    return next_state, _memory_after(after, step), _transition(obs, action, logp, step, memory)


def _memory_after(memory: Tensor, step: Step) -> Tensor:
    if memory.shape[-1] == 0:
        return memory
    return torch.where((step.terminated | step.truncated)[..., None], 0.0, memory)


def _transition(obs: Tensor, action: Tensor, logp: Tensor, step: Step, memory: Tensor) -> Transition:
    return Transition(obs, action, logp, step.reward, step.terminated, step.truncated, step.next_obs, memory)


def _account(
    scale: ScaleReward | None, normalise: NormaliseObs | None, steps: Transition, tally: Tally, hyper: dict[str, Tensor]
) -> tuple[Tensor, Tree, Episodes, Tally, Tensor]:
    """Rewards to learn from, moments of observations, episodes that ended, the tally to carry on, and whether all is
    finite: a sum is, if all is (one that isn't is looked into).
    """
    done = steps.terminated | steps.truncated
    returns_, returns_left = _running(steps.reward, done, tally.returns)
    lengths, lengths_left = _running(torch.ones_like(steps.reward), done, tally.lengths.float())
    episodes = Episodes(done, torch.where(done, returns_, 0.0), torch.where(done, lengths, 0.0).long())
    reward, scaled = steps.reward, tally.scale
    if scale is not None:
        discounted, left = _running(reward, done, tally.scale.discounted, hyper["gamma"])
        moments = tally.scale.moments.merge(Moments.of(discounted, 2))
        factor = torch.rsqrt(moments.m2 / moments.count + 1e-8).float()
        reward, scaled = (reward * factor).clamp(-scale.clip, scale.clip), ReturnScale(moments, left)
    seen = () if normalise is None else Moments.of(steps.obs, 2)
    finite = torch.isfinite(functools.reduce(torch.add, [x.sum() for x in _told(steps).values()]))
    return reward, seen, episodes, Tally(returns_left, lengths_left.long(), scaled), finite


def _told(steps: Transition) -> dict[str, Tensor]:
    """What of a rollout has to be finite."""
    return {n: x for n in ("next_obs", "reward", "logp") if (x := getattr(steps, n)).is_floating_point()}


def _running(reward: Tensor, done: Tensor, carried: Tensor, gamma: Any = 1.0) -> tuple[Tensor, Tensor]:
    """`G_t = r_t + gamma (1 - done_{t-1}) G_{t-1}` `[T, N]` with `G_{-1}` carried in, and `G` to carry on (0 after
    an end).
    """
    before = carried if isinstance(gamma, float) and gamma == 1.0 else gamma * carried
    if len(reward) == 1:
        running = reward + before
    else:
        keep = gamma * (1.0 - done.float())
        first = torch.cat([(reward[0] + before)[None], reward[1:]])
        running = returns.forward_scan(first, torch.cat([torch.zeros_like(keep[:1]), keep[:-1]]))
    return running, torch.where(done[-1], 0.0, running[-1])


def _non_finite(run: Run, state: CollectState, rollout: Transition) -> Tree:
    """The lanes `[S]` whose rollout is not finite, told where they are new; `()` if there are none."""
    bad: dict[int | None, str] = {}
    key = run.lift(random.fold_in)(state.key, state.rollouts)
    for name, x in _told(rollout).items():
        for lane in (None,) if run.lanes is None else range(run.lanes):
            wrong = torch.nonzero(~torch.isfinite(x if lane is None else x[lane]))
            if not len(wrong) or lane in bad:
                continue
            step, env = wrong[0].tolist()[:2]
            who, which = ("", key) if lane is None else (f"lane {run.numbers[lane]}, ", key[lane])
            bad[lane] = (
                f"{name} is not finite: {run.parts.env.spec.name}, {who}environment {env}, step {step} of rollout "
                f"{state.rollouts} at node {run.name}; the rollout's key is {which.tolist()}"
            )
    if None in bad:
        raise NonFiniteError(f"{bad[None]}. None of it was learnt")
    if not bad:
        return ()
    mask = torch.tensor([lane in bad for lane in range(run.lanes or 0)], device=state.sound.device)
    if not bool((state.sound & ~mask).any()):
        raise NonFiniteError(f"{next(iter(bad.values()))}. No lane is left")
    for lane in torch.nonzero(mask & state.sound).flatten().tolist():
        warnings.warn(f"{bad[lane]}. The lane stands still from here on", DeadLaneWarning, stacklevel=6)
    return mask
