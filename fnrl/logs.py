"""What a run leaves behind and shows: metrics as JSON lines and TensorBoard scalars, live progress, plain lines.

Logging never stops training: what can't be written is told once, as a warning, and given up.
"""

import collections
import contextlib
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from fnrl.executor import recorded
from fnrl.types import Choice

METRICS, CONFIG, TENSORBOARD = "metrics.jsonl", "config.json", "tensorboard"

_EVERY = 10.0  # seconds between plain lines
_WINDOW = 60.0  # seconds that a speed is the mean over


class LogWarning(UserWarning):
    """Something of a run's logs could not be written; training goes on without it."""


# -- files ----------------------------------------------------------------------------------------------------------


class JsonLines:
    """One JSON object a line, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line; numbers that aren't finite become null."""
        self.file.write(json.dumps({k: _plain(v) for k, v in line.items()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoard:
    """Scalars by environment step, for `tensorboard --logdir`. Errors: ImportError without tensorboard."""

    def __init__(self, directory: Path, purge: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, line: dict[str, Any]) -> None:
        """Every number of a line that belongs to a group, such as `algo/loss`."""
        for name, value in line.items():
            if "/" in name and isinstance(value, int | float):
                self.writer.add_scalar(name, value, line["env_steps"])

    def close(self) -> None:
        """Flushes and closes."""
        self.writer.close()


class Logs:
    """The logs of a run directory. Going on from update `since`, what was told after it is dropped: it comes again."""

    def __init__(self, directory: Path, since: int | None = None) -> None:
        self.directory = directory
        self.sinks: dict[str, Any] = {}
        self.failed: set[str] = set()
        path, purge = directory / METRICS, 0
        if since is None:
            self._try(METRICS, lambda: path.unlink(missing_ok=True))
        else:
            purge = self._try(METRICS, lambda: _drop_after(path, since)) or 0
        self._open(METRICS, lambda: JsonLines(path))
        self.record: JsonLines | None = None  # of choices, once there is one
        record = directory / recorded.FILE
        if record.exists():
            self._try(recorded.FILE, record.unlink if since is None else lambda: _drop_after(record, since))
        with contextlib.suppress(ImportError):  # the `log` extra is not installed
            self._open(TENSORBOARD, lambda: TensorBoard(directory / TENSORBOARD, purge))

    def write(self, line: dict[str, Any]) -> None:
        """Tells one line to every sink that still works."""
        for name, sink in list(self.sinks.items()):
            self._try(name, lambda sink=sink: sink.write(line))

    def choices(self, version: int, choices: Sequence[Choice]) -> None:
        """Records what was decided by who was faster on the way to a version, for `fnrl.Recorded`."""
        if choices and recorded.FILE not in self.failed:
            if self.record is None:
                self.record = self._try(recorded.FILE, lambda: JsonLines(self.directory / recorded.FILE))
            if self.record is not None:
                self._try(recorded.FILE, lambda: self.record and self.record.write(recorded.line(version, choices)))

    def config(self, config: dict[str, Any]) -> None:
        """Writes `config.json`, with the versions here and the commands that have worked on the run."""
        before = read_config(self.directory).get("commands", [])
        self._write_config({**config, "versions": _versions(), "commands": [*before, sys.argv]})

    def amend(self, facts: dict[str, Any]) -> None:
        """Sets facts in `config.json`."""
        self._write_config({**read_config(self.directory), **facts})

    def _write_config(self, said: dict[str, Any]) -> None:
        path = self.directory / CONFIG

        def write() -> None:
            beside = path.with_name(f".{path.name}.tmp")
            beside.write_text(json.dumps(said, indent=1) + "\n")
            os.replace(beside, path)

        self._try(CONFIG, write)

    def close(self) -> None:
        """Flushes and closes every sink; safe to call twice."""
        for name, sink in list(self.sinks.items()):
            self._try(name, sink.close)
        if self.record is not None:
            self._try(recorded.FILE, self.record.close)
        self.sinks, self.record = {}, None

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        sink = self._try(name, make)
        if sink is not None:
            self.sinks[name] = sink

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ImportError:
            raise
        except Exception as error:  # TensorBoard's writer raises whatever its thread met
            self.sinks.pop(name, None)
            if name not in self.failed:
                text = f"{self.directory / name} can't be written ({type(error).__name__}: {error}); going on without"
                warnings.warn(text, LogWarning, stacklevel=3)
            self.failed.add(name)
            return None


def read_lines(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The metrics of a run, line by line; a last line that was cut short is left out."""
    return _lines(Path(directory) / METRICS)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `config.json` says; empty if there is none that can be read."""
    try:
        found = json.loads((Path(directory) / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _drop_after(path: Path, updates: int) -> int:
    """Keeps the lines up to an update; gives the environment step from which on scalars are void."""
    lines = _lines(path)
    kept = [x for x in lines if x.get("updates", 0) <= updates]
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text("".join(json.dumps(x) + "\n" for x in kept))
    os.replace(beside, path)
    return max((x.get("env_steps", 0) for x in kept), default=0) + 1


def _plain(x: Any) -> Any:
    """JSON has no number for what is not finite."""
    if isinstance(x, list):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fnrl", "torch", "numpy", "gymnasium", "ray", "pybullet"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- what is shown --------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """Shows how a run gets on."""

    def update(self, metrics: Callable[[], dict[str, float]], env_steps: int) -> None:
        """Called after every update; `metrics` is asked only when something is drawn."""
        ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def update(self, metrics: Callable[[], dict[str, float]], env_steps: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line of text about every ten seconds, and the first and the last one."""

    def __init__(self, clock: "Clock") -> None:
        self.clock, self.drawn = clock, -math.inf
        self.latest: Callable[[], None] = lambda: None

    def update(self, metrics: Callable[[], dict[str, float]], env_steps: int) -> None:
        """Prints if it is time."""
        self.latest = lambda: print(f"{self.clock.text(env_steps)}  {summary(metrics())}", flush=True)
        if time.monotonic() - self.drawn >= _EVERY:
            self._draw()

    def close(self) -> None:
        """Prints how it ended."""
        self._draw()

    def _draw(self) -> None:
        self.latest()
        self.latest, self.drawn = (lambda: None), time.monotonic()


class Live:
    """A bar with time left, and a table of the metrics, redrawn in place."""

    def __init__(self, clock: "Clock") -> None:
        from rich.live import Live as RichLive

        self.clock, self.drawn = clock, -math.inf
        self.latest: Callable[[], None] = lambda: None
        self.live = RichLive(auto_refresh=False, transient=False)
        self.live.start()

    def update(self, metrics: Callable[[], dict[str, float]], env_steps: int) -> None:
        """Redraws twice a second."""
        self.latest = lambda: self.live.update(self._picture(metrics(), env_steps), refresh=True)
        if time.monotonic() - self.drawn >= 0.5:
            self._draw()

    def close(self) -> None:
        """Leaves the last picture standing."""
        self._draw()
        self.live.stop()

    def _draw(self) -> None:
        self.latest()
        self.latest, self.drawn = (lambda: None), time.monotonic()

    def _picture(self, metrics: dict[str, float], env_steps: int) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1))
        target = self.clock.target
        bar.add_row(ProgressBar(target, min(env_steps, target), width=40), Text(self.clock.text(env_steps)))
        table = Table.grid(padding=(0, 2))
        for label, value in rows(metrics):
            table.add_row(Text(label, style="dim"), Text(value))
        return Group(bar, table)


def progress(start: int, target: int, warmup: int = 0) -> Progress:
    """Live on a terminal, lines of text elsewhere."""
    clock = Clock(start, target, warmup)
    return Live(clock) if sys.stdout.isatty() else Lines(clock)


@contextlib.contextmanager
def episodes(total: int) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many of `total` episodes are over after so many steps: in place on a terminal, a line
    every ten seconds elsewhere; on stderr.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = BarColumn(), MofNCompleteColumn(), TextColumn("episodes, {task.fields[steps]:,} steps")
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("", total=total, steps=0)
            yield lambda over, steps: shown.update(task, completed=over, steps=steps)
        return
    drawn = time.monotonic()

    def line(over: int, steps: int) -> None:
        nonlocal drawn
        if time.monotonic() - drawn >= _EVERY:
            print(f"{over}/{total} episodes, {steps:,} steps", file=sys.stderr, flush=True)
            drawn = time.monotonic()

    yield line


class Clock:
    """Steps done, speed over the last minute and time left; a warm-up, which learns nothing, says nothing of speed."""

    def __init__(self, start: int, target: int, warmup: int = 0) -> None:
        self.target, self.warmup = target, warmup
        self.marks = collections.deque([(time.monotonic(), start)] if start >= warmup else [])

    def text(self, env_steps: int) -> str:
        """`20,480/1,000,000 steps  2%  1,234 steps/s  13:12 left`."""
        rate = self._rate(env_steps)
        speed = f"{rate:,.0f}" if rate > 0 else "?"
        left = _duration(max(self.target - env_steps, 0) / rate) if rate > 0 else "?"
        share = min(env_steps / self.target, 1.0)
        return f"{env_steps:,}/{self.target:,} steps  {share:.0%}  {speed} steps/s  {left} left"

    def _rate(self, env_steps: int) -> float:
        if env_steps < self.warmup:
            return 0.0
        self.marks.append((time.monotonic(), env_steps))
        while len(self.marks) > 2 and self.marks[1][0] < self.marks[-1][0] - _WINDOW:
            self.marks.popleft()
        (begun, first), (now, last) = self.marks[0], self.marks[-1]
        return (last - first) / (now - begun) if now > begun else 0.0


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


_LABELS = {
    "performance/train": "return (last 100 episodes)",
    "performance/length": "length",
    "performance/test": "evaluation",
    "performance/train_iqm": "return, interquartile mean of lanes",
    "performance/test_iqm": "evaluation, interquartile mean of lanes",
    "lanes/alive": "lanes alive",
    "episodes": "episodes",
    "updates": "updates",
    "scheme/metrics/fps": "steps/s of training",
}


def rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """What to show of some metrics, labelled: performance first, then the algorithm's."""
    shown = [(label, metrics[n]) for n, label in _LABELS.items() if n in metrics]
    shown += [(n.removeprefix("algo/"), v) for n, v in metrics.items() if n.startswith("algo/")]
    return [(label, f"{v:,.0f}" if float(v).is_integer() else f"{v:,.4g}") for label, v in shown]


def summary(metrics: dict[str, float]) -> str:
    """The same in one line, shorter."""
    names = {"performance/train": "return", "performance/test": "test", "algo/loss": "loss", "algo/entropy": "entropy"}
    return "  ".join(f"{label} {metrics[n]:,.4g}" for n, label in names.items() if n in metrics)
