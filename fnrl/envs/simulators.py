"""One simulator behind a guard, and n of them stepped together: in this process, or in one process each.

What an environment raises, or returns against its own declaration, becomes a `Fault`; vectors raise `SimulatorError`.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import math
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import TimeoutError as WorkerTimeout
from multiprocessing import connection
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import Tensor

from fnrl.errors import CompositionError, EnvironmentFault
from fnrl.spaces import Box, Discrete, EnvSpec, from_gymnasium

Array = np.ndarray[Any, Any]
Make = Callable[[], Any]

_TRIAL = 16  # steps of an episode of a probe
_GRACE = 1.0  # seconds that workers get to close after one of them hung or died


@dataclasses.dataclass(frozen=True)
class Fault:
    """What went wrong in a simulator; `error` is what it raised, if it did."""

    what: str
    error: Exception | None = None


class SimulatorError(Exception):
    """Faults by environment index."""

    def __init__(self, faults: dict[int, Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


# -- opening --------------------------------------------------------------------------------------------------------


def open_environment(source: Any, kwargs: tuple[tuple[str, Any], ...], wrappers: tuple[Any, ...]) -> Any:
    """The gymnasium environment of an id or a callable, wrapped.

    Errors: CompositionError for an unknown id (with the nearest names, or the extra to install).
    """
    if isinstance(source, str):
        _require_registered(source)
        env = gymnasium.make(source, **{"disable_env_checker": True, **dict(kwargs)})
    else:
        env = source(**dict(kwargs))
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def _require_registered(name: str) -> None:
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as e:
        if "bullet" in name.lower():
            try:
                importlib.import_module("pybullet_envs_gymnasium")
            except ImportError as missing:
                raise CompositionError(f'{name} needs PyBullet ({missing}): pip install "fnrl[pybullet]"') from missing
        if name not in gymnasium.registry:
            close = difflib.get_close_matches(name, gymnasium.registry, n=4, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ", and no registered name is near it"
            raise CompositionError(f"no environment {name!r} is registered{hint}") from e


def spec_of(env: Any, name: str) -> EnvSpec:
    """The spec of an open environment. Errors: CompositionError for anything else, and for spaces that don't fit."""
    if not isinstance(env, gymnasium.Env):
        raise CompositionError(f"{name} made a {type(env).__module__}.{type(env).__name__}, expected a gymnasium.Env")
    obs = from_gymnasium(env.observation_space, f"the observation of {name}")
    return EnvSpec(name, obs, from_gymnasium(env.action_space, f"the action of {name}"))


def probe(make: Make, name: str, exact: bool) -> EnvSpec:
    """Opens one environment, tries it, closes it; gives its spec.

    If `exact`, the trial is two short episodes with one seed and the same actions, and another between them; the two
    must agree bit for bit. (A simulator's very first episode is discarded.)

    Errors: CompositionError for what can't be hosted, EnvironmentFault for one that raises, breaks its declaration or
    ignores its seed.
    """
    try:
        env = make()
    except CompositionError:
        raise
    except Exception as e:
        raise EnvironmentFault(f"{name} can't be opened: it raised {type(e).__name__}: {e}") from e
    try:
        spec = spec_of(env, name)
        space = copy.deepcopy(env.action_space)
        space.seed(0)
        actions = [space.sample() for _ in range(_TRIAL)]
        simulator = Simulator(make, spec, env)
        episodes = [_trial(simulator, seed, actions if seed else []) for seed in ((0, 1, 2, 1) if exact else (0,))]
    finally:
        with contextlib.suppress(Exception):
            env.close()
    if exact and episodes[1] != episodes[3]:
        pairs = zip(episodes[1], episodes[3], strict=False)
        t = next((t for t, (a, b) in enumerate(pairs) if a != b), min(len(episodes[1]), len(episodes[3])))
        raise EnvironmentFault(
            f"{name} ignores its seed, or hides state past a reset: two episodes with seed 1 and the same actions "
            f"differ at {f'step {t}' if t else 'the reset'}, so no run can be resumed exactly. Draw randomness from "
            f"self.np_random and clear everything in reset(seed=...), or accept it with gym(..., exact=False)"
        )
    return spec


def _trial(simulator: "Simulator", seed: int, actions: Sequence[Any]) -> list[Any]:
    """What an episode showed, step by step."""
    obs, info = simulator.reset(seed=seed)
    shown: list[Any] = [np.array(obs).tobytes()]
    flags: tuple[bool, ...] = ()
    for action in actions:
        if info or any(flags):
            break
        obs, reward, *flags, info = simulator.step(action.copy())  # type: ignore[assignment]
        shown.append((np.array(obs).tobytes(), np.float64(reward).tobytes(), *flags))
    if info:
        fault: Fault = info["fault"]
        when = f"step {len(shown) - 1}" if len(shown) > 1 else "reset"
        where = f"{simulator.declared.name}, probe, seed {seed}, {when}"
        raise EnvironmentFault(f"{where}: {fault.what}") from fault.error
    return shown


