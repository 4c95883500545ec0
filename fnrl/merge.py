"""How the products of replicas become one: in worker order, so that the result does not depend on who was first."""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from fnrl import tree
from fnrl.lift import Run
from fnrl.types import Choice, Episodes, Info, Moments, Rollout, Tree, Update


def merge_moments(run: Run, a: Tree, b: Tree) -> Tree:
    """Of both, where `()` is nothing."""
    if isinstance(a, tuple):
        return b
    return a if isinstance(b, tuple) else run.lift(Moments.merge)(a, b)


def merge_rollouts(run: Run, rollouts: Sequence[Rollout]) -> Rollout:
    """Side by side along the environments; the version is the oldest."""
    valid: Tree = ()
    if not all(isinstance(r.valid, tuple) for r in rollouts):
        masks = [torch.ones_like(r.steps.truncated) if isinstance(r.valid, tuple) else r.valid for r in rollouts]
        valid = torch.cat(masks, run.axis + 1)
    return Rollout(
        tree.concatenate([r.steps for r in rollouts], run.axis + 1),
        reduce(lambda a, b: merge_moments(run, a, b), [r.moments for r in rollouts]),
        min(r.version for r in rollouts),
        sum(r.env_steps for r in rollouts),
        valid,
        () if isinstance(rollouts[0].sound, tuple) else reduce(torch.logical_and, [r.sound for r in rollouts]),
    )


def merge_updates(run: Run, updates: Sequence[Update]) -> Update:
    """The mean of gradients and of metrics, summed in worker order; moments merged; environment steps added."""
    n = len(updates)

    def mean(*xs: Tensor) -> Tensor:
        return reduce(torch.add, xs) / n

    return Update(
        mean(*[u.grads for u in updates]),
        tree.map(mean, updates[0].info, *[u.info for u in updates[1:]]),
        reduce(lambda a, b: merge_moments(run, a, b), [u.moments for u in updates]),
        updates[0].first,
        updates[0].last,
        sum(u.env_steps for u in updates),
        min(u.version for u in updates),
    )


def merge_infos(infos: Iterable[Info]) -> Info:
    """Means of metrics, all episodes, lags and choices, host facts added. One after another: small tensors that were
    kept of every update would lie between the large ones, and memory that is free in pieces is of no use.

    Errors: ValueError when infos that have metrics have different ones.
    """
    report: dict[str, float] = {}
    lags: dict[str, tuple[int, ...]] = {}
    metrics: dict[str, Tensor] = {}
    told, episodes, choices = 0, list[Episodes](), list[Choice]()
    for info in infos:
        for name, value in info.report.items():
            report[name] = report.get(name, 0.0) + value
        for name, behind in info.lags.items():
            lags[name] = lags.get(name, ()) + behind
        if info.metrics:
            if told and info.metrics.keys() != metrics.keys():
                raise ValueError(f"infos differ in metrics: {sorted(metrics)} and {sorted(info.metrics)}")
            metrics = {n: metrics[n] + x for n, x in info.metrics.items()} if told else info.metrics
            told += 1
        episodes += info.episodes
        choices += info.choices
    if told > 1:
        metrics = {n: x / told for n, x in metrics.items()}
    return Info(metrics, tuple(episodes), report, lags, tuple(choices))
