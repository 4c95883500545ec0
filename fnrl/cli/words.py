"""The words of a command line: options, help, and what was meant by one that there isn't."""

import argparse
from pathlib import Path
from typing import Any

import fnrl
from fnrl.cli import architecture
from fnrl.cli.options import Option, options
from fnrl.component import nearest
from fnrl.presets import preset

_TRAIN_EPILOG = """\
Options of the parts have dotted names. Another part (--algo SAC, --actor.policy CNN, --actor.recurrent, --env CartPole)
has other options: fnrl train --algo SAC --help. What is
shown as X[:END] may be a line over the run, such as 3e-4:0. Environments with a preset take its values as defaults;
--preset none takes the parts' own."""

Words = list[str]


def parser_of(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(f"fnrl {command}", description=description, epilog=epilog, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.usage = f"fnrl {command} {'--env ENV' if command == 'train' else 'DIR'} [options]; --help tells them"
    return made


def add_common(parser: Any) -> None:
    parser.add_argument("--threads", type=count, default=1, help="of torch, in this process [1]")
    parser.add_argument("--quiet", action="store_true", help="show nothing")


def read_train(words: Words) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = parser_of("train", "Trains an agent, and leaves a run directory.", _TRAIN_EPILOG)
    run = parser.add_argument_group("the run")
    about = "CartPole or BitFlipping (on tensors), a gymnasium id, or module:Name, which imports the module first"
    run.add_argument("--env", required=True, help=about)
    run.add_argument("--steps", type=count, default=1_000_000, help="environment steps to learn from [1000000]")
    run.add_argument("--seed", type=int, default=0, help="of everything [0]")
    run.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="so many seeds, or these, as lanes of one program"
    )
    run.add_argument("--shards", type=count, default=1, help="programs that share the lanes; with --ray one a process")
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
    run.add_argument("--eval-episodes", type=count, default=10, help="episodes of one evaluation [10]")
    run.add_argument("--save-every", type=count, default=100_000, help="steps between checkpoints [100000]")
    run.add_argument("--keep", type=count, default=3, help="checkpoints that stay [3]")
    add_common(run)
    architecture.add_arguments(parser)
    glimpse = _glimpse(words)
    env, algo = str(glimpse.get("env", "CartPole-v1")), glimpse.get("algo")
    known = preset(env if glimpse.get("preset") != "none" else "", str(algo) if algo else None)
    known = {**known, **architecture.brings(glimpse.get("scheme"), {**known, **glimpse})}
    try:
        found = list(options(env, known, glimpse, count(str(glimpse.get("steps", 1e6)))))
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    groups: dict[str, Any] = {}
    for option in found:
        head = option.name.split(".")[0] if option.name != "num_envs" else "env"
        if head not in groups:
            groups[head] = parser.add_argument_group(head)
        _add(groups[head], option)
    said = read(parser, words)
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


def read(parser: argparse.ArgumentParser, words: Words) -> argparse.Namespace:
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
    names = {last, *_ALIASES.get(last, ())}
    same = [f for f in flags if f.removeprefix("--").rsplit(".", 1)[-1].replace("-", "_") in names]
    return f"; did you mean {' or '.join(same)}?" if same else nearest(word, flags)


# what stable-baselines3 and CleanRL call some options
_ALIASES: dict[str, tuple[str, ...]] = {
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


def count(text: str) -> int:
    """A positive whole number, also as 1e6 or 1_000_000."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number < 1 or not number.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(number)
