"""The habit all benchmarks share: `--list`, `--only CASE...`, `--json FILE`, a table, and exit status 1 where a bar
falls short.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
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
    if args.list:
        for name, case in cases.items():
            print(f"{name:24} {(case.__doc__ or '').strip().splitlines()[0]}")
        return
    rows: list[Row] = []
    for name in args.only or cases:
        for row in cases[name](args):
            rows.append(row)
            print(line(row), flush=True)
    print("\n" + "\n".join(line(r) for r in rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": "python " + " ".join([os.path.relpath(sys.argv[0], HERE.parent), *sys.argv[1:]])}
        record |= {"machine": machine(), "rows": [{**dataclasses.asdict(r), "passed": r.passed} for r in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if all(r.passed for r in rows) else 1)


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


def one_thread() -> dict[str, str]:
    """The environment of a measured process: one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
