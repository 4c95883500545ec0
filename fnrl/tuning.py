"""Search by optuna: the trials of a study as lanes of one program, a batch of them at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fnrl import lanes
from fnrl.errors import NonFiniteError
from fnrl.learner import Evaluate, Learner
from fnrl.scheme import Scheme
from fnrl.sweep import LogUniform, Uniform, chosen

Range = Uniform | Sequence[float]


def tune(
    study: Any,
    scheme: Scheme,
    target_steps: int,
    log_dir: str | os.PathLike[str] | None = None,
    *,
    trials: int,
    at_once: int = 8,
    seeds: int | Sequence[int] | Tensor = 1,
    episodes: int = 10,
    **space: Range,
) -> None:
    """Runs `trials` trials of an optuna study that maximises, `at_once` of them, with every seed each, as one program.

        study = optuna.create_study(direction="maximize")
        fnrl.tune(study, scheme, 100_000, trials=64, seeds=2, lr=fnrl.LogUniform(1e-5, 1e-2), clip=[0.1, 0.2, 0.3])

    A trial's value is the interquartile mean over its seeds of the mean return of `episodes` deterministic episodes
    after `target_steps`; one with a lane that died fails, and where training is broken off all of the batch do. Optuna
    chooses a batch before it sees any of it, and nothing is pruned. With `log_dir` each batch is a run there, named by
    its first trial.

    Errors: ImportError without optuna (`fnrl[optuna]`); ValueError for a study of another direction, TypeError for a
    range that is neither a distribution nor numbers; what `fnrl.sweep` refuses.
    """
    optuna = _optuna()
    if [d.name for d in study.directions] != ["MAXIMIZE"]:
        raise ValueError(
            f"tune: the study's direction is {[d.name for d in study.directions]}, and returns are to be maximised: "
            'optuna.create_study(direction="maximize")'
        )
    for name, count in (("trials", trials), ("at_once", at_once)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"tune({name}={count!r}): expected an int of at least 1")
    distributions = {name: _distribution(optuna, name, given) for name, given in space.items()}
    for begin in range(0, trials, at_once):
        batch = [study.ask(distributions) for _ in range(min(at_once, trials - begin))]
        values: list[float | None] = [None] * len(batch)
        where = None if log_dir is None else Path(log_dir) / f"trial-{batch[0].number}"
        try:
            values = _values(scheme, [dict(t.params) for t in batch], seeds, target_steps, where, episodes)
        finally:
            for trial, value in zip(batch, values, strict=True):
                failed = optuna.trial.TrialState.FAIL if value is None else None
                study.tell(trial, value, state=failed)


def _values(
    scheme: Scheme,
    settings: list[dict[str, float]],
    seeds: int | Sequence[int] | Tensor,
    target_steps: int,
    where: Path | None,
    episodes: int,
) -> list[float | None]:
    """What each setting comes to; None for one with a dead lane."""
    made = chosen(scheme, settings, seeds)
    last = Evaluate(every=target_steps, episodes=episodes)
    with Learner(made.scheme, target_steps, where, evaluation=last, seeds=made.seeds) as learner:
        try:
            learner.train(progress=False)
        except NonFiniteError:  # no lane is left
            return [None] * len(settings)
        scores = learner.evaluate().returns.mean(-1).tolist()
        dead = learner.state.node.algo.dead.tolist()[: len(made)]
    each = len(made) // len(settings)
    of = [range(i, i + each) for i in range(0, len(made), each)]
    return [None if any(dead[i] for i in lane) else lanes.iqm([scores[i] for i in lane]) for lane in of]


def _distribution(optuna: Any, name: str, given: Range) -> Any:
    if isinstance(given, Uniform):
        return optuna.distributions.FloatDistribution(given.low, given.high, log=isinstance(given, LogUniform))
    numbers = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) for x in given):
        raise TypeError(f"tune({name}={given!r}): expected a Uniform, a LogUniform or a sequence of numbers")
    return optuna.distributions.CategoricalDistribution(list(given))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tune needs optuna: pip install 'fnrl[optuna]'") from error
    return optuna
