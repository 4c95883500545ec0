"""The laws of topologies, with the parts they run."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from fnrl import random, tree
from fnrl.collect import CollectState
from fnrl.errors import StaleStateError
from fnrl.parts import Parts
from fnrl.scheme import Scheme, SchemeState
from fnrl.testing import laws
from fnrl.topology import centralised, collect, gradients

RESUMED = "a run that stops and resumes is the run that did not"
FUSED = "k updates in one step are k steps of one update"
COUNTS = "versions count updates, and environment steps what was learnt from"
SHAPED = "a state keeps its structure, shapes and dtypes"


def check_node(
    topology: Any, parts: Parts, *, updates: int | None = None, max_examples: int = 3, compiled: bool = False
) -> None:
    """The laws of a run: `topology` (collect and gradients nodes are completed) with `parts`, in one process.

    `step` is pure and repeatable, stopping and resuming anywhere within `updates` (by default two plans and a half)
    changes no bit, fused updates are single ones, lanes equal solo runs, keys decide, and all numbers are finite.
    Simulators are forked and restored rather than stepped twice. `compiled` runs the compiled scheme as well.

    Errors: LawError.
    """
    laws.check_value(parts)
    while topology.produces != "weights":
        topology = gradients(topology) if topology.produces == "rollouts" else centralised(topology)
    scheme = Scheme(parts, topology)
    laws.check_value_of(topology, f"{topology!r}")
    total = updates if updates is not None else 2 * parts.algo.plan.updates + parts.algo.plan.updates // 2 + 1

    def law(seed: int, stop: int, fused: int) -> None:
        _check_resume(scheme, random.key(seed), stop, total, fused)

    laws.for_all(
        law, max_examples, seed=st.integers(0, 2**31), stop=st.integers(0, total), fused=st.integers(1, total)
    )
    _check_lanes(scheme, total)
    if compiled:
        graphs = dataclasses.replace(scheme, compile=True)
        (a, _), (b, _) = (_finish(s, s.init(random.key(0)), 2) for s in (graphs, scheme))
        laws.close(topology, laws.COMPILED, a.weights, b.weights, "compiled", "eager", 1e-3)


def _finish(scheme: Scheme, state: SchemeState, updates: int, each: int = 1) -> tuple[SchemeState, SchemeState]:
    """The gathered state after so many updates, `each` to a step; the simulators are closed. And the state itself."""
    left = updates
    while left:
        state, _ = scheme.step(state, updates=min(each, left))
        left -= min(each, left)
    pure = scheme.gather(state)
    scheme.close(state)
    return pure, state


def _check_resume(scheme: Scheme, key: Any, stop: int, total: int, fused: int) -> None:
    node, parts = scheme.topology, scheme.parts
    hosted = not parts.env.pure
    with laws.global_seed(1):
        whole, last = _finish(scheme, scheme.init(key), total)
    laws.finite(node, f"the state after {total} updates", whole)
    plans = -(-total // parts.algo.plan.updates)
    steps = plans * parts.storage.steps * _envs(scheme)
    if (whole.version, whole.env_steps) != (total, steps):
        laws.broken(
            node, COUNTS, f"after {total} updates version and env_steps are {(whole.version, whole.env_steps)}, "
            f"expected {(total, steps)}"
        )
    with laws.global_seed(2):
        state = scheme.init(key)
        for _ in range(stop):
            state, _ = scheme.step(state)
        pure = laws.check_gather(scheme, state)
        copies = [x.clone() for x in tree.leaves(pure)]
        after, _ = scheme.step(state)
        laws.same(node, laws.PURE, [*tree.leaves(pure)], copies, "the state before a step", "what it was")
        if hosted:
            _refuses_stale(scheme, state, after)
        resumed, _ = _finish(scheme, scheme.restore(pure), total - stop, each=fused)
        scheme.close(after)
    names = f"resumed after {stop} of {total} updates and stepped {fused} at a time", "the run without a stop"
    laws.same(node, RESUMED, resumed, whole, *names)
    if not hosted:
        again, _ = scheme.step(state)
        laws.same(node, laws.SAME, after, again, "one step", "the same step again")
    del last


def _refuses_stale(scheme: Scheme, state: SchemeState, after: SchemeState) -> None:
    """A simulator moves when a rollout is collected; until then the old state may be stepped again."""
