"""Vectors of hosted simulators: any gymnasium environment, seeded episode by episode and restored by replay.

Environment i of a vector has the key `fold_in(key, i)`; its episode e = 1, 2, ... begins with a reset whose seed is
`seed_of(fold_in(env_key, e))`. A fresh simulator is first reset with the seed of episode 0, and that episode is
discarded: a Bullet client's first episode differs from its later ones. So key, episode and the actions since its reset
bring a simulator back, in any process.
"""

import functools
import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnrl import random
from fnrl.component import component, option, setting
from fnrl.envs.base import Step
from fnrl.envs.goals import Judge
from fnrl.envs.simulator import Array, Make, open_environment, probe, shut
from fnrl.envs.vectors import InProcess, SimulatorError, Slots, Subprocesses, first_non_finite, non_finite
from fnrl.errors import CheckpointError, CompositionError, EnvironmentFault, NonFiniteError
from fnrl.record import host, record
from fnrl.spaces import Box, EnvSpec
from fnrl.token import Owner, Token

_BLOCK = 64  # episodes whose seeds are drawn at once
_draw_seeds = torch.func.vmap(lambda key, episode: random.bits(random.fold_in(key, episode)))


@record
class HostedState:
    """The observation to act on `[N, ...]` (`[S, N, ...]` with lanes), and the reference to the simulators."""

    obs: Tensor
    token: Token = host()


@record
class HostedRecord:
    """All that brings N simulators back; every shape has `[S]` in front with lanes."""

    obs: Tensor  # [N, ...]
    episodes: Tensor  # [N], the number of the running episode, from 1
    keys: Tensor  # [N, 2]
    actions: Tensor  # [N, L, ...], since the last reset
    lengths: Tensor  # [N], how many of them there are; zeros behind


