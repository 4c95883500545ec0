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
from fnrl.cli.options import Option, build, options, pair
from fnrl.component import nearest
from fnrl.config import rebuild
from fnrl.presets import preset

_ERRORS = (
    fnrl.CompositionError,
    fnrl.NonFiniteError,
    fnrl.EnvironmentFault,
    fnrl.StaleStateError,
    fnrl.CheckpointError,
)
_HINT = "go on with it from Python, where its scheme is: Learner.resume(directory, scheme)"
_TRAIN_EPILOG = """\
Options of the parts have dotted names. Another part (--algo SAC, --actor.policy CNN, --actor.recurrent, --env CartPole)
has other options: fnrl train --algo SAC --help. What is
shown as X[:END] may be a line over the run, such as 3e-4:0. Environments with a preset take its values as defaults;
--preset none takes the parts' own."""

Words = list[str]


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
    said, values = _read_train(words)
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
    parser = _parser("resume", "Goes on with a run from its newest good checkpoint, exactly.")
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--steps", type=_count, help="go on to so many environment steps instead")
    about = "set hyper-parameters from now on, such as lr=1e-4; a schedule of that name no longer moves it"
    parser.add_argument("--set", nargs="+", type=pair, default=[], metavar="NAME=X", help=about)
    anew = "where a simulator can't be brought back exactly, begin its episode anew instead of refusing"
    parser.add_argument("--device", help="where tensors live from now on, such as cpu or cuda [as before]")
    parser.add_argument("--inexact", action="store_true", help=anew)
    _common(parser)
    said = _read(parser, words)
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
    parser = _parser("evaluate", "Plays whole episodes with the most likely actions of a run's newest good checkpoint.")
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--episodes", type=_count, default=100, help="whole episodes [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes [0]")
    _common(parser)
    said = _read(parser, words)
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
    parser = _parser("report", "Compares runs over their seeds: tables here, tables and pictures in one file.")
    parser.usage = "fnrl report DIR... [--out FILE]; --help tells more"
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="run directories, or directories of them")
    known = "an .html or .md file [report.html], or .csv or .json for a sweep"
    parser.add_argument("--out", type=Path, default=Path("report.html"), help=known)
    said = _read(parser, words)
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


# -- the command line -----------------------------------------------------------------------------------------------


def _parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(f"fnrl {command}", description=description, epilog=epilog, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.usage = f"fnrl {command} {'--env ENV' if command == 'train' else 'DIR'} [options]; --help tells them"
    return made


def _common(parser: Any) -> None:
    parser.add_argument("--threads", type=_count, default=1, help="of torch, in this process [1]")
    parser.add_argument("--quiet", action="store_true", help="show nothing")


def _read_train(words: Words) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = _parser("train", "Trains an agent, and leaves a run directory.", _TRAIN_EPILOG)
    run = parser.add_argument_group("the run")
    about = "CartPole or BitFlipping (on tensors), a gymnasium id, or module:Name, which imports the module first"
    run.add_argument("--env", required=True, help=about)
    run.add_argument("--steps", type=_count, default=1_000_000, help="environment steps to learn from [1000000]")
    run.add_argument("--seed", type=int, default=0, help="of everything [0]")
    run.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="so many seeds, or these, as lanes of one program"
    )
    run.add_argument("--shards", type=_count, default=1, help="programs that share the lanes; with --ray one a process")
    run.add_argument("--dir", type=Path, help="run directory [runs/ENV-ALGO-SEED-TIME]")
    run.add_argument("--preset", choices=("auto", "none"), default="auto", help="defaults for the environment [auto]")
    run.add_argument("--scheme", help=f"an architecture by name: {', '.join(fnrl.schemes.NAMED)} [a2c]")
    run.add_argument("--workers", type=int, help="its workers, each with its own environments [none]")
    run.add_argument("--ray", action="store_true", help="workers in Ray cells, one process each")
    run.add_argument("--compile", action="store_true", help="compile a few small graphs on first use")
    run.add_argument("--device", default="cpu", help="where tensors live, such as cpu or cuda [cpu]")
    run.add_argument(
        "--eval-every", type=int, help="steps between evaluations, 0 for none [a tenth of --steps, at least 20000]"
    )
    run.add_argument("--eval-episodes", type=_count, default=10, help="episodes of one evaluation [10]")
    run.add_argument("--save-every", type=_count, default=100_000, help="steps between checkpoints [100000]")
    run.add_argument("--keep", type=_count, default=3, help="checkpoints that stay [3]")
    _common(run)
    architecture.add_arguments(parser)
    glimpse = _glimpse(words)
    env, algo = str(glimpse.get("env", "CartPole-v1")), glimpse.get("algo")
    known = preset(env if glimpse.get("preset") != "none" else "", str(algo) if algo else None)
    known = {**known, **architecture.brings(glimpse.get("scheme"), {**known, **glimpse})}
    try:
        found = list(options(env, known, glimpse, _count(str(glimpse.get("steps", 1e6)))))
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    groups: dict[str, Any] = {}
    for option in found:
        head = option.name.split(".")[0] if option.name != "num_envs" else "env"
        if head not in groups:
            groups[head] = parser.add_argument_group(head)
        _add(groups[head], option)
    said = _read(parser, words)
    return said, {option.name: getattr(said, option.name) for option in found}