# -- one simulator --------------------------------------------------------------------------------------------------


class Simulator(gymnasium.Env[Any, Any]):
    """One environment, opened by its first reset; checks what it returns. What goes wrong is a `Fault` in `info`.

    Observations come out as declared, integers counted from 0; rewards and flags as Python numbers.
    """

    def __init__(self, make: Make, spec: EnvSpec, env: Any = None, portable: bool = False) -> None:
        self.make, self.declared, self.portable = make, spec, portable
        self.env: Any = env
        self.last: Any = 0
        self.dtype = np.dtype(spec.obs.dtype) if isinstance(spec.obs, Box) else None
        self.shape = spec.obs.shape
        self.observation_space = stored_space(spec)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.action.shape)  # a vector only takes rows by it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of the episode of this seed."""
        try:
            if self.env is None:
                self.env = self.make()
                found = spec_of(self.env, self.declared.name)
                if found != self.declared:
                    raise EnvironmentFault(f"opened with {found}, its probe had {self.declared}")
            out = self.env.reset(seed=seed)
            if not (isinstance(out, tuple) and len(out) == 2):
                raise EnvironmentFault(f"reset returned a {type(out).__name__}, expected (obs, info)")
            self.last = self._checked(out[0])
        except Exception as e:
            return self._nothing(), {"fault": self._fault(e)}
        return self.last, {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step and its true successor; with None, nothing but the last observation again."""
        if action is None:
            return self.last, 0.0, False, False, {}
        try:
            out = self.env.step(action)
            if len(out) != 5:
                expected = "(obs, reward, terminated, truncated, info)"
                raise EnvironmentFault(f"step returned {len(out)} values, expected {expected}")
            obs, reward, terminated, truncated, _ = out
            if type(obs) is not np.ndarray or obs.dtype != self.dtype or obs.shape != self.shape:
                obs = self._checked(obs)
            if type(reward) is not float:
                reward = float(_number(reward, "the reward"))
            if type(terminated) is not bool:
                terminated = bool(_number(terminated, "terminated"))
            if type(truncated) is not bool:
                truncated = bool(_number(truncated, "truncated"))
        except Exception as e:
            return self._nothing(), 0.0, False, False, {"fault": self._fault(e)}
        self.last = obs
        return obs, reward, terminated, truncated, {}

    def close(self) -> None:
        """Closes the environment, if it is open."""
        env, self.env = self.env, None
        if env is not None:
            try:
                env.close()
            except Exception as e:
                text = f"{self.declared.name} raised {type(e).__name__} when it was closed: {e}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _checked(self, obs: Any) -> Any:
        space, found = self.declared.obs, np.asarray(obs)
        if isinstance(space, Box):
            if found.dtype == self.dtype and found.shape == self.shape:
                return found
            got, declared = f"{found.dtype}{list(found.shape)}", f"{space.dtype}{list(space.shape)}"
        else:
            if found.dtype.kind in "iu" and found.shape == () and 0 <= int(found) - space.start < space.n:
                return int(found) - space.start
            got, declared = repr(obs), f"the integers {space.start} to {space.start + space.n - 1}"
        raise EnvironmentFault(f"the observation is {got}, its space declares {declared}")

    def _nothing(self) -> Any:
        return np.zeros(self.shape, self.observation_space.dtype)

    def _fault(self, e: Exception) -> Fault:
        if isinstance(e, EnvironmentFault | CompositionError):
            return Fault(str(e))
        what = f"it raised {type(e).__name__}: {e}"
        if self.portable:
            text = "in the simulator's process:\n" + "".join(traceback.format_exception(e))
            e.add_note(text)
            try:
                pickle.loads(pickle.dumps(e))
            except Exception:
                e = RuntimeError(text)
        return Fault(what, e)


def stored_space(spec: EnvSpec) -> gymnasium.Space[Any]:
    """The gymnasium space of an observation as fnrl stores it."""
    obs = spec.obs
    if isinstance(obs, Discrete):
        return gymnasium.spaces.Discrete(obs.n)
    low, high, dtype = (0, 255, np.uint8) if obs.dtype == "uint8" else (-np.inf, np.inf, np.float32)
    return gymnasium.spaces.Box(low, high, obs.shape, dtype)  # type: ignore[arg-type]


def _number(x: Any, what: str) -> Any:
    if isinstance(x, bool | int | float | np.number | np.bool_):
        return x
    if isinstance(x, np.ndarray | Tensor) and tuple(x.shape) in ((), (1,)):
        return x.item()
    raise EnvironmentFault(f"{what} is {type(x).__name__} {x!r}, expected a number")


def first_non_finite(x: Array) -> int | None:
    """The first row of `[n, ...]` with a NaN or an infinity, if there is one."""
    if x.dtype.kind != "f" or math.isfinite(np.add.reduce(x, axis=None)):  # a third of the cost of isfinite(x).all()
        return None
    rows = np.nonzero(~np.isfinite(x))[0]
    return int(rows[0]) if rows.size else None


# -- n of them ------------------------------------------------------------------------------------------------------


class InProcess:
    """n simulators stepped one after another: what gymnasium's SyncVectorEnv does, at a fraction of its overhead."""

    def __init__(self, make: Make, spec: EnvSpec, n: int) -> None:
        self.simulators = [Simulator(make, spec) for _ in range(n)]
        space = stored_space(spec)
        self.shape, self.dtype = (n, *spec.obs.shape), space.dtype

    def reset(self, seeds: Sequence[int | None]) -> Array:
        """First observations `[n, ...]`, of those that have a seed. Errors: SimulatorError."""
        obs = np.zeros(self.shape, self.dtype)
        for i, seed in enumerate(seeds):
            if seed is not None:
                obs[i], info = self.simulators[i].reset(seed=seed)
                if info:
                    raise SimulatorError({i: info["fault"]})
        return obs

    def step(self, actions: Iterable[Any]) -> tuple[Array, Array, Array, Array]:
        """Observations `[n, ...]`, rewards, ends, cuts `[n]`; None for an action holds. Errors: SimulatorError."""
        n = len(self.simulators)
        obs, rewards = np.empty(self.shape, self.dtype), np.empty(n, np.float32)
        terminated, truncated = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        for i, (simulator, action) in enumerate(zip(self.simulators, actions, strict=True)):
            obs[i], rewards[i], end, cut, info = simulator.step(action)
            if info:
                raise SimulatorError({i: info["fault"]})
            if end:
                terminated[i] = True
            if cut:
                truncated[i] = True
        return obs, rewards, terminated, truncated

    def close(self) -> None:
        """Closes every simulator."""
        for simulator in self.simulators:
            simulator.close()


class Subprocesses:
    """n simulators in a process each: gymnasium's AsyncVectorEnv, guarded.

    A worker that died, or took more than `deadline` seconds for a call, is a fault; closing waits for neither.
    """

    def __init__(self, make: Make, spec: EnvSpec, n: int, deadline: float) -> None:
        self.deadline = self.grace = deadline
        one = functools.partial(Simulator, make, spec, portable=True)
        self.vector = AsyncVectorEnv([one] * n, copy=False, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, seeds: Sequence[int | None]) -> Array:
        """As in one process."""
        mask = np.array([seed is not None for seed in seeds])
        with self._watched():
            self.vector.reset_async(seed=list(seeds), options={"reset_mask": mask})
            obs, info = self.vector.reset_wait(timeout=self.deadline)
        self._refuse(info)
        return np.array(obs)

    def step(self, actions: Iterable[Any]) -> tuple[Array, Array, Array, Array]:
        """As in one process."""
        with self._watched():
            self.vector.step_async(actions)
            obs, rewards, terminated, truncated, info = self.vector.step_wait(timeout=self.deadline)
        self._refuse(info)
        return np.array(obs), rewards.astype(np.float32), terminated, truncated

    def _refuse(self, info: dict[str, Any]) -> None:
        if info:
            raise SimulatorError({i: f for i, f in enumerate(info["fault"]) if f is not None})

    @contextlib.contextmanager
    def _watched(self) -> Any:
        try:
            yield
        except (EOFError, OSError, WorkerTimeout) as e:
            self.grace = _GRACE
            raise SimulatorError(self._lost(e) or {0: Fault(f"the pipe to its process broke: {e!r}", e)}) from e

    def _lost(self, error: Exception) -> dict[int, Fault]:
        workers = self.vector.processes
        if isinstance(error, WorkerTimeout):
            late = [i for i, pipe in enumerate(self.vector.parent_pipes) if not pipe.poll(0)]
            return {i: Fault(f"its process gave no answer within {self.deadline:g} s", error) for i in late}
        gone = connection.wait([w.sentinel for w in workers], timeout=_GRACE)
        dead = {i: w for i, w in enumerate(workers) if w.sentinel in gone}
        for worker in dead.values():
            worker.join(_GRACE)  # its pipes close a moment before it can be waited for
        return {i: Fault(f"its process died (exit code {w.exitcode})", error) for i, w in dead.items()}

    def close(self) -> None:
        """Asks every worker to close, and kills those that don't within the deadline (1 s once one hung or died)."""
        vector = self.vector
        if vector.closed:
            return
        vector.closed = True  # gymnasium's own close and __del__ would wait for a dead worker without end
        pipes = [p for p in vector.parent_pipes if p is not None]
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        end = time.monotonic() + self.grace
        for worker in vector.processes:
            worker.join(max(0.0, end - time.monotonic()))
        for worker in vector.processes:
            worker.kill()
            worker.join()
            worker.close()
        for pipe in pipes:
            pipe.close()
        vector.error_queue.cancel_join_thread()
        vector.error_queue.close()
