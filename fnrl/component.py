"""Components: frozen configurations with pure methods. The value is the factory: it prints, compares, pickles and
ships.

`hyper(...)` declares a number that algorithms read as a 0-d tensor from `weights.hyper`: it can be scheduled, swept
over lanes and set while running. `setting(...)` declares one that shapes the program (a count, a size) and is fixed.
Both carry their range and a line of help, so a value out of range or of another type, or a misspelt name, is refused
where it is written.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar, dataclass_transform, runtime_checkable

import torch

T = TypeVar("T")

_RANGE = "fnrl.range"

_MADE: set[type] = set()
COMPONENTS: dict[str, type] = {}  # by `module.qualname`: with a few plain values, what a printed configuration can name


@runtime_checkable
class Schedule(Protocol):
    """A value as a function of environment steps; evaluated between plans, never inside one."""

    def __call__(self, env_steps: int) -> float: ...

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value it takes, for range checks."""
        ...


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers a field accepts, with a line of help; `swept` ones live in `weights.hyper`."""

    low: float
    high: float
    open_low: bool
    open_high: bool
    swept: bool
    help: str

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def hyper(
    default: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    help: str,
) -> Any:
    """A numeric hyper-parameter: a float or a `Schedule`, in the range given."""
    return dataclasses.field(
        default=default, metadata={_RANGE: Range(low, high, open_low, open_high or high == math.inf, True, help)}
    )


def setting(
    *, default: Any = dataclasses.MISSING, low: float = 1, high: float = math.inf, open_high: bool = False, help: str
) -> Any:
    """A number that is part of the program's shape; the field's default decides whether it is an int or a float."""
    found = Range(low, high, False, open_high or high == math.inf, False, help)
    return dataclasses.field(default=default, metadata={_RANGE: found})


def option(*, default: Any = dataclasses.MISSING, help: str) -> Any:
    """Any other field, with a line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def help_of(field: "dataclasses.Field[Any]") -> str:
    """The line of help of a component's field; empty if it has none."""
    found = limits_of(field)
    return found.help if found else field.metadata.get("help", "")


def limits_of(field: "dataclasses.Field[Any]") -> Range | None:
    """The numbers a component's field accepts, if it was declared by `hyper` or `setting`."""
    return field.metadata.get(_RANGE)


_HERE = object()  # of this process: a hash that was unpickled in another one isn't it, and doesn't hold there


@dataclass_transform(frozen_default=True, field_specifiers=(hyper, setting, option, dataclasses.field))
def component(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, comparable dataclass whose construction checks names, types and ranges.

    Errors: TypeError for an unknown or badly typed argument (with the nearest name), ValueError for one out of range.
    """
    own_check = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        _check_fields(self)
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
    if "__repr__" not in cls.__dict__:
        made.__repr__ = _component_repr
    told = [f"    {f.name}: {about}" for f in dataclasses.fields(made) if f.init and (about := help_of(f))]
    if cls.__doc__ and told:
        made.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Args:", *told])
    names = tuple(f.name for f in dataclasses.fields(made) if f.init)
    plain_init = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{cls.__name__} has no parameter {name!r}{nearest(name, names)}")
        plain_init(self, *args, **kwargs)

    plain_hash = made.__hash__

    def __hash__(self: Any) -> int:  # asked for at every call of a compiled method
        kept = self.__dict__.get("_hash")
        if kept is None or kept[0] is not _HERE:
            kept = _HERE, plain_hash(self)
            object.__setattr__(self, "_hash", kept)
        return kept[1]

    made.__hash__ = __hash__
    __init__.__wrapped__ = plain_init  # type: ignore[attr-defined]
    made.__init__ = __init__
    COMPONENTS[f"{cls.__module__}.{cls.__qualname__}"] = made
    _MADE.add(made)
    return made


def _component_repr(self: Any) -> str:
    inside = ", ".join(f"{f.name}={_text(getattr(self, f.name))}" for f in dataclasses.fields(self))
    return f"{type(self).__qualname__}({inside})"


def _text(x: Any) -> str:
    """`repr`, but a function or a class by its name: its own text holds an address, another in every process."""
    if type(x) is tuple:
        return f"({', '.join(map(_text, x))}{',' if len(x) == 1 else ''})"
    return x.__name__ if callable(x) and hasattr(x, "__name__") else repr(x)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'lr'?`, or the list of what there is."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"


def _check_fields(self: Any) -> None:
    cls = type(self)
    for field in dataclasses.fields(self):
        limits, value, hint = limits_of(field), getattr(self, field.name), _hints(cls).get(field.name, Any)
        if limits is None:
            if not _fits(hint, value):
                raise TypeError(
                    f"{cls.__name__}.{field.name} = {_text(value)}: expected {_expected(hint, field, value)}"
                )
        elif not (value is None and "None" in str(field.type)):
            _check(cls.__name__, field.name, value, limits, field.default)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # names that only a type checker sees, or of a function's scope
        return {}


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a declared type; a class in place of a value of it is not."""
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_fits(h, value) for h in inside)
    if kind is collections.abc.Callable:
        return callable(value)
    if kind is type:
        return isinstance(value, type) and issubclass(value, inside[0])
    if kind is tuple:
        whole = inside[:1] * len(value) if isinstance(value, tuple) and inside[-1] is ... else inside
        return isinstance(value, tuple) and len(value) == len(whole) and all(map(_fits, whole, value))
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    try:
        return isinstance(value, kind or hint) and not isinstance(value, type)
    except TypeError:  # a type that nothing can be checked against, such as a literal or a plain protocol
        return True


