"""Every option of the parts by its dotted name (`algo.lr`, `actor.policy.hidden`), read from the components' fields.

A field whose type is a family of components (an optimiser, a network) is a choice by class name, and the chosen
class's own fields are options below it. So a new component, or a new field, is on the command line as it is written.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fnrl.actors import EpsilonGreedy, Gaussian, OffPolicyActorCritic, OnPolicyActorCritic, OrnsteinUhlenbeck
from fnrl.actors.exploration import Exploration
from fnrl.algos import A2C, DDPG, DQN, PPO, SAC, TD3
from fnrl.component import Linear, Schedule, help_of, limits_of
from fnrl.config import ACTIVATIONS
from fnrl.envs import BitFlipping, CartPole, GymVector, gym
from fnrl.networks import CNN, GRU, MLP, Network
from fnrl.optim import SGD, Adam, Optimiser, RMSProp
from fnrl.parts import NormaliseObs, Parts, ScaleReward
from fnrl.storages import (
    GAE,
    EpisodeGoals,
    FinalGoals,
    Frames,
    FutureGoals,
    Hindsight,
    Prioritised,
    Replay,
    Returns,
    VTrace,
)
from fnrl.storages.hindsight import Goals

Values = Mapping[str, Any]

_FAMILIES: dict[Any, tuple[type, ...]] = {
    Network: (MLP, CNN),
    Optimiser: (Adam, RMSProp, SGD),
    Exploration: (Gaussian, OrnsteinUhlenbeck, EpsilonGreedy),
    GRU: (GRU,),
    Prioritised: (Prioritised,),
    Frames: (Frames,),
    Hindsight: (Hindsight,),
    Goals: (FutureGoals, FinalGoals, EpisodeGoals),
    NormaliseObs: (NormaliseObs,),
    ScaleReward: (ScaleReward,),
}
_PARTS: dict[str, tuple[Any, ...]] = {
    "algo": (PPO, A2C, SAC, TD3, DDPG, DQN),
    "storage": (GAE, Returns, VTrace, Replay),
    "actor": (OnPolicyActorCritic, OffPolicyActorCritic),
}
_PURE = {c.__name__: c for c in (CartPole, BitFlipping)}
_ELSEWHERE = {"spec", "env", "wrappers"}  # found from the environment, or not to be said on a command line
_RENAMED = {"env.num_envs": "num_envs"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its name, a default, help, how one word of it is read (None: a switch), and how many words it has."""

    name: str
    default: Any
    help: str
    read: Callable[[str], Any] | None
    many: bool = False
    choices: tuple[str, ...] = ()
    metavar: str = "X"


@dataclasses.dataclass(frozen=True)
class _Ask:
    """What options depend on: defaults by name, the classes that are chosen, the steps of the run."""

    defaults: Values
    chosen: Values
    steps: int


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A field that takes one of some components, or none of them."""

    classes: tuple[type, ...]
    empty: bool

    def chosen(self, name: str, default: Any, values: Values) -> type | None:
        """The class named in `values`, else that of the default. Errors: ValueError for a name that isn't offered."""
        said = values.get(name)
        if said is None or said is True:
            if default is None or default is dataclasses.MISSING:
                return self.classes[0] if said or not self.empty else None
            return type(default)
        if (said is False or said == "none") and self.empty:
            return None
        for cls in self.classes:
            if cls.__name__ == said:
                return cls
        raise ValueError(f"{name} = {said!r}: expected one of {', '.join(self.names())}")

    def names(self) -> tuple[str, ...]:
        return (*(c.__name__ for c in self.classes), *(("none",) if self.empty else ()))


def env_class(env: str) -> type:
    """A pure environment by its name; any other name is a gymnasium id."""
    return _PURE.get(env, GymVector)


def options(env: str, defaults: Values, chosen: Values, steps: int) -> Iterator[Option]:
    """The options for an environment and the classes that are `chosen`; a schedule `a:b` runs over `steps`."""
    ask = _Ask(defaults, {**defaults, **chosen}, steps)
    yield from _fields("env", env_class(env), None, ask)
    yield from _fields("", Parts, None, ask)


def build(env: str, values: Values) -> Parts:
    """The parts that some values describe. Errors: CompositionError, and ValueError or TypeError for a bad value."""
    if env in _PURE:
        vector: Any = _make("env", _PURE[env], None, values, {})
    else:
        given = {f.name: values[_name("env", f.name)] for f in _own(GymVector) if _name("env", f.name) in values}
        kwargs = dict(given.pop("kwargs", ()))
        vector = gym(env, **given, **kwargs)
    algo: Any = _Slot(_PARTS["algo"], False).chosen("algo", None, values)
    algo.check_actions(vector.spec)  # before the actor, whose own refusal would not name the algorithm
    slot = _Slot(_fitting("actor", values), False)
    actor = _make("actor", slot.chosen("actor", None, values) or slot.classes[0], None, values, {"spec": vector.spec})
    return _make("", Parts, None, values, {"env": vector, "actor": actor})


