"""The laws of environments: pure ones, and vectors of hosted simulators."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.record import record
from fnrl.spaces import Discrete, EnvSpec, Goal
from fnrl.testing import laws, strategies

FOLLOWS = "the state's observation is the true successor, until an episode ends"
SUCCESSOR = "next_obs is the true successor at an end too, not the next episode's first observation"
EPISODES = "every episode begins anew"
ENVIRONMENTS = "every environment of a vector draws for itself"
RESTORED = "a restored simulator goes on as the gathered one would have"
GOALS = "what a goal earns is what the step gave that reached it, and an episode keeps its goal"
CLOSED = "closing is final, and may be asked twice"

_CHANCE = 1000.0  # what would happen by chance less often than once in so many is taken for a fault


def check_environment(
    env: Any, *, steps: int = 128, random_resets: bool = True, max_examples: int = 2, compiled: bool = False
) -> None:
    """The laws of an environment, on walks of `steps` random actions.

    Besides purity, determinism, lanes, shapes, finiteness and being a value: `next_obs` is the true successor where an
    episode ends, episodes and environments and keys begin differently (unless `random_resets` is false), a hosted
    simulator is restored to the bit, refuses stale states, and closes, and `judge` says of the goals of a step what the
    step said. `compiled` traces a pure `step` as well.

    Errors: LawError; ValueError where too few episodes end within `steps` for this to mean anything.
    """
    laws.check_value(env)
    if not isinstance(env.spec, EnvSpec):
        laws.broken(env, laws.SHAPES, f"spec is {env.spec!r}, expected an fnrl.spaces.EnvSpec")
    check = _check_pure if env.pure else _check_hosted

    def law(seed: int) -> None:
        trace = check(env, seed, steps)
        _check_trace(env, trace, random_resets)
        if env.spec.goal is not None:
            _check_goals(env, env.spec.goal, trace)

    laws.for_all(law, max_examples, seed=st.integers(0, 2**31))
    if random_resets:
        _check_keys(env)
    if compiled and env.pure:
        key = random.key(0)
        action = strategies.env_actions(env.spec.action, (env.num_envs,), 0)
        laws.check_compiled(env, env.step, env.init(key), action, tree.index(env.noise(key, 1), 0))


@record
class Trace:
    """A walk: observations acted on, what the steps gave, and the observations to act on after them, `[T, N, ...]`."""

    obs: Tensor
    next_obs: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    after: Tensor

    @property
    def done(self) -> Tensor:
        """Where an episode ended."""
        return self.terminated | self.truncated


# -- pure -----------------------------------------------------------------------------------------------------------


def _check_pure(env: Any, seed: int, steps: int) -> Trace:
    keys = [random.key(seed + i) for i in range(3)]
    states = [laws.check_call(env, env.init, key) for key in keys]
    noises = [laws.check_call(env, env.noise, random.fold_in(key, 1), steps) for key in keys]
    for path, x in tree.paths(noises[0]):
        if x.shape[:1] != (steps,):
            laws.broken(env, laws.SHAPES, f"noise{path} is {list(x.shape)}, expected [{steps}, ...]")
    if tree.leaves(noises[0]):
        laws.check_lanes(env, env.noise, *((key, steps) for key in keys))
    actions = [strategies.env_actions(env.spec.action, (steps, env.num_envs), seed + i) for i in range(3)]
    _expect_obs(env, "the observation of init", states[0].obs)
    walk = []
    for t in range(steps):
        calls = [(s, a[t], tree.index(n, t)) for s, a, n in zip(states, actions, noises, strict=True)]
        steps_ = [env.step(*call) for call in calls]
        state, step = steps_[0]
        _expect_step(env, state, step)
        if t % 8 == 0 or bool((step.terminated | step.truncated).any()):
            laws.check_call(env, env.step, *calls[0])
            laws.check_lanes(env, env.step, *calls)
        walk.append((calls[0][0].obs, step.next_obs, step.reward, step.terminated, step.truncated, state.obs))
        states = [state for state, _ in steps_]
    laws.check_saved(env, "the state", states[0])
    return Trace(*(torch.stack(x) for x in zip(*walk, strict=True)))


# -- hosted ---------------------------------------------------------------------------------------------------------


def _check_hosted(env: Any, seed: int, steps: int) -> Trace:
    keys = torch.stack([random.key(seed + i) for i in range(2)])
    actions = torch.stack([strategies.env_actions(env.spec.action, (steps, env.num_envs), seed + i) for i in range(2)])
    middle = 1 + seed % (steps - 1)
    opened: list[Any] = []

    def walk(make: Any, x: Any, *chosen: Tensor) -> tuple[Trace, Any]:
        opened.append(make(x))
        return _walk(env, opened[-1], *chosen)

    try:
        with laws.global_seed(1):
            first, state = walk(env.init, keys[0], actions[0, :middle])
        stored = laws.check_gather(env, state)
        with laws.global_seed(2):
            rest, last = _walk(env, state, actions[0, middle:])
            again, _ = walk(env.init, keys[0], actions[0])
        whole = tree.concatenate([first, rest], 0)
        laws.same(env, laws.SAME, whole, again, "one walk", "another of the same key and actions")
        laws.refuses_stale(env, laws.STALE, lambda: env.step(state, actions[0, 0], ()))
        if getattr(env, "exact", True):
            replayed, end = walk(env.restore, stored, actions[0, middle:])
            laws.same(env, RESTORED, replayed, rest, "the restored simulator's walk", "the first's")
            laws.same(env, RESTORED, env.gather(end), env.gather(last), "the restored one's record", "the first's")
        lanes, _ = walk(env.init, keys, actions.transpose(0, 1))
        lane = tree.map(lambda x: x[:, 0].contiguous(), lanes)
        laws.same(env, laws.SOLO, lane, whole, "lane 0", "the walk alone")
    finally:
        for handle in opened:
            env.close(handle)
            env.close(handle)
    laws.refuses_stale(env, CLOSED, lambda: env.step(last, actions[0, 0], ()))
    return whole


def _walk(env: Any, state: Any, actions: Tensor) -> tuple[Trace, Any]:
    """Steps, with all that they gave copied at once: and nothing of it changes later."""
    held, copies = [], []
    for action in actions.unbind(0):
        obs = state.obs
        state, step = env.step(state, action, ())
        _expect_step(env, state, step, lead=tuple(obs.shape[: action.dim() - len(env.spec.action.shape)]))
        held.append((obs, step.next_obs, step.reward, step.terminated, step.truncated, state.obs))
        copies.append(tuple(x.clone() for x in held[-1]))
    laws.same(env, laws.PURE, tuple(held), tuple(copies), "what a step gave, read later,", "what it was")
    return Trace(*(torch.stack(x) for x in zip(*copies, strict=True))), state


# -- both -----------------------------------------------------------------------------------------------------------


def _expect_obs(env: Any, what: str, obs: Tensor, lead: tuple[int, ...] | None = None) -> None:
    space = env.spec.obs
    laws.expect(env, what, obs, (*(lead or (env.num_envs,)), *space.shape), space.stored)
    laws.finite(env, what, obs)
    if isinstance(space, Discrete) and bool(((obs < 0) | (obs >= space.n)).any()):
        laws.broken(env, laws.SHAPES, f"{what} is {obs.tolist()}, expected 0 to {space.n - 1}: fnrl counts from 0")


def _expect_step(env: Any, state: Any, step: Any, lead: tuple[int, ...] | None = None) -> None:
    lead = lead or (env.num_envs,)
    _expect_obs(env, "next_obs", step.next_obs, lead)
    _expect_obs(env, "the observation after a step", state.obs, lead)
    for name, dtype in (("reward", torch.float32), ("terminated", torch.bool), ("truncated", torch.bool)):
        laws.expect(env, name, getattr(step, name), lead, dtype)
    laws.finite(env, "reward", step.reward)


def _check_trace(env: Any, trace: Trace, random_resets: bool) -> None:
    done, wide = trace.done, trace.obs.dim() - 2
    going = ~done
    if not tree.same_bits(trace.next_obs[going], trace.after[going]):
        where = _first(going & _unequal(trace.next_obs, trace.after))
        laws.broken(
            env,
            FOLLOWS,
            f"at step {where[0]} of environment {where[1]} no episode ended, next_obs is "
            f"{trace.next_obs[where].tolist()}, and the state goes on from {trace.after[where].tolist()}",
        )
    ended = int(done.sum())
    if ended < 10:
        raise ValueError(
            f"check_environment: {ended} episodes ended in {len(done)} steps of {env.num_envs} environments, and the "
            f"laws of ends need 10: pass steps={math.ceil(len(done) * 15 / max(ended, 1) / 100) * 100} or more, or an "
            "environment with a shorter time limit"
        )
    varies = bool(_unequal(trace.obs, trace.obs[:1, :1].expand_as(trace.obs)).any())
    if varies and not bool((_unequal(trace.next_obs, trace.after) & done).any()):
        where = _first(done)
        laws.broken(
            env,
            SUCCESSOR,
            f"at all {ended} ends next_obs equals the observation after the reset, as at step "
            f"{where[0]} of environment {where[1]}: {trace.next_obs[where].tolist()}",
        )
    if random_resets:
        firsts = [torch.cat([trace.obs[:1, i], trace.after[done[:, i], i]]) for i in range(env.num_envs)]
        pooled = torch.cat(firsts).flatten(1) if wide else torch.cat(firsts)[:, None]
        distinct = len(torch.unique(pooled, dim=0))
        if distinct == 1:
            laws.broken(
                env,
                EPISODES,
                f"all {len(pooled)} episodes begin with {firsts[0][0].tolist()}; pass "
                f"random_resets=False if they should",
            )
        _check_apart(env, firsts, distinct, "episodes")


def _check_goals(env: Any, layout: Goal, trace: Trace) -> None:
    changed = _unequal(layout.desired(trace.obs), layout.desired(trace.next_obs))
    if bool(changed.any()):
        where = _first(changed)
        kept = [layout.desired(x)[where].tolist() for x in (trace.obs, trace.next_obs)]
        laws.broken(env, GOALS, f"at step {where[0]} of environment {where[1]} the goal {kept[0]} became {kept[1]}")
    if not hasattr(env, "judge"):
        return
    goals = layout.achieved(trace.next_obs), layout.desired(trace.next_obs)
    reward, terminated = laws.check_call(env, env.judge, *goals)
    judged = [("reward", reward, trace.reward, ~torch.isclose(reward, trace.reward, 1e-4, 1e-4))]
    if isinstance(terminated, Tensor):
        judged.append(("terminated", terminated, trace.terminated, terminated != trace.terminated))
    for name, found, given, wrong in judged:
        if bool(wrong.any()):
            where = _first(wrong)
            laws.broken(
                env,
                GOALS,
                f"at step {where[0]} of environment {where[1]} judge gives {name} {found[where].item()}, step gave "
                f"{given[where].item()}",
            )


def _check_keys(env: Any) -> None:
    """First observations under ten keys (three, for simulators): no two keys alike, no two environments alike."""
    states = []
    try:
        for seed in range(10 if env.pure else 3):
            states += [env.init(random.key(1000 + seed))]
        firsts = torch.stack([state.obs.clone() for state in states])
    finally:
        for state in states:
            env.close(state)
    if not bool(_unequal(firsts, firsts[:1].expand_as(firsts)).any()):
        laws.broken(env, laws.KEYS, f"{len(firsts)} keys give the same first observations, {firsts[0].tolist()}")
    pooled = firsts.flatten(0, 1).reshape(firsts.shape[0] * firsts.shape[1], -1)
    _check_apart(env, list(firsts.unbind(1)), len(torch.unique(pooled, dim=0)), "keys")


def _check_apart(env: Any, firsts: list[Tensor], distinct: int, what: str) -> None:
    """No two environments begin alike time after time."""
    for i in range(len(firsts)):
        for j in range(i):
            times = min(len(firsts[i]), len(firsts[j]))
            alike = torch.equal(firsts[i][:times], firsts[j][:times])
            if alike and float(max(distinct, 2)) ** times > _CHANCE:
                laws.broken(
                    env,
                    ENVIRONMENTS,
                    f"environments {j} and {i} begin alike in all {times} {what}, the first with "
                    f"{firsts[i][0].tolist()}",
                )


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where two stacks of observations differ, `[T, N]`."""
    return (a != b).flatten(2).any(-1) if a.dim() > 2 else a != b


def _first(mask: Tensor) -> tuple[int, int]:
    t, i = torch.nonzero(mask)[0].tolist()
    return t, i