def _expected(hint: Any, field: "dataclasses.Field[Any]", value: Any) -> str:
    """What fits a declared type, in words; and what was probably meant."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, torch.nn.Module) and any(getattr(m, "__name__", "") == "Network" for m in members):
        kind = type(value).__name__
        return f"a network as a value: fnrl.module({kind}, ...), the class and its keyword arguments"
    names = [c.__name__ for m in members for c in _components_of(m)]
    words = [f"{n}(...)" for n in names] or [_word(m) for m in members if m is not type(None)]
    text = " or ".join([*words, *(["None"] if type(None) in members else [])])
    if isinstance(value, type) and names:
        return f"a value such as {value.__name__ if value.__name__ in names else names[0]}(), not a class"
    close = [n for n in names if isinstance(value, str) and n.lower() == value.lower()]
    if close:
        return f"{text}; did you mean {close[0]}()?"
    example = not names and field.default not in (None, dataclasses.MISSING)
    return f"{text}, such as {_text(field.default)}" if example else text


def _components_of(kind: Any) -> list[type]:
    """fnrl's own components of a class, or with all methods of a protocol."""
    ours = [c for name, c in sorted(COMPONENTS.items()) if name.startswith("fnrl.") and ".testing." not in name]
    if getattr(kind, "_is_protocol", False):
        wanted = [n for n in vars(kind) if not n.startswith("_")]
        return [c for c in ours if all(hasattr(c, n) or n in c.__dataclass_fields__ for n in wanted)]  # type: ignore
    return [c for c in ours if isinstance(kind, type) and issubclass(c, kind)]