def _name(prefix: str, field: str) -> str:
    name = f"{prefix}.{field}" if prefix else field
    return _RENAMED.get(name, name)


def _own(cls: type) -> Iterator[Any]:
    return (f for f in dataclasses.fields(cls) if f.init and f.name not in _ELSEWHERE)


def _default(field: Any, base: Any) -> Any:
    if base is not None:
        return getattr(base, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _fitting(part: str, values: Values) -> tuple[Any, ...]:
    """The classes of a part that fit the algorithm that was chosen."""
    if part == "algo":
        return _PARTS[part]
    algo = _Slot(_PARTS["algo"], False).chosen("algo", None, values)
    return tuple(c for c in _PARTS[part] if c.family == algo.family)  # type: ignore[union-attr]


def _slot(cls: type, field: Any, values: Values) -> _Slot | None:
    if cls is Parts and field.name in _PARTS:
        return _Slot(_fitting(field.name, values), False)
    members = _members(cls, field)
    found = [c for m in members for c in _FAMILIES.get(m, ())]
    return _Slot(tuple(found), type(None) in members) if found else None


def _members(cls: type, field: Any) -> tuple[Any, ...]:
    hint = typing.get_type_hints(cls)[field.name]
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fields(prefix: str, cls: type, base: Any, ask: _Ask) -> Iterator[Option]:
    for field in _own(cls):
        name, slot, default = _name(prefix, field.name), _slot(cls, field, ask.chosen), _default(field, base)
        if slot is None:
            option = _option(name, cls, field, ask.defaults.get(name, default), ask.steps)
            if option is not None:
                yield option
            continue
        chosen = slot.chosen(name, default, ask.chosen)
        if slot.empty and len(slot.classes) == 1:
            yield Option(name, chosen is not None, help_of(field), None)
        elif len(slot.classes) > 1:
            yield Option(name, chosen.__name__ if chosen else "none", help_of(field), str, choices=slot.names())
        if chosen is not None:
            yield from _fields(name, chosen, default if type(default) is chosen else None, ask)


def _make(prefix: str, cls: type, base: Any, values: Values, given: Values) -> Any:
    made = dict(given)
    for field in _own(cls):
        name, slot, default = _name(prefix, field.name), _slot(cls, field, values), _default(field, base)
        if field.name in made:
            continue
        if slot is None:
            said = values.get(name, default)
            said = ACTIVATIONS[said] if callable(field.default) and isinstance(said, str) else said
            made[field.name] = tuple(said) if isinstance(said, list) else said
            continue
        chosen = slot.chosen(name, default, values)
        below = default if type(default) is chosen else None
        made[field.name] = None if chosen is None else _make(name, chosen, below, values, {})
    return cls(**made)


def _option(name: str, cls: type, field: Any, default: Any, steps: int) -> Option | None:
    members, limits = _members(cls, field), limits_of(field)
    help = help_of(field) + (f", in {limits}" if limits and (limits.low, limits.high) != (1, math.inf) else "")
    if bool in members:
        return Option(name, default, help, None)
    read: Callable[[str], Any] | None = None
    many, choices, metavar = False, (), "X"
    if limits is not None and limits.swept:
        read, metavar = _scheduled(steps), "X[:END]"
    elif int in members:
        read = whole_number
    elif float in members:
        read = float
    elif tuple[int, ...] in members:
        read, many = whole_number, True
    elif name == "env.kwargs":
        read, many = pair, True
    elif callable(field.default):
        read, choices = str, tuple(ACTIVATIONS)
        default = next((n for n, f in ACTIVATIONS.items() if f is default), default)
    if read is None:
        return None
    if type(None) in members:
        read, help = _or_none(read), f"{help}, or none"
    return Option(name, default, help, read, many, choices, metavar)


def _scheduled(steps: int) -> Callable[[str], float | Schedule]:
    def number(text: str) -> float | Schedule:
        start, *rest = text.split(":")
        if not rest:
            return float(start)
        end, *over = rest
        return Linear(start=float(start), end=float(end), steps=int(float(over[0])) if over else steps)

    return number


def whole_number(text: str) -> int:
    """A whole number, also as 1e6."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(text) if text.lstrip("-").isdigit() else int(number)


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        return None if text == "none" else read(text)

    return number


def pair(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON if it is."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected name=value, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
