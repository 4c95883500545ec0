"""Sweeps: numeric hyper-parameters that differ from lane to lane, as a grid or drawn at random, in one program."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fnrl import lanes, random
from fnrl.component import PerLane, Schedule, is_component, name_is_swept, with_parts
from fnrl.errors import CompositionError
from fnrl.scheme import Scheme

T = TypeVar("T")
Value = float | Schedule


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Draws between `low` and `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"{self!r}: expected finite low < high")

    def at(self, u: float) -> float:
        """The draw of a uniform number in [0, 1)."""
        return self.low + (self.high - self.low) * u


@dataclasses.dataclass(frozen=True)
class LogUniform(Uniform):
    """Draws between `low` and `high`, uniform in the logarithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0.0:
            raise ValueError(f"{self!r}: expected low > 0")

    def at(self, u: float) -> float:
        """`low (high / low)^u`."""
        return self.low * (self.high / self.low) ** u


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A scheme whose parts differ from lane to lane, and the seed of each lane; lanes of one setting are neighbours."""

    scheme: Scheme
    seeds: tuple[int, ...]
    settings: tuple[tuple[tuple[str, Value], ...], ...]  # of each lane

    @property
    def keys(self) -> Tensor:
        """The key of each lane `[S, 2]`, for `scheme.init`."""
        return torch.stack([random.key(s) for s in self.seeds])

    def __len__(self) -> int:
        return len(self.seeds)


def sweep(
    scheme: Scheme,
    *,
    seeds: int | Sequence[int] | Tensor = 1,
    samples: int | None = None,
    key: Tensor | None = None,
    **values: Sequence[Value] | Tensor | Uniform,
) -> Sweep:
    """Every combination of the values given for some hyper-parameters, each with every seed, as lanes of one program.

    With `samples`, so many settings are drawn instead (by `key`, or that of seed 0): a `Uniform` or `LogUniform` by its
    range, a sequence by choice. A value may be a schedule.

        fnrl.sweep(scheme, lr=[1e-4, 3e-4], gamma=[0.99, 0.999], seeds=4)                    # 16 lanes
        fnrl.sweep(scheme, lr=fnrl.LogUniform(1e-5, 1e-2), clip=[0.1, 0.2], samples=16)      # 16 lanes

    Errors: CompositionError for a field that shapes the program (it needs programs of its own), ValueError or TypeError
    for an unknown name, a value out of range, or nothing to sweep.
    """
    which = lanes.named(seeds)
    if not values:
        raise ValueError("sweep: name at least one hyper-parameter, such as lr=[1e-4, 3e-4]")
    for name, given in values.items():
        _require_numeric(scheme, name)
        if isinstance(given, Uniform) and samples is None:
            raise ValueError(f"sweep({name}={given!r}): a distribution is drawn from: say how often, by samples=16")
        if not isinstance(given, Uniform) and not len(_listed(name, given)):
            raise ValueError(f"sweep({name}={given!r}): expected at least one value")
    if samples is None:
        grid = itertools.product(*(_listed(n, x) for n, x in values.items()))
        settings = [tuple(zip(values, combination, strict=True)) for combination in grid]
    else:
        settings = _drawn(values, samples, random.key(0) if key is None else key)
    return _laid(scheme, settings, which)


def chosen(scheme: Scheme, settings: Sequence[dict[str, float]], seeds: int | Sequence[int] | Tensor = 1) -> Sweep:
    """Some settings of the same hyper-parameters, each with every seed, as lanes of one program.

    Errors: as `sweep`.
    """
    if not settings or not settings[0] or any(list(s) != list(settings[0]) for s in settings):
        raise ValueError(f"chosen(settings={settings!r}): expected settings of the same hyper-parameters, one at least")
    for name in settings[0]:
        _require_numeric(scheme, name)
    return _laid(scheme, [tuple(s.items()) for s in settings], lanes.named(seeds))


def _laid(scheme: Scheme, settings: Sequence[tuple[tuple[str, Value], ...]], which: tuple[int, ...]) -> Sweep:
    lane_settings = tuple(s for s in settings for _ in which)
    parts = scheme.parts
    for i, (name, _) in enumerate(settings[0]):
        parts = _with_hyper(parts, name, PerLane(tuple(s[i][1] for s in lane_settings)))
    return Sweep(dataclasses.replace(scheme, parts=parts), which * len(settings), lane_settings)


def _drawn(values: dict[str, Any], samples: int, key: Tensor) -> list[tuple[tuple[str, Value], ...]]:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"sweep(samples={samples!r}): expected an int of at least 1")
    columns = []
    for name, given in values.items():
        place = sorted(values).index(name)  # so that the order in which they are written changes nothing
        u = random.uniform(random.fold_in(key, place), (samples,)).tolist()
        listed = [] if isinstance(given, Uniform) else _listed(name, given)
        columns.append([given.at(x) if isinstance(given, Uniform) else listed[int(x * len(listed))] for x in u])
    return [tuple(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]


def _listed(name: str, given: Any) -> list[Value]:
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"sweep({name}={given!r}): expected a sequence of values, a Uniform or a LogUniform")
    return list(given)


def _require_numeric(scheme: Scheme, name: str) -> None:
    parts = scheme.parts
    found = [(p, f) for p in with_parts([parts]) for f in dataclasses.fields(p) if f.name == name]
    if found and not any(name_is_swept(f) for _, f in found):
        owner = type(found[0][0]).__name__
        raise CompositionError(
            f"{owner}.{name} shapes the program, which all lanes share, so it can't be swept over them: run a program "
            f"for each value, as in `for x in values: Learner(scheme with {owner}({name}=x), ..., seeds=8)`"
        )
    if not found or parts.hypers().get(name) is None:
        parts.check_hyper(name, 0.0)  # says what there is, or that it was switched off


def _with_hyper(part: T, name: str, value: Value) -> T:
    """The same component with a hyper-parameter replaced wherever it is declared."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        held = getattr(part, field.name)
        if field.name == name and name_is_swept(field) and held is not None:
            changes[name] = value
        elif is_component(held):
            new = _with_hyper(held, name, value)
            if new is not held:
                changes[field.name] = new
    return dataclasses.replace(part, **changes) if changes else part  # type: ignore[type-var]