class Simulators(Owner):
    """The n = N (or S * N) simulators behind a state, the episode each is in, and the actions since its reset."""

    def __init__(self, env: "GymVector", keys: Tensor, episodes: list[int]) -> None:
        action = env.spec.action
        self.env, self.keys, self.lead, self.episodes = env, keys, tuple(keys.shape[:-1]), episodes
        self.shape, self.flat = (*self.lead, *action.shape), (len(episodes), *action.shape)
        self.lanes = len(self.lead) > 1
        self.space, self.dtype = action, np.dtype(action.dtype if isinstance(action, Box) else np.int64)
        self.log: list[Array] = []  # actions [n, ...] of every step since the oldest running episode began
        self.begun = [0] * len(episodes)  # where in the log each episode began
        self.seeds: list[tuple[int, list[int]]] = [(-1, [])] * len(episodes)  # (block, the seeds of its episodes)
        self.slots = Slots(self.lead, env.spec.obs)
        made = env.make, env.spec, len(episodes)
        self.vector = Subprocesses(*made, env.deadline) if env.processes else InProcess(*made)
        self.finalizer = weakref.finalize(self, shut, self.vector, os.getpid())

    def begin(self) -> HostedState:
        """Opens every simulator, discards its first episode, and begins the one it should be in."""
        return HostedState(self._first(), self.token())

    def step(self, action: Tensor) -> tuple[HostedState, Step]:
        """One step of every simulator; those whose episode ended begin their next one.

        With lanes an action that is not finite becomes 0, and a simulator that gives a reward or an observation that is
        not begins a new episode (one whose first observation is not, too): the lanes beside it go on.
        """
        actions, out = self._actions(action), self.slots.take()
        with _Closing(self):
            ended = self.vector.step(actions.copy(), out)
            if self.lanes:  # who is not finite begins anew, and its lane is dead to the collector
                ended = sorted({*ended, *non_finite(out.arrays[1]), *non_finite(out.arrays[0])})
            else:
                self._refuse_non_finite("reward", out.arrays[1])
                self._refuse_non_finite("observation", out.arrays[0])
        first = out.tensors[0]
        if ended:
            first = first.clone()
            which = [e + 1 if i in ended else None for i, e in enumerate(self.episodes)]
            wrong = self._reset(which, first, forgive=self.lanes)
            out.arrays[1][wrong] = np.nan  # the collector reads it, as if the step had been
        token = self.advance()  # the old state is stale from here on, whatever interrupts
        self.log.append(actions)
        for i in ended:
            self._begin(i)
        if ended and min(self.begun) > 0:
            old = min(self.begun)
            del self.log[:old]
            self.begun = [b - old for b in self.begun]
        return HostedState(first, token), Step(*out.tensors)

    def gather(self, obs: Tensor) -> HostedRecord:
        """Episodes, keys and actions: it needs no simulator, so that the last state can be saved after a fault."""
        lengths = [len(self.log) - b for b in self.begun]
        padded = np.zeros((self.flat[0], max(lengths), *self.flat[1:]), self.dtype)
        for i, begun in enumerate(self.begun):
            for t, row in enumerate(self.log[begun:]):
                padded[i, t] = row[i]
        actions = torch.from_numpy(padded).reshape(*self.lead, *padded.shape[1:])
        episodes, steps = (torch.tensor(x, dtype=torch.int64).reshape(self.lead) for x in (self.episodes, lengths))
        return HostedRecord(obs.clone(), episodes, self.keys, actions, steps)

    def replay(self, pure: HostedRecord) -> HostedState:
        """Brings every simulator to where `pure` was, and checks that it got there; all end together."""
        lengths = pure.lengths.flatten().tolist()
        longest, n = max(lengths), len(lengths)
        padded = pure.actions.numpy(force=True).reshape(n, -1, *self.flat[1:])
        actions = np.zeros((longest, *self.flat), self.dtype)
        self.begun = [longest - length for length in lengths]
        for i, begun in enumerate(self.begun):
            actions[begun:, i] = padded[i, : lengths[i]]
        obs, lost = self._first(), set[int]()
        for t, rows in enumerate(actions):
            held = [rows[i].copy() if t >= self.begun[i] and i not in lost else None for i in range(n)]
            out = self.slots.take()
            with _Closing(self):
                lost.update(self.vector.step(held, out))
            obs = out.tensors[0]
            self.log.append(rows)
        rows, wanted = self._rows(obs), self._rows(pure.obs)
        lost.update(i for i in range(n) if rows[i].tobytes() != wanted[i].tobytes())
        if lost:
            self._restart(obs, sorted(lost))
        return HostedState(obs, self.token())

    def close(self) -> None:
        """Closes the simulators; safe to call twice."""
        super().close()
        self.finalizer()

    def _restart(self, obs: Tensor, lost: list[int]) -> None:
        names = "; ".join(map(self._where, lost))
        if self.env.exact:
            self.close()
            raise EnvironmentFault(
                f"the environment hides state past a reset: the same seed and actions did not lead to the recorded "
                f"observation in {names}. Reset that state in a wrapper, or accept it with gym(..., exact=False) "
                f"(fnrl resume --inexact): such an episode is then restarted"
            )
        warnings.warn(f"can't be restored exactly, so the episode was restarted: {names}", RuntimeWarning, stacklevel=4)
        self._reset([e + 1 if i in lost else None for i, e in enumerate(self.episodes)], obs)
        for i in lost:
            self._begin(i)

    def _begin(self, i: int) -> None:
        self.episodes[i] += 1
        self.begun[i] = len(self.log)

    def _first(self) -> Tensor:
        obs = torch.zeros(*self.lead, *self.env.spec.obs.shape, dtype=self.env.spec.obs.stored)
        self._reset([0] * len(self.episodes), obs)
        self._reset(self.episodes, obs)
        return obs

    def _reset(self, episodes: Sequence[int | None], obs: Tensor, forgive: bool = False) -> list[int]:
        """Begins the episodes that are given, and writes their first observations; `forgive` writes 0 for those that
        are not finite, and gives the environments.
        """
        rows = self._rows(obs)
        with _Closing(self, episodes):
            self.vector.reset(self._seeds_of(episodes), rows)
            wrong = non_finite(rows) if forgive else []
            rows[wrong] = 0
            self._refuse_non_finite("observation", rows, episodes)
        return wrong

    def _rows(self, obs: Tensor) -> Array:
        return obs.numpy(force=True).reshape(self.flat[0], *self.env.spec.obs.shape)

    def _seeds_of(self, episodes: Sequence[int | None]) -> list[int | None]:
        blocks = [None if e is None else e // _BLOCK for e in episodes]
        missing = [(i, b) for i, b in enumerate(blocks) if b is not None and self.seeds[i][0] != b]
        if missing:
            keys = self.keys.reshape(-1, 2)[[i for i, _ in missing]].repeat_interleave(_BLOCK, 0)
            numbers = torch.tensor([b * _BLOCK for _, b in missing])[:, None] + torch.arange(_BLOCK)
            drawn = (_draw_seeds(keys, numbers.flatten()) & 0x7FFFFFFF).reshape(-1, _BLOCK).tolist()
            for (i, b), row in zip(missing, drawn, strict=True):
                self.seeds[i] = (b, row)
        return [None if e is None else self.seeds[i][1][e % _BLOCK] for i, e in enumerate(episodes)]

    def _actions(self, action: Tensor) -> Array:
        if action.shape != self.shape:
            raise ValueError(f"{self.env.name} takes actions {list(self.shape)}, got {list(action.shape)}")
        plain = action.is_cpu and not action.requires_grad  # then a fifth of the cost
        actions = (action.numpy() if plain else action.numpy(force=True)).reshape(self.flat)
        i = first_non_finite(actions)
        if i is not None and not self.lanes:
            raise NonFiniteError(f"{self._where(i)}: the action is not finite: {actions[i]}; no simulator was stepped")
        actions = actions if i is None else np.nan_to_num(actions, posinf=0.0, neginf=0.0)
        return self.space.cast(actions) if isinstance(self.space, Box) else actions.astype(self.dtype)

    def _refuse_non_finite(self, what: str, x: Array, starting: Sequence[int | None] | None = None) -> None:
        i = first_non_finite(x)
        if i is not None:
            raise NonFiniteError(f"{self._where(i, starting)}: the {what} is not finite: {x[i]}")

    def _where(self, i: int, starting: Sequence[int | None] | None = None) -> str:
        n = self.env.num_envs
        lane = f"lane {i // n}, " if self.lanes else ""
        episodes = [e if j == i else None for j, e in enumerate(self.episodes if starting is None else starting)]
        when = f"step {len(self.log) - self.begun[i] + 1}" if starting is None else "reset"
        episode = f"episode {episodes[i]} (seed {self._seeds_of(episodes)[i]})"
        return f"{self.env.name}, {lane}environment {i % n}, {episode}, {when}"


class _Closing:
    """Closes the simulators when anything is raised inside, and says where. (A generator costs twice as much.)"""

    def __init__(self, owner: Simulators, starting: Sequence[int | None] | None = None) -> None:
        self.owner, self.starting = owner, starting

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.owner.close()
        if isinstance(error, SimulatorError):
            i, fault = min(error.faults.items())
            told = EnvironmentFault(f"{self.owner._where(i, self.starting)}: {fault.what}")
            told.lost = fault.lost or fault.error is not None
            raise told from fault.error


# -- the component --------------------------------------------------------------------------------------------------


@component
class GymVector:
    """N simulators of one gymnasium environment stepped as one vector (S * N with lanes). Made by `gym(...)`."""

    env: str | Callable[..., Any] = option(help="a registered id, or a module-level callable")
    spec: EnvSpec = option(help="its spaces, as the probe found them")
    num_envs: int = setting(default=1, help="environments stepped together")
    processes: bool = option(default=False, help="one process for each environment")
    wrappers: tuple[Callable[[Any], Any], ...] = option(default=(), help="callables env -> env, the innermost first")
    deadline: float = setting(default=60.0, low=1e-3, help="seconds that a call to a process may take")
    exact: bool = option(default=True, help="refuse an environment that ignores its seed or hides state past a reset")
    kwargs: tuple[tuple[str, Any], ...] = option(default=(), help="arguments of the environment")

    @property
    def pure(self) -> bool:
        """Not a function of tensors: the state refers to simulators."""
        return False

    @property
    def name(self) -> str:
        """The id, or the callable's name."""
        return self.spec.name

    @property
    def make(self) -> Make:
        """Opens one environment."""
        return functools.partial(open_environment, self.env, self.kwargs, self.wrappers)

    def noise(self, key: Tensor, steps: int) -> tuple[()]:
        """Nothing: simulators draw from their seeds."""
        return ()

    def init(self, key: Tensor) -> HostedState:
        """N simulators in their first episode for a key `[2]`; one vector of S * N for the keys `[S, 2]` of lanes."""
        lanes = [random.split(k, self.num_envs) for k in key.reshape(-1, 2)]
        keys = torch.stack(lanes) if key.dim() > 1 else lanes[0]
        return Simulators(self, keys.cpu(), [1] * (len(lanes) * self.num_envs)).begin()

    def step(self, state: HostedState, action: Tensor, noise: tuple[()] = ()) -> tuple[HostedState, Step]:
        """One step with actions `[N, ...]`. Where an episode ends, `next_obs` is its true end, and the next one begins.

        Errors: StaleStateError, EnvironmentFault, NonFiniteError; after the last two all simulators are closed.
        """
        return state.token.take().step(action)

    def gather(self, state: HostedState) -> HostedRecord:
        """The state as tensors; works on closed simulators too. Errors: StaleStateError when a later state exists."""
        if state.token.generation != state.token.owner.generation:
            state.token.take()
        return state.token.owner.gather(state.obs)  # type: ignore[attr-defined]

    def restore(self, pure: HostedRecord) -> HostedState:
        """Fresh simulators brought to a gathered state by replay.

        Errors: CheckpointError if it was gathered from another vector; EnvironmentFault if the replay leads elsewhere.
        """
        lead, spec = tuple(pure.keys.shape[:-1]), self.spec
        fits = lead[-1] == self.num_envs and pure.obs.shape == (*lead, *spec.obs.shape)
        if not (fits and pure.actions.shape[len(lead) + 1 :] == spec.action.shape):
            raise CheckpointError(
                f"{self.name} x {self.num_envs} ({spec.obs}, {spec.action}) can't be restored from observations "
                f"{list(pure.obs.shape)} and actions {list(pure.actions.shape)}"
            )
        return Simulators(self, pure.keys.cpu(), pure.episodes.flatten().tolist()).replay(pure)

    def restarted(self, pure: HostedRecord, state: HostedState) -> Tensor:
        """Where `[N]` the replay of `restore` led elsewhere, so that another episode was begun (with `exact=False`)."""
        owner: Any = state.token.owner
        return torch.tensor(owner.episodes).reshape(owner.lead) != pure.episodes.cpu()

    def close(self, state: HostedState) -> None:
        """Closes the simulators; safe to call twice."""
        state.token.owner.close()

    def judge(self, achieved: Tensor, desired: Tensor) -> tuple[Tensor, Tensor | tuple[()]]:
        """Rewards and terminations `[...]` of goals achieved `[..., G]` where others were desired, as the simulator's
        `compute_reward` and `compute_terminated` say; `()` without the latter.

        Errors: CompositionError without `compute_reward`; EnvironmentFault for one that does not say what `step` says.
        """
        return _judge(self)(achieved, desired)


@functools.lru_cache(maxsize=16)
def _judge(env: GymVector) -> Judge:
    """Opened once a process: it holds nothing that a run depends on."""
    return Judge(env.make, env.spec)


def gym(
    env: str | Callable[..., Any],
    num_envs: int = 1,
    processes: bool = False,
    wrappers: Sequence[Callable[[Any], Any]] = (),
    deadline: float = 60.0,
    exact: bool = True,
    **kwargs: Any,
) -> GymVector:
    """A vector of any gymnasium environment with Box and Discrete spaces; one is opened here, tried, and closed.

    `env` is a registered id (Bullet's are found too) or a module-level callable, `kwargs` are its arguments. With
    `processes` each simulator has a process, and `deadline` seconds for a call; without, one that hangs hangs the run.
    `exact=False` takes environments that replay can't restore: a restored run then begins their episodes anew.

    Errors: CompositionError for what can't be hosted, EnvironmentFault for one that raises or ignores its seed.
    """
    given = tuple(sorted(kwargs.items()))
    for what, x in (("env", env), *(("a wrapper", w) for w in wrappers), *kwargs.items()):
        _require_shippable(what, x)
    name = env if isinstance(env, str) else getattr(env, "__qualname__", type(env).__qualname__)
    make = functools.partial(open_environment, env, given, tuple(wrappers))
    return GymVector(env, probe(make, name, exact), num_envs, processes, tuple(wrappers), deadline, exact, given)


def _require_shippable(what: str, x: Any) -> None:
    """A component is a value: what it holds compares by value and pickles; functions and classes do so by name."""
    try:
        same = hash(x) == hash(pickle.loads(pickle.dumps(x)))
    except Exception as e:
        hint = "use a tuple for a list, a module-level function or class for a lambda"
        raise CompositionError(f"{what} = {x!r} must be hashable and picklable ({e}): {hint}") from e
    if not same:
        raise CompositionError(f"{what} = {x!r} does not compare by value: use a module-level function or class")
