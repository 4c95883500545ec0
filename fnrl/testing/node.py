"""The laws of topologies, with the parts they run."""

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.parts import Parts
from fnrl.scheme import Scheme, SchemeState
from fnrl.testing import laws
from fnrl.topology import Asynchronous, centralised, gradients

RESUMED = "a run that stops and resumes, in steps of any length, is the run that did not stop"
COUNTS = "versions count updates, and environment steps the plans begun"


def check_node(
    topology: Any, parts: Parts, *, updates: int | None = None, max_examples: int = 3, compiled: bool = False
) -> None:
    """The laws of a run of `topology` (nodes that make rollouts or updates are completed) with `parts`, in one process.

    Stopping and resuming anywhere within `updates` (by default two plans and a half), under another global seed and in
    steps of several updates, changes no bit; `step` changes none of its inputs and repeats (a simulator that has moved
    on refuses to); lanes equal solo runs; keys decide; all numbers are finite. `compiled` runs the compiled scheme too.

    Errors: LawError.
    """
    while topology.produces != "weights":
        topology = gradients(topology) if topology.produces == "rollouts" else centralised(topology)
    laws.check_value(topology)
    laws.check_value(parts)
    scheme, plan = Scheme(parts, topology), parts.algo.plan.updates
    total = updates if updates is not None else 2 * plan + (plan + 1) // 2

    def law(seed: int, stop: int, fused: int) -> None:
        _check_resume(scheme, random.key(seed), stop, total, fused)

    laws.for_all(law, max_examples, seed=st.integers(0, 2**31), stop=st.integers(0, total), fused=st.integers(1, total))
    _check_step(scheme)
    _check_lanes(scheme, total)
    if compiled:
        graphs = dataclasses.replace(scheme, compile=True)
        a, b = (_finished(s, s.init(random.key(0)), 2).weights for s in (graphs, scheme))
        laws.close(topology, laws.COMPILED, a, b, "two compiled updates", "two eager ones", 1e-3)


def _finished(scheme: Scheme, state: SchemeState, updates: int, each: int = 1) -> SchemeState:
    """The gathered state after so many updates, `each` to a step; its simulators are closed."""
    try:
        while updates:
            state, _ = scheme.step(state, updates=min(each, updates))
            updates -= min(each, updates)
        return scheme.gather(state)
    finally:
        scheme.close(state)


def _check_resume(scheme: Scheme, key: Tensor, stop: int, total: int, fused: int) -> None:
    node = scheme.topology
    with laws.global_seed(1):
        first = _finished(scheme, scheme.init(key), 1)
        whole = _finished(scheme, scheme.init(key), total)
    laws.finite(node, f"the state after {total} updates", whole)
    turns = _turns(node)
    plans = sum(math.ceil(len(range(i, total, turns)) / scheme.parts.algo.plan.updates) for i in range(turns))
    counted, expected = (whole.version, whole.env_steps), (total, plans * first.env_steps)
    if counted != expected or first.env_steps == 0:
        laws.broken(node, COUNTS, f"after {total} updates (version, env_steps) is {counted}, expected {expected}")
    with laws.global_seed(2):
        pure = _finished(scheme, scheme.init(key), stop)
        laws.check_saved(node, f"the state after {stop} updates", pure)
        resumed = _finished(scheme, scheme.restore(pure), total - stop, fused)
    what = f"the run stopped after {stop} of {total} updates and resumed {fused} at a time"
    laws.same(node, RESUMED, resumed, whole, what, "the run without a stop")


def _turns(node: Any) -> int:
    """Workers that make updates by turns, a plan each."""
    if node is None or node.produces == "rollouts":
        return 1
    return (node.workers if isinstance(node, Asynchronous) else 1) * _turns(getattr(node, "child", None))


def _check_step(scheme: Scheme) -> None:
    node, hosted = scheme.topology, not scheme.parts.env.pure
    state = scheme.init(random.key(1))
    after = state
    try:
        copies = [(path, x, x.clone()) for path, x in tree.paths(state)]
        after, _ = scheme.step(state)
        for path, x, copy in copies:
            if not tree.same_bits(x, copy):
                laws.broken(node, laws.PURE, f"the state's {path} {laws.difference(x, copy)}")
        if hosted:
            laws.refuses_stale(node, laws.STALE, lambda: scheme.step(state))
        else:
            again, _ = scheme.step(state)
            laws.same(node, laws.SAME, after, again, "one step", "the same step again")
    finally:
        scheme.close(after)
    other = _finished(scheme, scheme.init(random.key(2)), 1)
    if tree.same_bits(other.weights.params, after.weights.params):
        laws.broken(node, laws.KEYS, "two keys lead to the same parameters")


def _check_lanes(scheme: Scheme, total: int) -> None:
    """Tensors of the whole state where it is pure; of the weights where simulators pad their records."""
    node, pure = scheme.topology, scheme.parts.env.pure
    keys = torch.stack([random.key(seed) for seed in range(3)])

    def run(key: Tensor, updates: int) -> Any:
        state = _finished(scheme, scheme.init(key), updates)
        if not pure:
            return state.weights
        return dataclasses.replace(
            state.node, algo=dataclasses.replace(state.node.algo, dead=())
        )  # lanes alone have it

    three, two = run(keys, total), run(keys[:2], total)
    laws.same(node, laws.LANES, tree.map(lambda x: x[:2], three), two, "three lanes", "two")
    together = run(keys[:2], 1)
    for i in range(2):
        laws.close(node, laws.SOLO, tree.index(together, i), run(keys[i], 1), f"lane {i}", "alone", 1e-3)
