"""One simulator behind a guard: what it raises, or returns against its own declaration, becomes a `Fault`."""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from torch import Tensor

from fnrl.errors import CompositionError, EnvironmentFault
from fnrl.spaces import Box, Discrete, EnvSpec, from_gymnasium, with_goals

Array = np.ndarray[Any, Any]
Make = Callable[[], Any]

_TRIAL = 16  # steps of an episode of a probe

# what no probe of reasonable length finds: measured over hundreds of replays, see docs/architecture.md
_INEXACT = {"HumanoidFlagrunHarderBulletEnv-v0", "PusherBulletEnv-v0", "ThrowerBulletEnv-v0"}
_ELSEWHERE = (
    ("bullet", "pybullet_envs_gymnasium", "pybullet"),
    ("panda", "panda_gym", "panda"),
    ("ale/", "ale_py", "atari"),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What went wrong in a simulator; `error` is what it raised, if it did; `lost` is that its process died or hung."""

    what: str
    error: Exception | None = None
    lost: bool = False


# -- opening --------------------------------------------------------------------------------------------------------


def open_environment(source: Any, kwargs: tuple[tuple[str, Any], ...], wrappers: tuple[Any, ...]) -> Any:
    """The gymnasium environment of an id or a callable, wrapped. `module:Name` imports the module: Name is an id that
    it registers, or a class or function in it.

    Errors: CompositionError for an unknown id (with the nearest names, or the extra to install).
    """
    if isinstance(source, str):
        source = _found(source)
    if isinstance(source, str):
        env = gymnasium.make(source, **{"disable_env_checker": True, **dict(kwargs)})
    else:
        env = source(**dict(kwargs))
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def _found(given: str) -> Any:
    """The registered id, or the callable, that a name means."""
    module, colon, name = given.rpartition(":")
    if colon:
        try:
            there = importlib.import_module(module)
        except ImportError as e:
            raise CompositionError(f"{given}: the module {module!r} can't be imported ({e})") from e
        if name not in gymnasium.registry:
            if callable(there.__dict__.get(name)):
                return there.__dict__[name]
            raise CompositionError(
                f"{given}: {module} registers no environment {name!r}, and has no class or function of that name"
            )
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as e:
        for word, module, extra in _ELSEWHERE:
            if word not in name.lower():
                continue
            try:
                importlib.import_module(module)
            except ImportError as missing:
                raise CompositionError(f'{name} needs {module} ({missing}): pip install "fnrl[{extra}]"') from missing
        if name not in gymnasium.registry:
            close = difflib.get_close_matches(name, gymnasium.registry, n=4, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ", and no registered name is near it"
            raise CompositionError(
                f"no environment {name!r} is registered{hint}; module:Name imports what registers or defines it"
            ) from e
    return name


def shut(simulators: Any, owner: int) -> None:
    """Closes them in the process that owns them: a forked child inherits a finalizer, but not the simulators."""
    if os.getpid() == owner:
        simulators.close()


def spec_of(env: Any, name: str) -> EnvSpec:
    """The spec of an open environment. Errors: CompositionError for anything else, and for spaces that don't fit."""
    if not isinstance(env, gymnasium.Env):
        raise CompositionError(f"{name} made a {type(env).__module__}.{type(env).__name__}, expected a gymnasium.Env")
    what = f"the observation of {name}"
    action = from_gymnasium(env.action_space, f"the action of {name}")
    obs, goal = with_goals(env.observation_space, what) or (from_gymnasium(env.observation_space, what), None)
    return EnvSpec(name, obs, action, goal)


def probe(make: Make, name: str, exact: bool) -> EnvSpec:
    """Opens one environment, tries it, closes it; gives its spec.

    If `exact`, the trial is two short episodes with one seed and the same actions, and another between them; the two
    must agree bit for bit. (A simulator's very first episode is discarded.)

    Errors: CompositionError for what can't be hosted, EnvironmentFault for one that raises, breaks its declaration or
    ignores its seed.
    """
    if exact and name in _INEXACT:
        raise EnvironmentFault(
            f"{name} is known to hide state past a reset, so no run can be resumed exactly: accept it with "
            "gym(..., exact=False) (fnrl train --no-env.exact); episodes that can't be brought back begin anew"
        )
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
        space, goal = self.declared.obs, self.declared.goal
        if goal is not None:
            try:
                obs = goal.join(obs, self.declared.name)
            except ValueError as e:
                raise EnvironmentFault(str(e)) from e
        found = np.asarray(obs)
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