def _word(kind: Any) -> str:
    words: dict[Any, str] = {
        **{int: "an int", float: "a finite number", bool: "True or False", str: "a string"},
        **{collections.abc.Callable: "a function", tuple: "a tuple", type: "a class"},
    }
    return words.get(typing.get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _check(owner: str, name: str, value: Any, limits: Range, default: Any) -> None:
    if value is None and default is None:
        return
    if isinstance(value, PerLane) and limits.swept:
        for i, x in enumerate(value.values):
            _check(owner, f"{name} (lane {i})", x, limits, ...)
        return
    if isinstance(value, Schedule) and limits.swept and not isinstance(value, type):
        for end in value.ends():
            _check(owner, f"{name} (an end of its schedule)", end, limits, default)
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = isinstance(default, int) and not isinstance(default, bool) and not limits.swept
    if not number or (whole and not isinstance(value, int)):
        kind = "an int" if whole else "a float or a Schedule" if limits.swept else "a number"
        raise TypeError(f"{owner}.{name} must be {kind}, got {type(value).__name__} {value!r}")
    if not isinstance(value, int | float) or value not in limits:
        raise ValueError(f"{owner}.{name} = {value!r} is out of range: expected a value in {limits}")


def with_parts(components: Iterable[Any]) -> Iterator[Any]:
    """The components, and those that they hold in their fields."""
    for part in components:
        yield part
        held = (getattr(part, f.name) for f in dataclasses.fields(part))
        yield from with_parts(x for x in held if is_component(x))


def is_component(x: Any) -> bool:
    """Whether `x` is an instance of a class made by `component`."""
    return type(x) in _MADE


def hypers(*components: Any) -> dict[str, float | Schedule]:
    """The numeric hyper-parameters of some components, by name (those set to None are absent).

    Errors: ValueError when two components declare one name with different values.
    """
    found: dict[str, float | Schedule] = {}
    for part in with_parts(components):
        for field in dataclasses.fields(part):
            limits, value = field.metadata.get(_RANGE), getattr(part, field.name)
            if limits is None or not limits.swept or value is None:
                continue
            if found.get(field.name, value) != value:
                raise ValueError(f"{field.name} is {found[field.name]!r} in one part and {value!r} in {part!r}")
            found[field.name] = value
    return found


def check_hyper(name: str, value: Any, *components: Any) -> None:
    """Refuses a hyper-parameter that no component declares, or a value out of its range (TypeError, ValueError)."""
    declared = {f.name: (p, f) for p in with_parts(components) for f in dataclasses.fields(p) if name_is_swept(f)}
    if name not in declared:
        raise ValueError(f"no part has a hyper-parameter {name!r}{nearest(name, declared)}")
    part, field = declared[name]
    if getattr(part, name) is None:
        raise ValueError(f"{type(part).__name__}.{name} is None: it was switched off when the parts were composed")
    _check(type(part).__name__, name, value, field.metadata[_RANGE], field.default)


def name_is_swept(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field was declared by `hyper`."""
    limits = field.metadata.get(_RANGE)
    return limits is not None and limits.swept


def printed(config: Any) -> Any:
    """A configuration as plain JSON values: what a checkpoint's manifest and a diff of two schemes show."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: printed(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"": f"{type(config).__module__}.{type(config).__qualname__}", **fields}
    if isinstance(config, dict):
        return {str(k): printed(v) for k, v in config.items()}
    if isinstance(config, tuple | list):
        return [printed(v) for v in config]
    if isinstance(config, bool | int | str) or config is None:
        return config
    if isinstance(config, float):
        return config if math.isfinite(config) else str(config)
    name = getattr(config, "__qualname__", None) or getattr(config, "__name__", None)
    return f"{getattr(config, '__module__', None)}.{name}" if name else repr(config)


@component
class Linear:
    """A straight line from `start` to `end` over `steps` environment steps, then `end`."""

    start: float = option(help="value at step 0")
    end: float = option(help="value from `steps` on")
    steps: int = setting(default=1_000_000, help="environment steps it takes")

    def __call__(self, env_steps: int) -> float:
        return self.start + (self.end - self.start) * min(env_steps / self.steps, 1.0)

    def ends(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


@component
class PerLane:
    """A hyper-parameter's value, or schedule, in each lane of a program: what `fnrl.sweep` puts into the parts."""

    values: tuple[float | Schedule, ...] = option(help="one for each lane")

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:
            raise TypeError(f"PerLane.values must be a tuple with a value for each lane, got {self.values!r}")

    def __call__(self, env_steps: int) -> float:
        raise TypeError(f"{self!r} has a value for each lane: train it with a key per lane")

    def ends(self) -> tuple[float, float]:
        ends = [e for x in self.values for e in (x.ends() if isinstance(x, Schedule) else (x, x))]
        return min(ends), max(ends)
