"""Results over seeds: what runs left behind, read back, and what can be said of it (arXiv 2108.13264).

A score is a lane's last evaluation. Statistics take one sequence of scores for each task; resampling is stratified,
each task's seeds among themselves. What is quoted is the interquartile mean with a percentile bootstrap interval.
"""

import csv
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fnrl.errors import CheckpointError
from fnrl.lanes import iqm
from fnrl.logs import read_config, read_lines

Scores = Sequence[Sequence[float]]  # by task, by seed
Array = np.ndarray[Any, Any]

__all__ = [
    "Lane",
    "Results",
    "Setting",
    "collected",
    "improvement",
    "improvement_interval",
    "interval",
    "iqm",
    "read",
    "settings",
    "write",
]


@dataclasses.dataclass(frozen=True)
class Lane:
    """One lane of a run: its number, its seed, what it was swept with, and its scores by environment steps."""

    number: int
    seed: int
    values: dict[str, str]
    steps: tuple[int, ...]
    scores: tuple[float, ...]
    alive: bool


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run directory tells: of one seed, or of many; `measured` is what a score is."""

    name: str
    env: str
    algo: str
    measured: str
    lanes: tuple[Lane, ...]
    env_steps: int
    seconds: float
    scheme: str = ""  # the configuration, as JSON: runs that differ in nothing but the seed have one

    @property
    def scores(self) -> list[float]:
        """The last score of each lane."""
        return [lane.scores[-1] for lane in self.lanes]

    def at(self) -> tuple[list[int], list[list[float]]]:
        """The steps at which lanes were measured, and the scores of those that were `[steps][lanes]`."""
        steps = sorted({s for lane in self.lanes for s in lane.steps})
        by_lane = [dict(zip(lane.steps, lane.scores, strict=True)) for lane in self.lanes]
        return steps, [[scores[s] for scores in by_lane if s in scores] for s in steps]


def read(directory: str | os.PathLike[str]) -> Results:
    """The results of a run directory. Errors: CheckpointError when it is none, or nothing was measured yet."""
    where = Path(directory)
    lines, config = (read_lines(where), read_config(where)) if where.is_dir() else ([], {})
    if not lines or "scheme" not in config:
        raise CheckpointError(f"{where} is not a run directory: it has no metrics.jsonl with a config.json beside it")
    found, measured = _by_lane(lines, "performance/test"), "evaluation"
    if not found:
        found, measured = _by_lane(lines, "performance/train"), "training, last 100 episodes"
    if not found:
        raise CheckpointError(f"{where}: no episode has ended yet, so there is nothing to compare")
    parts, learner = config["scheme"]["parts"], config.get("learner", {})
    seeds = learner.get("seeds") or [learner.get("seed", 0)]
    swept, alive = _swept(parts), _by_lane(lines, "algo/alive")
    made = [
        Lane(
            n,
            seeds[n] if n < len(seeds) else n,
            {name: values[n] for name, values in swept.items()},
            tuple(s for s, _ in points),
            tuple(x for _, x in points),
            not alive.get(n) or alive[n][-1][1] > 0.0,
        )
        for n, points in sorted(found.items())
    ]
    last = {k: x for line in lines for k, x in line.items() if k in ("env_steps", "time/total") and x is not None}
    algo = parts["algo"][""].rsplit(".", 1)[-1]
    name = parts["env"].get("spec", {}).get("name") or parts["env"][""].rsplit(".", 1)[-1]
    facts = name, algo, measured, tuple(made), last["env_steps"], last["time/total"]
    return Results(where.resolve().name, *facts, json.dumps(config["scheme"], sort_keys=True))


def collected(directories: Sequence[str | os.PathLike[str]]) -> list[Results]:
    """The results of run directories, and of those in a directory of runs. Runs of one seed each that differ in nothing
    else are one. Errors: CheckpointError.
    """
    found: dict[Any, list[tuple[Path, Results]]] = {}
    for place in map(Path, directories):
        below = [x for x in (sorted(place.iterdir()) if place.is_dir() else ()) if (x / "metrics.jsonl").is_file()]
        for where in below if below and not (place / "metrics.jsonl").is_file() else [place]:
            run = read(where)
            alone = len(run.lanes) == 1 and not run.lanes[0].values
            found.setdefault((run.scheme, run.measured) if alone else where, []).append((where, run))
    return [_together(runs) for runs in found.values()]


def _together(runs: Sequence[tuple[Path, Results]]) -> Results:
    first = runs[0][1]
    if len(runs) == 1:
        return first
    names = [run.name for _, run in runs]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    name = "".join(letter for letter, *_ in alike).rstrip("-_. ") or runs[0][0].resolve().parent.name
    made = tuple(dataclasses.replace(run.lanes[0], number=i) for i, (_, run) in enumerate(runs))
    steps, seconds = min(r.env_steps for _, r in runs), sum(r.seconds for _, r in runs)
    return dataclasses.replace(first, name=name, lanes=made, env_steps=steps, seconds=seconds)


def _by_lane(lines: list[dict[str, Any]], name: str) -> dict[int, list[tuple[int, float]]]:
    """Steps and values of a metric by lane; a run of one seed has lane 0."""
    found: dict[int, list[tuple[int, float]]] = {}
    for line in lines:
        each = line.get(f"lanes/{name}", [line.get(name)])
        for number, x in zip(line.get("lanes/number", [0]), each, strict=False):
            if x is not None:
                points = found.setdefault(number, [])
                if points and points[-1][0] == line["env_steps"]:
                    points.pop()
                points.append((line["env_steps"], float(x)))
    return found


def _swept(config: Any, name: str = "") -> dict[str, list[str]]:
    """The values of each lane by hyper-parameter, of a printed configuration."""
    if not isinstance(config, dict):
        return {}
    if config.get("") == "fnrl.component.PerLane":
        return {name: [_text(x) for x in config["values"]]}
    return {k: x for n, value in config.items() for k, x in _swept(value, n).items()}


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:.7g}"
    inside = ", ".join(f"{n}={x:g}" for n, x in value.items() if n)
    return f"{value[''].rsplit('.', 1)[-1]}({inside})"


# -- statistics -----------------------------------------------------------------------------------------------------


def interval(
    scores: Scores,
    statistic: Callable[..., Any] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic under stratified resampling of seeds, `samples` times.

    `statistic(array, axis)` is of all scores together; the interquartile mean without one. With one seed in every task
    the ends are that one number. Errors: ImportError without scipy.
    """
    stats = _stats()
    of = statistic or (lambda x, axis: stats.trim_mean(x, 0.25, axis=axis))
    data = [np.asarray(x, dtype=np.float64) for x in scores]
    if all(len(x) < 2 for x in data):
        value = float(of(np.concatenate(data), axis=0))
        return value, value
    if any(len(x) < 2 for x in data):
        raise ValueError(f"interval: a task of one seed can't be resampled; seeds by task: {[len(x) for x in data]}")
    return _bootstrap(lambda *x, axis: of(np.concatenate(x, axis=axis), axis=axis), data, confidence, samples, seed)


