"""What happens to weights: their beginning, and the application of a merged update."""

import math
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from fnrl import tree
from fnrl.algos.base import AlgoState
from fnrl.autodiff import under_transform
from fnrl.component import PerLane, Schedule
from fnrl.errors import DeadLaneWarning, NonFiniteError
from fnrl.lift import Run
from fnrl.merge import merge_moments
from fnrl.parts import Parts
from fnrl.record import replace
from fnrl.spaces import Box
from fnrl.types import Moments, Normaliser, Params, Tree, Update, Weights


def first_algo(run: Run, key: Tensor) -> AlgoState:
    """Fresh parameters, optimiser, hyper-parameters and normaliser; version 0."""
    algo = run.over_lanes(lambda k: _first(run.parts, k), key)
    weights = replace(algo.weights, hyper=hypers_at(run, 0, run.parts.hypers()))
    dead: Tree = () if run.lanes is None else torch.zeros(run.lanes, dtype=torch.bool, device=run.device)
    return replace(algo, weights=weights, dead=dead)


def _first(parts: Parts, key: Tensor) -> AlgoState:
    params = parts.actor.init(key)
    params, target, opt = parts.algo.init(parts.actor, params)
    normaliser: Tree = ()
    if parts.normalise_obs is not None:
        obs = parts.env.spec.obs
        normaliser = Normaliser(Moments.zeros(obs.shape if isinstance(obs, Box) else ()), parts.normalise_obs.clip)
    return AlgoState.fresh(Weights(params, target, {}, normaliser, 0, 0), opt)


