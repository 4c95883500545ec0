"""Pictures of runs: the learning curve of one, the curves and scores of several."""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnrl.logs import LogWarning, read_lines
from fnrl.results import Results, interval, iqm

CURVE = "curve.png"


def curve(directory: str | os.PathLike[str]) -> Path | None:
    """Draws `curve.png` from a run's metrics: training returns plain and smoothed, evaluations with their deviation.

    None, with a warning, where matplotlib is missing or the picture can't be written.
    """
    target = Path(directory) / CURVE
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(f"{target} is not drawn: pip install 'fnrl[log]'", LogWarning, stacklevel=2)
        return None
    lines = read_lines(directory)
    recent, smooth, tests = (
        [(x["env_steps"], x[name], x.get("performance/test_std", 0.0)) for x in lines if x.get(name) is not None]
        for name in ("performance/recent", "performance/train", "performance/test")
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if recent:
        axes.plot(*list(zip(*recent, strict=True))[:2], color="tab:blue", alpha=0.3, linewidth=1, label="training")
    each = [(x["env_steps"], x["lanes/performance/test"]) for x in lines if "lanes/performance/test" in x]
    for steps, scores in each:
        axes.plot([steps] * len(scores), scores, ".", color="tab:orange", alpha=0.4, markersize=4)
    if smooth:
        axes.plot(*list(zip(*smooth, strict=True))[:2], color="tab:blue", label="training, last 100 episodes")
    if tests:
        x, y, deviation = zip(*tests, strict=True)
        axes.errorbar(
            x,
            y,
            deviation,
            color="tab:orange",
            marker="o",
            capsize=3,
            label=f"evaluation, ± deviation of {'lanes' if each else 'episodes'}",
        )
    axes.set(xlabel="environment steps", ylabel="return of an episode", title=Path(directory).resolve().name)
    axes.grid(alpha=0.3)
    if recent or smooth or tests:
        axes.legend(loc="best")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        warnings.warn(f"{target} can't be written: {error}", LogWarning, stacklevel=2)
        return None
    return target


def curves(runs: Sequence[Results]) -> bytes:
    """A PNG of the interquartile mean over lanes by environment steps, in its 95 % band; one line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        steps, scores = run.at()
        middle = [iqm(x) for x in scores]
        low, high = zip(*(interval([x], samples=500) for x in scores), strict=True)
        color = f"C{i % 10}"
        axes.plot(steps, middle, color=color, marker="o" if len(steps) < 30 else None, markersize=3)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot([], [], color=color, label=f"{run.name} ({len(run.lanes)} seed{'s' * (len(run.lanes) > 1)})")
    axes.set(xlabel="environment steps of a lane", ylabel="return, interquartile mean")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    return _png(figure)


def scores(runs: Sequence[Results]) -> bytes:
    """A PNG of the last score of every lane, with the interquartile mean and its 95 % interval; one row a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        low, high = interval([run.scores])
        color = f"C{i % 10}"
        axes.plot([low, high], [i, i], color=color, alpha=0.35, linewidth=12, solid_capstyle="butt")
        axes.plot(run.scores, [i] * len(run.scores), "o", color=color, alpha=0.6, markersize=5)
        axes.plot([iqm(run.scores)], [i], "|", color="black", markersize=18)
    axes.set(xlabel="last score of each lane (bar: 95 % interval of the interquartile mean)")
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis="x")
    return _png(figure)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
