"""What happens to weights: their beginning, and the application of a merged update."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fnrl.algos.base import AlgoState
from fnrl.component import Schedule
from fnrl.errors import NonFiniteError
from fnrl.lift import Run
from fnrl.merge import merge_moments
from fnrl.parts import Parts
from fnrl.spaces import Box
from fnrl.types import Moments, Normaliser, Tree, Update, Weights


def first_algo(run: Run, key: Tensor) -> AlgoState:
    """Fresh parameters, optimiser, hyper-parameters and normaliser; version 0."""
    return run.over_lanes(lambda k: _first(run.parts, k), key)


def _first(parts: Parts, key: Tensor) -> AlgoState:
    params = parts.actor.init(key)
    params, target, opt = parts.algo.init(parts.actor, params)
    hyper = {name: torch.tensor(at(value, 0)) for name, value in parts.hypers().items()}
    normaliser: Tree = ()
    if parts.normalise_obs is not None:
        obs = parts.env.spec.obs
        normaliser = Normaliser(Moments.zeros(obs.shape if isinstance(obs, Box) else ()), parts.normalise_obs.clip)
    return AlgoState.fresh(Weights(params, target, hyper, normaliser, 0, 0), opt)


def at(value: float | Schedule, env_steps: int) -> float:
    """The value of a hyper-parameter after so many environment steps."""
    return float(value(env_steps)) if isinstance(value, Schedule) else float(value)


def declared(run: Run, state: AlgoState, pinned: Collection[str], settled: bool) -> AlgoState:
    """The state with the hyper-parameters that the parts declare, but for those a user has set (`pinned`).

    A schedule is fixed for the length of a plan: inside one (not `settled`) it keeps its value until the plan's end.
    """
    weights: Weights = state.weights
    hyper = dict(weights.hyper)
    for name, value in run.parts.hypers().items():
        if name not in pinned and (settled or not isinstance(value, Schedule)):
            hyper[name] = torch.full_like(hyper[name], at(value, weights.env_steps))
    return dataclasses.replace(state, weights=dataclasses.replace(weights, hyper=hyper))


def apply_update(
    run: Run, state: AlgoState, update: Update, pinned: Collection[str]
) -> tuple[AlgoState, dict[str, Tensor]]:
    """The state after a merged update, and its metrics. At the end of a plan observations count and schedules move.

    Errors: NonFiniteError when the loss or the gradient is not finite: the state that was passed in is still good. (One
    with simulators, cells or a replay behind it has been stepped all the same: `fork` before, or resume from a save.)
    """
    old: Weights = state.weights
    if update.first:
        state = dataclasses.replace(state, stopped=torch.zeros_like(state.stopped))
    after, metrics = run.graph(run.parts.algo.apply)(state, update.grads, update.info)
    _refuse_non_finite(run, metrics, update, old)
    env_steps = old.env_steps + update.env_steps
    changes: dict[str, Any] = {"version": old.version + 1, "env_steps": env_steps}
    if update.last:
        if not isinstance(update.moments, tuple):
            merged = merge_moments(run, old.normaliser.moments, update.moments)
            changes["normaliser"] = dataclasses.replace(old.normaliser, moments=merged)
        changes["hyper"] = {
            name: torch.full_like(now, at(value, env_steps)) if moves else now
            for name, now in old.hyper.items()
            for value in (run.parts.hypers()[name],)
            for moves in (isinstance(value, Schedule) and name not in pinned,)
        }
    return dataclasses.replace(after, weights=dataclasses.replace(after.weights, **changes)), metrics


def _refuse_non_finite(run: Run, metrics: dict[str, Tensor], update: Update, old: Weights) -> None:
    total = metrics["loss"] + metrics["grad_norm"]
    if bool(torch.isfinite(total).all()):
        return
    bad = [n for n, v in metrics.items() if not bool(torch.isfinite(v).all())]
    lanes = "" if run.lanes is None else f" in lanes {torch.nonzero(~torch.isfinite(total)).flatten().tolist()}"
    raise NonFiniteError(
        f"update {old.version} at node {run.name} is not finite{lanes}: {', '.join(bad)} "
        f"({', '.join(f'{n}={v.flatten().tolist()}' for n, v in metrics.items())}); it was not applied"
    )