def hypers_at(run: Run, env_steps: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Hyper-parameters as the parts declare them after so many environment steps: 0-d, or `[S]` with lanes."""

    def tensor(value: float | Schedule) -> Tensor:
        if run.lanes is None:
            return torch.full((), at(value, env_steps), device=run.device)
        each = [at(value.values[i] if isinstance(value, PerLane) else value, env_steps) for i in run.numbers]
        return torch.tensor(each, device=run.device)

    declared = run.parts.hypers()
    return {n: tensor(declared[n]) for n in names}


def at(value: float | Schedule, env_steps: int) -> float:
    """The value of a hyper-parameter after so many environment steps."""
    return float(value) if isinstance(value, (int, float)) else float(value(env_steps))


def declared(run: Run, state: AlgoState, pinned: Collection[str], settled: bool) -> AlgoState:
    """The state with the hyper-parameters that the parts declare, but for those a user has set (`pinned`).

    A schedule is fixed for the length of a plan: inside one (not `settled`) it keeps its value until the plan's end.
    """
    weights: Weights = state.weights
    stay = {*pinned, *(() if settled else (n for n, x in run.parts.hypers().items() if isinstance(x, Schedule)))}
    moved = hypers_at(run, weights.env_steps, (n for n in run.parts.hypers() if n not in stay))
    hyper = {**weights.hyper, **moved}
    return replace(state, weights=replace(weights, hyper=hyper))


def apply_update(
    run: Run, state: AlgoState, update: Update, pinned: Collection[str]
) -> tuple[AlgoState, dict[str, Tensor]]:
    """The state after a merged update, and its metrics. At the end of a plan observations count and schedules move.

    A lane whose loss, gradient or new parameters are not finite is dead from there on: nothing of it moves, its metrics
    are NaN, and no bit of the others changes; `alive` says which are left.

    Errors: NonFiniteError when the loss, the gradient or a new parameter of a solo run, or of every lane, is not
    finite: the state that was passed in is still good. (One with simulators, cells or a replay behind it has been
    stepped all the same: `fork` before, or resume from a save.)
    """
    old: Weights = state.weights
    if update.first and "target_kl" in old.hyper:
        state = replace(state, stopped=torch.zeros_like(state.stopped))
    algo, number = run.parts.algo, old.version + 1
    rare = algo.target_every > 1  # then no graph reads and writes a target that mostly stays as it is
    after, metrics, finite = run.graph(_apply)(algo, state, update.grads, update.info, not rare)
    if rare and number % algo.target_every == 0:
        now = after.weights
        target = run.lift(algo.move_target)(now.target, now.params, now.hyper, state.updates)
        after = replace(after, weights=replace(now, target=target))
    dead = _dead(run, metrics, update, state, after.weights.params, finite)
    losing = isinstance(dead, Tensor) and bool(dead.any())
    after = replace(after, dead=dead)
    if losing:
        after = tree.where(dead, replace(state, dead=dead), after)
    env_steps = old.env_steps + update.env_steps
    changes: dict[str, Any] = {"version": number, "env_steps": env_steps}
    if update.last:
        if not isinstance(update.moments, tuple):
            merged = merge_moments(run, old.normaliser.moments, update.moments)
            kept = tree.where(dead, old.normaliser.moments, merged) if losing else merged
            changes["normaliser"] = replace(old.normaliser, moments=kept)
        moving = [n for n in run.parts.moving if n not in pinned]
        changes["hyper"] = {**old.hyper, **hypers_at(run, env_steps, moving)}
    after = replace(after, weights=replace(after.weights, **changes))
    if isinstance(dead, Tensor):
        metrics = {n: torch.where(dead, math.nan, x) for n, x in metrics.items()} if losing else metrics
        metrics = {**metrics, "alive": (~dead).float()}
    return after, metrics


def _apply(
    algo: Any, state: AlgoState, grads: Tensor, info: dict[str, Tensor], move: bool
) -> tuple[AlgoState, Any, Tensor]:
    """`algo.apply`, and whether all is finite: in one graph, for the parameters are read once as they are
    written. With `move=False` the target stays as it is.
    """
    given = state if move else replace(state, weights=replace(state.weights, target=()))
    after, metrics = algo.apply(given, grads, info)
    if not move:
        after = replace(after, weights=replace(after.weights, target=state.weights.target))
    vector = after.weights.params.vector
    low, high = (vector.amin(-1), vector.amax(-1)) if under_transform() else torch.aminmax(vector)
    largest = torch.maximum(high, -low)  # a NaN is both: a fraction of the cost of asking each
    return after, metrics, torch.isfinite(metrics["loss"] + metrics["grad_norm"] + largest)


def _dead(
    run: Run, metrics: dict[str, Tensor], update: Update, state: AlgoState, params: Params, finite: Tensor
) -> Tree:
    """The lanes that are dead after this update `[S]` (`()` for a solo run), told where they are new."""
    if run.lanes is None or not isinstance(state.dead, Tensor):
        _refuse_non_finite(run, metrics, params, finite, update, state.weights)
        return ()
    bad = ~finite
    dead = state.dead | bad
    if not bool(bad.any()):
        return dead
    if bool(dead.all()):
        _refuse_non_finite(run, metrics, params, finite, update, state.weights)
    for i in torch.nonzero(bad & ~state.dead).flatten().tolist():
        values = ", ".join(f"{n}={float(v[i]):.6g}" for n, v in metrics.items())
        hyper = ", ".join(f"{n}={float(v[i]):.6g}" for n, v in state.weights.hyper.items())
        warnings.warn(
            f"lane {run.numbers[i]} is dead: update {state.weights.version} at node {run.name} is not finite "
            f"({values}; its hyper-parameters: {hyper}). It stays as it was before; the other lanes go on unchanged",
            DeadLaneWarning,
            stacklevel=5,
        )
    return dead


def _refuse_non_finite(
    run: Run, metrics: dict[str, Tensor], params: Params, finite: Tensor, update: Update, old: Weights
) -> None:
    if bool(finite if run.lanes is None else finite.all()):
        return
    named = {**metrics, **params.tree()}
    bad = [n for n, v in named.items() if not bool(torch.isfinite(v).all())]
    lanes = "" if run.lanes is None else " in any lane that is left"
    raise NonFiniteError(
        f"update {old.version} at node {run.name} is not finite{lanes}: {', '.join(bad)} "
        f"({', '.join(f'{n}={v.flatten().tolist()}' for n, v in metrics.items())}); it was not applied"
    )
