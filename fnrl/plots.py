"""Pictures of a run: its learning curve."""

import os
import warnings
from pathlib import Path

from fnrl.logs import LogWarning, read_lines

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
    if smooth:
        axes.plot(*list(zip(*smooth, strict=True))[:2], color="tab:blue", label="training, last 100 episodes")
    if tests:
        x, y, deviation = zip(*tests, strict=True)
        axes.errorbar(x, y, deviation, color="tab:orange", marker="o", capsize=3, label="evaluation, ± deviation")
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