def _add(group: Any, option: Option) -> None:
    default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    text = f"{option.help} [{default}]".replace("%", "%%")
    flag = f"--{option.name if '.' in option.name else option.name.replace('_', '-')}"
    about: dict[str, Any] = {"dest": option.name, "default": option.default, "help": text}
    if option.read is None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **about)
    elif option.choices:
        group.add_argument(flag, choices=option.choices, **about)
    else:
        group.add_argument(flag, type=option.read, nargs="*" if option.many else None, metavar=option.metavar, **about)


def _glimpse(words: Words) -> dict[str, Any]:
    """The word after each option, or whether it is on: enough to know which parts are chosen, and so which options."""
    found: dict[str, Any] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--"):
            found[name.removeprefix("no_")] = value if equals else not name.startswith("no_") and _not_option(after)
    return found


def _not_option(word: str) -> Any:
    return True if word.startswith("--") else word


def _read(parser: argparse.ArgumentParser, words: Words) -> argparse.Namespace:
    flags = [s for action in parser._actions for s in action.option_strings]
    said, extra = parser.parse_known_args(_joined([_spelt(w, {s.replace("_", "-"): s for s in flags}) for w in words]))
    unknown = [x.split("=")[0] for x in extra if x.startswith("--")]
    if unknown:
        parser.error(f"no option {unknown[0]}{_meant(unknown[0], [s for s in flags if s.startswith('--')])}")
    if extra:
        parser.error(f"not understood: {' '.join(extra)}")
    return said


def _meant(word: str, flags: list[str]) -> str:
    """The options whose last name is that of the word, or what others call so; else the nearest."""
    last = word.removeprefix("--").rsplit(".", 1)[-1].replace("-", "_")
    names = {last, *_ELSEWHERE.get(last, ())}
    same = [f for f in flags if f.removeprefix("--").rsplit(".", 1)[-1].replace("-", "_") in names]
    return f"; did you mean {' or '.join(same)}?" if same else nearest(word, flags)


# what stable-baselines3 and CleanRL call some options
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "batch_size": ("batch", "minibatches"),
    "n_steps": ("steps",),
    "num_steps": ("steps",),
    "total_timesteps": ("steps",),
    "timesteps": ("steps",),
    "n_epochs": ("epochs",),
    "update_epochs": ("epochs",),
    "num_minibatches": ("minibatches",),
    "clip_range": ("clip",),
    "clip_coef": ("clip",),
    "ent_coef": ("entropy_coef",),
    "vf_coef": ("value_coef",),
    "n_envs": ("num_envs",),
    "buffer_size": ("capacity",),
    "learning_starts": ("warmup",),
    "env_id": ("env",),
}


def _spelt(word: str, flags: dict[str, str]) -> str:
    """An option's name as it was declared, whether written with - or _."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    plain = "--" + name[2:].replace("_", "-")
    return flags.get(plain, name) + equals + value


def _joined(words: Words) -> Words:
    """`--x -1e-3` as `--x=-1e-3`: argparse takes the second word for an option."""
    joined: Words = []
    for word in words:
        if (
            joined
            and joined[-1].startswith("--")
            and "=" not in joined[-1]
            and word.startswith("-")
            and _is_number(word)
        ):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text.split(":")[0])
    except ValueError:
        return False
    return True


def _count(text: str) -> int:
    """A positive whole number, also as 1e6 or 1_000_000."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(number)


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
