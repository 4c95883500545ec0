"""The habit all benchmarks share: `--list`, `--only CASE...`, `--json FILE`, a table, and exit status 1 where a bar
falls short.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PINS = HERE.parent / "constraints.txt"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, against which bar."""

    case: str
    what: str
    value: float
    bar: float | None = None
    above: bool = True  # whether the value must be above the bar, or below
    detail: Any = None

    @property
    def passed(self) -> bool:
        """Whether the bar, if there is one, is met."""
        return self.bar is None or (self.value >= self.bar if self.above else self.value <= self.bar)


def main(description: str, cases: dict[str, Callable[[argparse.Namespace], Iterable[Row]]], **options: Any) -> None:
    """Runs the cases asked for, prints their table, keeps the figures, and exits 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(cases), help="run these cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    args = parser.parse_args()
    places = {args.json, getattr(args, "dir", None)}  # of one machine: they change nothing that is measured
    said = [x for x in sys.argv[1:] if not x.startswith(("--json", "--dir")) and Path(x) not in places]
    command = " ".join(["python", os.path.relpath(sys.argv[0], HERE.parent), *said])
    if args.list:
        for name, case in cases.items():
            print(f"{name:24} {(case.__doc__ or '').strip().splitlines()[0]}")
        return
    rows: list[Row] = []
    for name in args.only or cases:
        mine = []
        for row in cases[name](args):
            mine.append(row)
            print(line(row), flush=True)
        rows += mine
        if args.json:
            keep(args.json, name, mine, command)
    print("\n" + "\n".join(line(r) for r in rows))
    sys.exit(0 if all(r.passed for r in rows) else 1)


def keep(path: Path, case: str, rows: Sequence[Row], command: str) -> None:
    """Puts the figures of a case into the file, in the place of those that an earlier call has left there: what takes
    long can be run in several sittings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [r for r in before if r["case"] not in {case, *(r.case for r in rows)}]
    on = machine()  # of this call: rows that stay are of theirs
    made = [{**dataclasses.asdict(r), "passed": r.passed, "command": command, "cpu": on["cpu"]} for r in rows]
    path.write_text(json.dumps({"machine": on, "rows": kept + made}, indent=1) + "\n")


def line(row: Row) -> str:
    """A row as text."""
    bar = "" if row.bar is None else f"{'>=' if row.above else '<='} {row.bar:g}"
    verdict = "" if row.bar is None else "ok" if row.passed else "SHORT"
    return f"{row.case:22} {row.what:52} {row.value:12.4g} {bar:12} {verdict}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    names = ("torch", "numpy", "gymnasium", "pybullet", "ray", "fnrl")
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **{n: _version(n) for n in names}}


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def pinned(name: str) -> str:
    """The version of a package that this repository's results were made with."""
    return dict(p.split("==") for p in PINS.read_text().split() if "==" in p)[name]


def peer_python(name: str, packages: list[str], torch: bool = True) -> str:
    """The interpreter of a peer's own virtual environment, made on first use (from the pins of this repository; CPU
    torch, if the peer needs torch).
    """
    home = HERE / ".peers" / name
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True)
        shared = ("numpy", "gymnasium", "pybullet", "pybullet_envs_gymnasium") if torch else ("numpy",)
        first = [[f"torch=={pinned('torch')}"]] if torch else []
        for what in (*first, [*(f"{p}=={pinned(p)}" for p in shared), *packages]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *what], check=True)
        (home / "ready").write_text(" ".join(packages))
    return str(python)


def family(root: int) -> set[int]:
    """A process and all below it."""
    parents = {pid: int(fields[1]) for pid, fields in _processes().items()}
    found, new = {root}, {root}
    while new:
        new = {p for p, parent in parents.items() if parent in new} - found
        found |= new
    return found


def besides() -> Callable[[], float]:
    """Begins to watch; what it returns tells how many cores the processes that are none of this one's have used since:
    a timing beside them is of something else.
    """
    tick, begin = os.sysconf("SC_CLK_TCK"), time.perf_counter()
    before = {pid: int(f[11]) + int(f[12]) for pid, f in _processes().items()}

    def used() -> float:
        ours = family(os.getpid())
        now = {pid: int(f[11]) + int(f[12]) for pid, f in _processes().items() if pid not in ours}
        return sum(n - before.get(pid, 0) for pid, n in now.items()) / tick / (time.perf_counter() - begin)

    return used


def _processes() -> dict[int, list[str]]:
    """What `/proc` tells of every process, from its state on; nothing where there is no `/proc`."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = path.read_text().rsplit(")", 1)[1].split()
    return found


def one_thread() -> dict[str, str]:
    """The environment of a measured process: one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