def improvement(x: Scores, y: Scores) -> float:
    """The probability that a seed of `x` scores above one of `y`, ties counted half, averaged over tasks (the
    Mann-Whitney U over the number of pairs).
    """
    return float(np.mean([_above(np.asarray(a), np.asarray(b), -1) for a, b in zip(x, y, strict=True)]))


def improvement_interval(
    x: Scores, y: Scores, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Its percentile interval, the seeds of both resampled in each task."""
    n = len(x)

    def of(*data: Array, axis: int) -> Array:
        return np.mean([_above(a, b, axis) for a, b in zip(data[:n], data[n:], strict=True)], axis=0)

    data = [np.asarray(s, dtype=np.float64) for s in (*x, *y)]
    if all(len(s) < 2 for s in data):
        return improvement(x, y), improvement(x, y)
    return _bootstrap(of, data, confidence, samples, seed)


def _above(a: Array, b: Array, axis: int) -> Array:
    a, b = np.moveaxis(a, axis, -1)[..., :, None], np.moveaxis(b, axis, -1)[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def _bootstrap(
    statistic: Callable[..., Any], data: list[Array], confidence: float, samples: int, seed: int
) -> tuple[float, float]:
    # scipy wants two of each at least; one seed resampled is that seed, and pairs with it twice are the same share
    data = [np.repeat(x, 2) if len(x) == 1 else x for x in data]
    options: dict[str, Any] = {"n_resamples": samples, "confidence_level": confidence, "method": "percentile"}
    found = _stats().bootstrap(data, statistic, rng=np.random.default_rng(seed), vectorized=True, **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'fnrl[log]'") from error
    return stats


# -- sweeps ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """The values that some lanes of a sweep share, their scores, and what these come to."""

    values: dict[str, str]
    scores: list[float]
    iqm: float
    low: float
    high: float


def settings(results: Results) -> list[Setting]:
    """The settings of a sweep, the best first."""
    grouped: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for lane in results.lanes:
        grouped.setdefault(tuple(lane.values.items()), []).append(lane.scores[-1])
    made = [Setting(dict(v), s, iqm(s), *interval([s])) for v, s in grouped.items()]
    return sorted(made, key=lambda s: -s.iqm)


def write(found: Sequence[Setting], out: str | os.PathLike[str]) -> Path:
    """A table of settings: `.json` (a list of objects), or `.csv` with a column for each hyper-parameter.

    Errors: ValueError for another ending, or for no setting.
    """
    target = Path(out)
    if target.suffix not in (".json", ".csv") or not found:
        raise ValueError(f"write({len(found)} settings, {str(out)!r}): expected a .json or .csv file, and settings")
    rows: list[dict[str, Any]] = [
        {**s.values, "lanes": len(s.scores), "iqm": s.iqm, "low": s.low, "high": s.high, "scores": s.scores}
        for s in found
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".json":
        target.write_text(json.dumps(rows, indent=1) + "\n")
        return target
    with target.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({**row, "scores": " ".join(map(str, row["scores"]))} for row in rows)
    return target
