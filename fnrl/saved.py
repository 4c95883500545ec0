"""What a checkpoint of a learner holds, and how what it says and what the code says come together again."""

import dataclasses
import os
import warnings
from typing import Any

from fnrl import checkpoint, random
from fnrl.apply import first_algo
from fnrl.checkpoint import ANY, CheckpointWarning
from fnrl.component import printed
from fnrl.history import Told
from fnrl.lift import Run
from fnrl.record import host, record
from fnrl.scheme import Scheme, SchemeState
from fnrl.settings import Evaluate, Settings, of_evaluation
from fnrl.topology import RootState


@record
class LearnerState:
    """What a checkpoint of a learner holds: the scheme's gathered state, and what was told of it so far."""

    scheme: SchemeState
    told: Told | tuple[Told, ...]  # one for each lane
    settings: Settings = host()


def like_of(scheme: Scheme, count: int | None, which: tuple[int, ...]) -> LearnerState:
    """What a checkpoint of the scheme must look like, with so many lanes."""
    run = Run(scheme.parts, scheme.executor, lanes=count, which=which)
    key = random.key(0) if count is None else random.key(0).expand(count, 2)
    return LearnerState(SchemeState(RootState(first_algo(run, key), ANY)), ANY, ANY)


def continuing(
    log_dir: str | os.PathLike[str], scheme: Scheme, target_steps: int | None, evaluation: Evaluate | None
) -> tuple[Any, Settings, Evaluate | None]:
    """What the newest checkpoint must look like, the settings to go on with, and the evaluation: what is given counts,
    the rest is as it was saved. See `Learner.resume`.
    """
    found = checkpoint.newest(log_dir)
    said: LearnerState = found.state
    like = ANY if not isinstance(said, LearnerState) else like_of(scheme, said.scheme.lanes, said.scheme.which)
    checkpoint.require(found, LearnerState(SchemeState(ANY), ANY, ANY) if like is ANY else like)
    settings = said.settings
    if target_steps is not None and target_steps != settings.target_steps:
        settings = dataclasses.replace(settings, target_steps=target_steps)
        if target_steps < said.scheme.env_steps:
            raise ValueError(
                f"Learner.resume(target_steps={target_steps}): {said.scheme.env_steps} environment steps are done "
                "already; give as many, or more"
            )
    if evaluation is not None:
        settings = dataclasses.replace(settings, **of_evaluation(evaluation))
    elif settings.every:
        evaluation = settings.evaluation()
    other = checkpoint.diff(found.config, printed(scheme))
    if other:
        first = f"{found.path} was saved with another configuration (saved -> given; what is given counts from now on):"
        hyper, pinned = said.scheme.weights.hyper, said.scheme.node.pinned
        values = {n: ", ".join(f"{x:g}" for x in hyper[n].reshape(-1).tolist()) for n in pinned}
        stay = [f"{n} stays {x}: it was set" for n, x in values.items()]
        warnings.warn("\n  ".join([first, *other, *stay]), CheckpointWarning, stacklevel=3)
    return like, settings, evaluation
