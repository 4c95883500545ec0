"""Vectors of hosted simulators: any gymnasium environment, seeded episode by episode and restored by replay.

Environment i of a vector has the key `fold_in(key, i)`, and its episode e = 1, 2, ... begins with `reset(seed=seed_of(fold_in(env_key, e)))`.
A fresh simulator is first reset with the seed of episode 0, and that episode is discarded: a Bullet client's first episode differs from
its later ones. So (key, episode, actions since the reset) brings any simulator back, in another process too, by replay.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
import pickle
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import TimeoutError as WorkerTimeout
from multiprocessing import connection
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor

from fnrl import random
from fnrl.component import component, option, setting
from fnrl.envs.base import Step
from fnrl.errors import CheckpointError, CompositionError, EnvironmentFault, NonFiniteError
from fnrl.record import host, record
from fnrl.spaces import Box, Discrete, EnvSpec, from_gymnasium
from fnrl.token import Owner, Token

Array = np.ndarray[Any, Any]
Make = Callable[[], Any]

_SEEDS = 64  # episodes whose seeds are computed at once
_GRACE = 1.0  # seconds that workers get to close after one of them failed


@record
class HostedState:
    """The observation to act on `[N, ...]` (`[S, N, ...]` with lanes), and the reference to the simulators."""

    obs: Tensor
    token: Token = host()


@record
class HostedRecord:
    """All that brings N simulators back: `[N, ...]`, or `[S, N, ...]` with lanes."""

    obs: Tensor
    episodes: Tensor  # number of the running episode, from 1
    keys: Tensor  # [N, 2]
    actions: Tensor  # since the last reset, [N, L, ...], zeros behind `lengths`
    lengths: Tensor


# -- one simulator --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """What went wrong in a simulator; `error` is what it raised, if it did."""

    what: str
    error: Exception | None = None


class Simulator(gymnasium.Env[Any, Any]):
    """One environment, opened by its first reset: checks what it returns, and reports a `Fault` in `info` instead of raising.

    Observations come out as fnrl stores them (float32, uint8, or int64 counted from 0), rewards and flags as Python numbers.
    `step(None)` holds: it gives the last observation again.
    """

    def __init__(self, make: Make, spec: EnvSpec, portable: bool = False) -> None:
        self.make, self.declared, self.portable = make, spec, portable
        self.env: Any = None
        self.last: Any = 0
        obs = spec.obs
        self.array = (np.dtype(obs.dtype), obs.shape) if isinstance(obs, Box) else (np.dtype(np.int64), None)
        self.observation_space = _stored_space(spec)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.action.shape)  # tells the vector how to take rows, no more

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of the episode of this seed."""
        try:
            if self.env is None:
                self.env = self.make()
                _check_spaces(self.env, self.declared)
            found = self.env.reset(seed=seed)
            if not (isinstance(found, tuple) and len(found) == 2):
                raise EnvironmentFault(f"reset returned {type(found).__name__}, expected (obs, info)")
            self.last = self._obs(found[0])
        except Exception as e:
            return self._nothing(), {"fault": self._fault(e)}
        return self.last, {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step; the true successor, whether or not the episode ended."""
        if action is None:
            return self.last, 0.0, False, False, {}
        try:
            found = self.env.step(action)
            if len(found) != 5:
                raise EnvironmentFault(
                    f"step returned {len(found)} values, expected (obs, reward, terminated, truncated, info)"
                )
            obs, reward, terminated, truncated, _ = found
            if type(obs) is not np.ndarray or (obs.dtype, obs.shape) != self.array:
                obs = self._obs(obs)
            if type(reward) is not float:
                reward = float(_number(reward, "reward"))
            if type(terminated) is not bool or type(truncated) is not bool:
                terminated, truncated = (
                    bool(_number(x, n)) for x, n in ((terminated, "terminated"), (truncated, "truncated"))
                )
        except Exception as e:
            return self._nothing(), 0.0, False, False, {"fault": self._fault(e)}
        self.last = obs
        return obs, reward, terminated, truncated, {}

    def close(self) -> None:
        """Closes the environment if it is open."""
        env, self.env = self.env, None
        if env is not None:
            try:
                env.close()
            except Exception as e:
                warnings.warn(f"{self.declared.name} raised {type(e).__name__} on close: {e}", RuntimeWarning, stacklevel=2)

    def _obs(self, obs: Any) -> Any:
        space, found = self.declared.obs, np.asarray(obs)
        if isinstance(space, Discrete):
            inside = found.shape == () and found.dtype.kind in "iu" and 0 <= int(found) - space.start < space.n
            if not inside:
                last = space.start + space.n - 1
                raise EnvironmentFault(f"observation {obs!r}: the space declares the integers {space.start} to {last}")
            return int(found) - space.start
        if (found.dtype, found.shape) != self.array:
            raise EnvironmentFault(
                f"observation is {found.dtype}{list(found.shape)}, the space declares {space.dtype}{list(space.shape)}"
            )
        return found

    def _nothing(self) -> Any:
        return np.zeros(self.observation_space.shape or (), self.observation_space.dtype)

    def _fault(self, e: Exception) -> Fault:
        if isinstance(e, EnvironmentFault | CompositionError):
            return Fault(str(e))
        what = f"raised {type(e).__name__}: {e}"
        if self.portable:
            e.add_note("In the simulator's process:\n" + "".join(traceback.format_exception(e)))
            try:
                pickle.loads(pickle.dumps(e))
            except Exception:
                e = RuntimeError("\n".join([what, *e.__notes__]))
        return Fault(what, e)


def _stored_space(spec: EnvSpec) -> gymnasium.Space[Any]:
    obs = spec.obs
    if isinstance(obs, Discrete):
        return gymnasium.spaces.Discrete(obs.n)
    if obs.dtype == "uint8":
        return gymnasium.spaces.Box(0, 255, obs.shape, np.uint8)
    return gymnasium.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)


def _number(x: Any, what: str) -> Any:
    if isinstance(x, int | float | np.number | np.bool_):
        return x
    if isinstance(x, np.ndarray | Tensor) and x.shape in ((), (1,)):
        return x.item()
    raise EnvironmentFault(f"{what} is {type(x).__name__} {x!r}, expected a number")


def _check_spaces(env: Any, spec: EnvSpec) -> None:
    found = _spec_of(env, spec.name)
    if found != spec:
        raise EnvironmentFault(f"opened with other spaces than its probe: {found}, the probe had {spec}")


def _spec_of(env: Any, name: str) -> EnvSpec:
    if not isinstance(env, gymnasium.Env):
        raise CompositionError(f"{name} made {type(env).__module__}.{type(env).__name__}, expected a gymnasium.Env")
    obs = from_gymnasium(env.observation_space, f"the observation of {name}")
    return EnvSpec(name, obs, from_gymnasium(env.action_space, f"the action of {name}"))


# -- n of them, here or in processes --------------------------------------------------------------------------------

Stepped = tuple[Array, Array, Array, Array, dict[int, Fault]]


class InProcess:
    """Simulators stepped one after another. (gymnasium's SyncVectorEnv takes five times as long for itself.)"""

    def __init__(self, make: Make, spec: EnvSpec, n: int) -> None:
        self.simulators = [Simulator(make, spec) for _ in range(n)]
        space = _stored_space(spec)
        self.shape, self.dtype = (n, *(space.shape or ())), space.dtype

    def reset(self, seeds: Sequence[int | None]) -> tuple[Array, dict[int, Fault]]:
        """First observations `[n, ...]` where there is a seed, zeros elsewhere."""
        out = np.zeros(self.shape, self.dtype)
        for i, seed in enumerate(seeds):
            if seed is not None:
                out[i], info = self.simulators[i].reset(seed=seed)
                if info:
                    return out, {i: info["fault"]}
        return out, {}

    def step(self, actions: Iterable[Any]) -> Stepped:
        """Observations `[n, ...]`, rewards, terminated, truncated `[n]`."""
        out, rewards, ends, cuts = np.empty(self.shape, self.dtype), [], [], []
        for i, (simulator, action) in enumerate(zip(self.simulators, actions, strict=True)):
            out[i], reward, terminated, truncated, info = simulator.step(action)
            if info:
                return out, out, out, out, {i: info["fault"]}
            rewards.append(reward)
            ends.append(terminated)
            cuts.append(truncated)
        return out, np.array(rewards, np.float32), np.array(ends), np.array(cuts), {}

    def fail(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Closes every simulator."""
        for simulator in self.simulators:
            simulator.close()


class Subprocesses:
    """One process each: gymnasium's AsyncVectorEnv behind a guard.

    A worker that died, or that takes longer than `deadline` seconds for one call, is a `Fault`; `close` never waits for the dead.
    """

    def __init__(self, make: Make, spec: EnvSpec, n: int, deadline: float) -> None:
        self.deadline = self.grace = deadline
        make_one = functools.partial(Simulator, make, spec, portable=True)
        self.vector = AsyncVectorEnv([make_one] * n, copy=False, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, seeds: Sequence[int | None]) -> tuple[Array, dict[int, Fault]]:
        """First observations `[n, ...]` where there is a seed, the last ones elsewhere."""
        mask = np.array([s is not None for s in seeds])
        try:
            self.vector.reset_async(seed=list(seeds), options={"reset_mask": mask})
            obs, info = self.vector.reset_wait(timeout=self.deadline)
        except (EOFError, OSError, WorkerTimeout) as e:
            return np.zeros(0), self._lost(e)
        return np.array(obs), _faults(info)

    def step(self, actions: Iterable[Any]) -> Stepped:
        """Observations `[n, ...]`, rewards, terminated, truncated `[n]`."""
        try:
            self.vector.step_async(actions)
            obs, rewards, ends, cuts, info = self.vector.step_wait(timeout=self.deadline)
        except (EOFError, OSError, WorkerTimeout) as e:
            nothing = np.zeros(0)
            return nothing, nothing, nothing, nothing, self._lost(e)
        return np.array(obs), rewards.astype(np.float32), ends, cuts, _faults(info)

    def _lost(self, error: Exception) -> dict[int, Fault]:
        workers = self.vector.processes
        if isinstance(error, WorkerTimeout):
            late = [i for i, pipe in enumerate(self.vector.parent_pipes) if not pipe.poll(0)]
            return {i: Fault(f"its process did not answer within {self.deadline:g} s", error) for i in late}
        connection.wait([w.sentinel for w in workers], timeout=_GRACE)
        dead = {i: Fault(f"its process died (exit code {w.exitcode})", error) for i, w in enumerate(workers) if not w.is_alive()}
        return dead or {0: Fault("the pipe to a process broke", error)}

    def fail(self) -> None:
        """Shortens the time that workers get to close."""
        self.grace = _GRACE

    def close(self) -> None:
        """Asks the workers to close, and kills those that don't."""
        vector = self.vector
        if vector.closed:
            return
        vector.closed = True  # gymnasium's own close and __del__ would wait for the dead, without end
        pipes = [p for p in vector.parent_pipes if p is not None]
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        end = time.monotonic() + self.grace
        for worker in vector.processes:
            worker.join(max(0.0, end - time.monotonic()))
        for worker in vector.processes:
            if worker.is_alive():
                worker.kill()
            worker.join()
        for pipe in pipes:
            pipe.close()
        vector.error_queue.cancel_join_thread()
        vector.error_queue.close()


def _faults(info: dict[str, Any]) -> dict[int, Fault]:
    return {i: f for i, f in enumerate(info["fault"]) if f is not None} if "fault" in info else {}


def _shut(vector: InProcess | Subprocesses, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the finalizer, but not the simulators
        vector.close()


# -- the owner ------------------------------------------------------------------------------------------------------


class Simulators(Owner):
    """n = N (or S * N) simulators, the episode each is in, and the actions since its last reset."""

    def __init__(self, env: "GymVector", keys: Tensor, episodes: list[int]) -> None:
        self.env, self.lead, self.keys = env, tuple(keys.shape[:-1]), keys.detach().cpu()
        self.episodes = episodes
        n = len(episodes)
        self.flat_keys = self.keys.reshape(n, 2)
        self.seeds: list[tuple[int, list[int]]] = [(-1, [])] * n  # (block, its seeds)
        self.log: list[Array] = []  # actions [n, ...] of every step since the oldest running episode began
        self.begun = [0] * n  # where in the log each episode began
        self.dtype = np.dtype(env.spec.action.dtype) if isinstance(env.spec.action, Box) else np.dtype(np.int64)
        self.shape = (*self.lead, *env.spec.action.shape)
        self.flat = (n, *env.spec.action.shape)
        made = functools.partial(open_environment, env.env, env.kwargs, env.wrappers), env.spec, n
        self.vector = Subprocesses(*made, env.deadline) if env.processes else InProcess(*made)
        self.finalizer = weakref.finalize(self, _shut, self.vector, os.getpid())

    def start(self) -> Array:
        """Opens every simulator, discards its first episode, and begins the present one."""
        with self._closing():
            self._reset([0] * len(self.episodes))
            return self._reset(self.episodes)

    def step(self, action: Tensor) -> tuple[HostedState, Step]:
        """One step of every simulator; those whose episode ended begin their next one."""
        if action.shape != self.shape:
            raise ValueError(f"{self.env.spec.name}: actions have shape {list(action.shape)}, expected {list(self.shape)}")
        actions = action.numpy(force=True).reshape(self.flat).astype(self.dtype)
        if self.dtype.kind == "f" and not np.isfinite(actions).all():
            self._refuse_non_finite("action", actions)
        with self._closing():
            obs, reward, terminated, truncated, faults = self.vector.step(actions.copy())
            if faults:
                self._raise(faults, self.episodes, reset=False)
            if not (np.isfinite(obs).all() and np.isfinite(reward).all()):
                self._refuse_non_finite("reward", reward)
                self._refuse_non_finite("observation", obs)
            done = terminated | truncated
            first, ended = obs, np.flatnonzero(done).tolist()
            if ended:
                following = [e + 1 if d else None for e, d in zip(self.episodes, done.tolist(), strict=True)]
                first = obs.copy()
                first[ended] = self._reset(following)[ended]
        token = self.advance()  # from here on the old state is stale, whatever interrupts
        self.log.append(actions)
        for i in ended:
            self.episodes[i] += 1
            self.begun[i] = len(self.log)
        if ended and min(self.begun) > 0:
            self._forget(min(self.begun))
        flags = (self._tensor(reward), self._tensor(terminated), self._tensor(truncated))
        next_obs = self._tensor(obs)
        state = HostedState(self._tensor(first) if ended else next_obs, token)
        return state, Step(next_obs, *flags)

    def record(self, obs: Tensor) -> HostedRecord:
        """Episodes, keys and actions; needs no simulator, so that the last state can be saved after a fault."""
        lengths = [len(self.log) - b for b in self.begun]
        longest = max(lengths)
        actions = np.zeros((self.flat[0], longest, *self.flat[1:]), self.dtype)
        for i, n in enumerate(lengths):
            for t, row in enumerate(self.log[len(self.log) - n :]):
                actions[i, t] = row[i]
        tensors = (torch.tensor(x).reshape(self.lead) for x in (self.episodes, lengths))
        episodes, counts = tensors
        shaped = torch.from_numpy(actions).reshape(*self.lead, longest, *self.flat[1:])
        return HostedRecord(obs, episodes, self.keys, shaped, counts)

    def replay(self, pure: HostedRecord) -> HostedState:
        """Brings every simulator to where `pure` says, and checks that it got there."""
        n = len(self.episodes)
        actions = np.array(pure.actions.numpy(force=True)).reshape(n, -1, *self.flat[1:])
        lengths, expected = pure.lengths.reshape(n).tolist(), self._flat(pure.obs)
        obs = self.start()
        lost = [False] * n
        for t in range(max(lengths)):
            rows = [actions[i, t] if t < lengths[i] and not lost[i] else None for i in range(n)]
            with self._closing():
                obs, _, terminated, truncated, faults = self.vector.step(rows)
                if faults:
                    self._raise(faults, self.episodes, reset=False)
            self.log.append(actions[:, t])
            lost = [a or b for a, b in zip(lost, (terminated | truncated).tolist(), strict=True)]
        self.log = []
        return obs, lost, expected  # type: ignore[return-value]
