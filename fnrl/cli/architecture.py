"""The architecture and the place where it runs, as the words of a command line."""

import argparse
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import fnrl
from fnrl.cli.options import pair

_KEYWORDS = {
    name: p.annotation if isinstance(p.annotation, type) else int
    for name, p in inspect.signature(fnrl.schemes.nappo).parameters.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words that are about nothing else."""
    cells = parser.add_argument_group("workers in Ray cells, with --ray")
    cells.add_argument("--ray-address", metavar="A", help="the cluster: auto, or HOST:PORT [one of this run's own]")
    about = "what a cell reserves that makes {}, such as cpus=0.5 gpus=0.25 placement=SPREAD simulator=1 [cpus=1]"
    for kind, what in (("collect", "rollouts"), ("gradients", "updates")):
        cells.add_argument(f"--ray-{kind}", nargs="+", type=pair, metavar="NAME=X", help=about.format(what))
    cells.add_argument("--ray-deadline", type=float, metavar="S", help="seconds that a call may take [600]")
    stages = parser.add_argument_group("the architecture by NAPPO's keywords, instead of --scheme and --workers")
    for name, kind in _KEYWORDS.items():
        stages.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X")


def executor(said: argparse.Namespace) -> Any:
    """Where the workers run."""
    words = {"address": said.ray_address, "deadline": said.ray_deadline}
    words |= {kind: _resources(kind, getattr(said, f"ray_{kind}")) for kind in ("collect", "gradients")}
    given = {name: x for name, x in words.items() if x is not None}
    if given and not said.ray:
        raise fnrl.CompositionError(f"--ray-{next(iter(given))} says how workers run in Ray cells: add --ray")
    return fnrl.Ray(**given) if said.ray else fnrl.Inline()


def _resources(kind: str, pairs: list[tuple[str, Any]] | None) -> Any:
    """`cpus=0.5 gpus=0.25 placement=SPREAD`; any other name is one that nodes were started with."""
    if pairs is None:
        return None
    names = [f.name for f in dataclasses.fields(fnrl.Resources) if f.name != "custom"]
    try:
        known = {name: x for name, x in pairs if name in names}
        return fnrl.Resources(**known, custom={name: x for name, x in pairs if name not in names})
    except fnrl.CompositionError as error:
        raise fnrl.CompositionError(f"--ray-{kind}: {error}") from None


def brings(scheme: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that an architecture is named for. Errors: CompositionError for one whose algorithm has no replay."""
    replay = values.get("algo", "PPO") not in ("PPO", "A2C")
    if scheme == "ape_x" and not replay:
        raise fnrl.CompositionError(
            "--scheme ape_x keeps a replay: add --algo DQN (or SAC, TD3, DDPG), or use --scheme impala"
        )
    return {"storage": "VTrace"} if scheme == "impala" and not replay else {}


def topology(said: argparse.Namespace) -> Any:
    """The architecture that the words name."""
    words = {name: x for name in _KEYWORDS if (x := getattr(said, name)) is not None}
    if words and (said.scheme or said.workers):
        raise fnrl.CompositionError(
            f"--{next(iter(words)).replace('_', '-')} says what --scheme and --workers say: use one or the other"
        )
    if words:
        return fnrl.schemes.nappo(**words)
    if said.shards > 1:
        plain = {} if said.workers is None else {"workers": said.workers}  # which shards refuse
        return fnrl.sharded(fnrl.schemes.named(said.scheme or "a2c", **plain), said.shards)
    workers = said.workers if said.workers != 1 or said.ray or said.scheme else None
    if workers is None and said.ray:
        workers = 1
    return fnrl.schemes.named(said.scheme or "a2c", **({} if workers is None else {"workers": workers}))
