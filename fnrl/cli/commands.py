"""`fnrl train | resume | evaluate | report`.

Exit status: 0, 1 for an error of fnrl's own (its message, without a traceback), 2 for a wrong command line, 130 for
Ctrl-C, 143 for SIGTERM.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fnrl
from fnrl import checkpoint, lanes, logs, report, results
from fnrl.cli import architecture
from fnrl.cli.options import build, pair
from fnrl.cli.words import Words, add_common, count, parser_of, read, read_train
from fnrl.config import rebuild

_ERRORS = (
    fnrl.CompositionError,
    fnrl.NonFiniteError,
    fnrl.EnvironmentFault,
    fnrl.StaleStateError,
    fnrl.CheckpointError,
)
_HINT = "go on with it from Python, where its scheme is: Learner.resume(directory, scheme)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    commands: dict[str, Callable[[Words], int]] = {
        "train": _train,
        "resume": _resume,
        "evaluate": _evaluate,
        "report": _report,
    }
    top = argparse.ArgumentParser(
        "fnrl", description=fnrl.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"fnrl {fnrl.__version__}")
    top.add_argument("command", choices=commands, help="what to do; fnrl COMMAND --help tells its options")
    command = top.parse_args(words[:1]).command
    try:
        with _plain_warnings(), _without_chatter():
            sys.path.insert(0, os.getcwd())  # as python -m does: --env module:Name
            return commands[command](words[1:])
    except _ERRORS as error:
        print(f"fnrl: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fnrl: interrupted", file=sys.stderr)
        return 130


# -- commands -------------------------------------------------------------------------------------------------------


def _train(words: Words) -> int:
    said, values = read_train(words)
    torch.set_num_threads(said.threads)
    with _refusals():
        parts = build(said.env, values)
        scheme = fnrl.Scheme(parts, architecture.topology(said), architecture.executor(said), said.compile, said.device)
        every = max(said.steps // 10, 20_000) if said.eval_every is None else said.eval_every
        evaluation = fnrl.Evaluate(every=every, episodes=said.eval_episodes) if every else None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        seeds = said.seeds if said.seeds is None or len(said.seeds) > 1 else said.seeds[0]
        who = said.seed if seeds is None else f"{seeds if isinstance(seeds, int) else len(seeds)}seeds"
        name = re.sub(r"[/:]", "-", said.env)
        directory = said.dir or Path("runs") / f"{name}-{type(parts.algo).__name__}-{who}-{stamp}"
        settings = said.steps, directory, said.seed, evaluation, said.save_every, said.keep
        learner = fnrl.Learner(scheme, *settings, seeds=seeds)
    return _run(learner, said.quiet)


def _resume(words: Words) -> int:
    parser = parser_of("resume", "Goes on with a run from its newest good checkpoint, exactly.")
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--steps", type=count, help="go on to so many environment steps instead")
    about = "set hyper-parameters from now on, such as lr=1e-4; a schedule of that name no longer moves it"
    parser.add_argument("--set", nargs="+", type=pair, default=[], metavar="NAME=X", help=about)
    anew = "where a simulator can't be brought back exactly, begin its episode anew instead of refusing"
    parser.add_argument("--device", help="where tensors live from now on, such as cpu or cuda [as before]")
    parser.add_argument("--inexact", action="store_true", help=anew)
    add_common(parser)
    said = read(parser, words)
    torch.set_num_threads(said.threads)
    with _refusals():
        scheme = _scheme(said.dir, said.device)
        if said.inexact and isinstance(scheme.parts.env, fnrl.envs.GymVector):
            env = dataclasses.replace(scheme.parts.env, exact=False)
            scheme = dataclasses.replace(scheme, parts=dataclasses.replace(scheme.parts, env=env))
        learner = fnrl.Learner.resume(said.dir, scheme, said.steps)
        try:
            for name, value in said.set:
                learner.update_algo_parameter(
                    name.rsplit(".", 1)[-1], value
                )  # as the options of the parts are named, too
        except BaseException:
            learner.close()
            raise
    return _run(learner, said.quiet)


def _run(learner: fnrl.Learner, quiet: bool) -> int:
    where = min(str(learner.directory), os.path.relpath(str(learner.directory)), key=len)
    with learner:
        if not quiet:
            print(f"{_what(learner.scheme)}, in {where}: Ctrl-C saves and stops", flush=True)
        try:
            metrics = learner.train(progress=not quiet)
        except KeyboardInterrupt:
            print(f"fnrl: to go on: fnrl resume {where}", file=sys.stderr)
            raise
    if not quiet:
        if "performance/test" in metrics:
            print(f"evaluation: return {metrics['performance/test']:,.1f}")
        print(f"to look:  {where}/curve.png, or tensorboard --logdir {where}")
        ended = "".join(f" {n}=X" for n in _run_out(learner))  # a rate that has come to 0 learns nothing more
        more = f" --set{ended}" if ended else ""
        print(f"to go on: fnrl evaluate {where}, or fnrl resume {where} --steps N{more}", flush=True)
    return 0


def _what(scheme: fnrl.Scheme) -> str:
    """What is trained, in a line."""
    parts, how = scheme.parts, ", compiled" if scheme.compile else ""
    names = type(parts.algo).__name__, type(parts.storage).__name__
    envs = parts.env.num_envs
    many = f"{envs} environment{'s' * (envs != 1)}"
    return f"{names[0]} with {names[1]} on {parts.env.spec.name} ({many}, {scheme.topology!r}{how})"


def _run_out(learner: fnrl.Learner) -> list[str]:
    """The scheduled learning rates that have come to 0."""
    hyper, moving = learner.state.weights.hyper, learner.scheme.parts.moving
    return [n for n in moving if n.endswith("lr") and not bool(hyper[n].any())]


def _evaluate(words: Words) -> int:
    parser = parser_of(
        "evaluate", "Plays whole episodes with the most likely actions of a run's newest good checkpoint."
    )
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--episodes", type=count, default=100, help="whole episodes [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes [0]")
    add_common(parser)
    said = read(parser, words)
    torch.set_num_threads(said.threads)
    with _refusals():
        parts, found, key = _scheme(said.dir, "cpu").parts, checkpoint.newest(said.dir), fnrl.key(said.seed)
    env = dataclasses.replace(parts.env, num_envs=min(said.episodes, 10))  # type: ignore[type-var]
    state = getattr(found.state, "scheme", found.state)  # as a learner saves it, or a loop of one's own
    key = key if state.lanes is None else fnrl.random.split(key, state.lanes)
    total = -(-said.episodes // env.num_envs) * env.num_envs * (state.lanes or 1)  # as many in every environment
    showing = contextlib.nullcontext(lambda *_: None) if said.quiet else logs.episodes(total)
    with showing as told:
        done = fnrl.evaluate(parts, state.weights, key, said.episodes, env, told=told)
    print(
        f"{parts.env.spec.name} after {found.step:,} steps, {done.returns.shape[-1]} episodes of "
        f"{float(done.lengths.double().mean()):,.1f} steps: return {done.mean:,.2f} ± {done.std:,.2f}, "
        f"from {float(done.returns.min()):,.2f} to {float(done.returns.max()):,.2f}"
    )
    if state.lanes is not None:
        settings = getattr(found.state, "settings", None)
        _print_lanes(state, done, settings.seeds if settings else None)
    return 0


def _print_lanes(state: Any, done: fnrl.Evaluation, seeds: Any) -> None:
    """A line for each lane, and what they come to."""
    where, means = lanes.shown(state), done.returns.double().mean(-1)
    dead = {i for i in where.values() if bool(state.node.algo.dead[i])}
    for number, i in where.items():
        mark = "  dead: it stands still at its last finite weights" if i in dead else ""
        seed = f", seed {seeds[number]}" if seeds else ""
        print(f"  lane {number}{seed}: {float(means[i]):,.2f}{mark}")
    alive = [float(means[i]) for i in where.values() if i not in dead]
    print(f"{len(where)} lanes, {len(alive)} alive: interquartile mean {lanes.iqm(alive):,.2f}")


def _report(words: Words) -> int:
    parser = parser_of("report", "Compares runs over their seeds: tables here, tables and pictures in one file.")
    parser.usage = "fnrl report DIR... [--out FILE]; --help tells more"
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="run directories, or directories of them")
    known = "an .html or .md file [report.html], or .csv or .json for a sweep"
    parser.add_argument("--out", type=Path, default=Path("report.html"), help=known)
    said = read(parser, words)
    with _refusals():
        made = report.report(said.dirs, said.out)
    for table in report.tables(results.collected(said.dirs)):
        shown = Table(*table.head, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 150).print(shown)
    print(f"written to {made}")
    return 0


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A value that a part refuses is an error of fnrl's own."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise fnrl.CompositionError(str(error)) from error


def _scheme(directory: str, device: str | None = None) -> fnrl.Scheme:
    """The scheme of a run, for another device if one is given: that of the run may not be here."""
    if not Path(directory).is_dir():
        raise fnrl.CheckpointError(f"{directory} is not a run directory")
    config = checkpoint.newest(directory).config
    if device is not None and isinstance(config, dict) and "device" in config:
        config = {**config, "device": device}
    found = rebuild(config, _HINT)
    if not isinstance(found, fnrl.Scheme):
        raise fnrl.CheckpointError(f"{directory} was not saved by a learner: {_HINT}")
    return found


# -- what is printed ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """A warning in one line, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"fnrl: {category.__name__}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drops what libraries print past Python (Bullet: a line for each client), which would tear the live display."""
    if sys.stdout is not sys.__stdout__:
        yield
        return
    sys.stdout.flush()
    ours, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    before, sys.stdout = sys.stdout, os.fdopen(ours, "w", encoding=sys.stdout.encoding)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        sys.stdout.close()
        sys.stdout = before
