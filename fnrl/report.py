"""A one-page report of runs: tables and pictures in one HTML file, or Markdown with its pictures beside it."""

import base64
import html
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fnrl import plots
from fnrl.results import Results, collected, improvement, improvement_interval, interval, iqm, read, settings, write

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}p{max-width:50rem}"""


class Table(NamedTuple):
    """Rows of text under a head, and a line that says what they are."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def report(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes a report of some runs to `out`: one file for `.html`; for `.md` the pictures lie beside it; for `.csv` and
    `.json` a table of the settings of one run, a sweep.

    Errors: CheckpointError for a directory that is no run, ValueError for another ending or a table of several runs,
    ImportError without scipy or matplotlib (`fnrl[log]`).
    """
    target = Path(out)
    if target.suffix in (".csv", ".json") and len(directories) == 1:
        return write(settings(read(directories[0])), target)
    if target.suffix not in (".html", ".md"):
        raise ValueError(
            f"report(out={str(out)!r}): expected a file that ends in .html or .md; for one run .csv or .json"
        )
    runs = _named(collected(directories))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text((_html if target.suffix == ".html" else _markdown)(runs, target))
    return target


def tables(runs: Sequence[Results]) -> Iterator[Table]:
    """What a report says in numbers: the runs, who is above whom, the settings of sweeps, the lanes that died."""
    rows = []
    for run in runs:
        ends = min(run.scores), max(run.scores)
        facts = run.name, run.env, run.algo, str(len(run.lanes)), f"{run.env_steps:,}", _time(run.seconds)
        rows.append((*facts, _number(iqm(run.scores)), _interval(run.scores), *map(_number, ends)))
    yield Table(
        "Runs",
        ("run", "environment", "algorithm", "lanes", "steps", "time", "IQM", "95 % interval", "lowest", "highest"),
        rows,
        "A score is a lane's last evaluation (or, where there was none, its last 100 training episodes). IQM is the"
        " mean of the middle half of the lanes; the interval is a percentile bootstrap over lanes (arXiv 2108.13264).",
    )
    for env in dict.fromkeys(run.env for run in runs):
        same = [run for run in runs if run.env == env]
        if len(same) > 1:
            yield _improvements(env, same)
    for run in runs:
        if run.lanes[0].values:
            names = tuple(run.lanes[0].values)
            found = [
                (*s.values.values(), str(len(s.scores)), _number(s.iqm), _interval(s.scores)) for s in settings(run)
            ]
            yield Table(f"Settings of {run.name}, the best first", (*names, "seeds", "IQM", "95 % interval"), found)
    dead = [(r.name, str(x.number), str(x.seed)) for r in runs for x in r.lanes if not x.alive]
    if dead:
        note = "Something in them was not finite. They count with the weights at which they stopped."
        yield Table("Lanes that died", ("run", "lane", "seed"), dead, note)


def _improvements(env: str, runs: Sequence[Results]) -> Table:
    rows = []
    for a in runs:
        cells = []
        for b in runs:
            here = f"{improvement([a.scores], [b.scores]):.2f}"
            if min(len(a.scores), len(b.scores)) > 1:
                here += " ({:.2f} to {:.2f})".format(*improvement_interval([a.scores], [b.scores]))
            cells.append("" if a is b else here)
        rows.append((a.name, *cells))
    note = (
        "How likely a seed of the row is above one of the column, with its 95 % interval (one seed has none, and shows"
        " little); half tells nothing."
    )
    return Table(f"Probability of improvement on {env}", ("", *(r.name for r in runs)), rows, note)


def _interval(scores: list[float]) -> str:
    return "one seed" if len(scores) == 1 else "{} to {}".format(*map(_number, interval([scores])))


def _named(runs: list[Results]) -> list[Results]:
    """Runs with names of their own: two directories may end alike."""
    names = [r.name for r in runs]
    return [
        r if names.count(r.name) == 1 else Results(**{**vars(r), "name": f"{r.name} ({i + 1})"})
        for i, r in enumerate(runs)
    ]


def _pictures(runs: Sequence[Results]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    for env in dict.fromkeys(run.env for run in runs):
        same = [run for run in runs if run.env == env]
        measured = " / ".join(dict.fromkeys(r.measured for r in same))
        yield (
            f"curves-{env}",
            f"{env}: {measured}, interquartile mean with its 95 % interval",
            lambda s=same: plots.curves(s),
        )
        yield f"scores-{env}", f"{env}: the last score of every lane", lambda s=same: plots.scores(s)


def _html(runs: Sequence[Results], target: Path) -> str:
    parts = [f"<h1>{html.escape(_title(runs))}</h1>"]
    for table in tables(runs):
        head = "".join(f"<th>{html.escape(x)}</th>" for x in table.head)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row)}</tr>\n" for row in table.rows)
        note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
        parts.append(f"<h2>{html.escape(table.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>{note}")
    for _, title, draw in _pictures(runs):
        data = base64.b64encode(draw()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    head = f"<meta charset='utf-8'><title>{html.escape(_title(runs))}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _markdown(runs: Sequence[Results], target: Path) -> str:
    parts = [f"# {_title(runs)}"]
    for table in tables(runs):
        lines = [f"| {' | '.join(row)} |" for row in (table.head, ("---",) * len(table.head), *table.rows)]
        parts.append(f"## {table.title}\n\n" + "\n".join(lines) + (f"\n\n{table.note}" if table.note else ""))
    for name, title, draw in _pictures(runs):
        picture = target.with_name(f"{target.stem}-{name}.png")
        picture.write_bytes(draw())
        parts.append(f"## {title}\n\n![{title}]({picture.name})")
    return "\n\n".join(parts) + "\n"


def _title(runs: Sequence[Results]) -> str:
    return ", ".join(run.name for run in runs)


def _number(x: float) -> str:
    return f"{x:,.1f}" if abs(x) >= 10 else f"{x:.3g}"


def _time(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
