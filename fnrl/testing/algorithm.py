"""The laws of algorithms."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.algos.base import AlgoState
from fnrl.storages import GAE
from fnrl.testing import laws, strategies
from fnrl.testing.storage import example_actor, example_rollout, example_weights
from fnrl.types import Aux, Params, Plan, Weights

SCALAR = "a loss is one finite number, with metrics that are numbers"
GRADIENT = "grad is the gradient of loss"
DOWNHILL = "the loss decreases along the negative gradient"
LEARNS = "an update moves the parameters downhill, by the learning rate"
STANDS = "a learning rate of zero moves no parameter"
MASKED = "after a stop neither the parameters nor the optimiser move"
TELLS = "apply adds grad_norm to the metrics, and keeps what it was told"


def check_algorithm(
    algo: Any, actor: Any = None, storage: Any = None, *, max_examples: int = 5, compiled: bool = False
) -> None:
    """The laws of an algorithm, on batches that `storage` makes of rollouts of `actor` (by default a small one of
    discrete actions, and `GAE`).

    Besides purity, determinism, lanes, finiteness and being a value: `grad` equals torch.autograd's gradient of `loss`,
    the loss decreases along it, an update moves the parameters downhill, a learning rate of zero moves none, and once
    `target_kl` stopped a plan nothing moves. `compiled` traces `grad` and `apply` as well. Errors: LawError.
    """
    laws.check_value(algo)
    if not isinstance(algo.plan, Plan):
        laws.broken(algo, laws.SHAPES, f"plan is {algo.plan!r}, expected an fnrl.types.Plan")
    actor = actor if actor is not None else example_actor()
    storage = storage if storage is not None else GAE(steps=6)

    def law(seed: int, terminated: float, truncated: float) -> None:
        examples = [_Example(algo, actor, storage, seed + i, terminated, truncated) for i in range(3)]
        _check_loss(algo, examples[0])
        _check_grad(algo, examples)
        _check_apply(algo, examples)

    chance = strategies.chances()
    laws.for_all(law, max_examples, seed=st.integers(0, 2**31), terminated=chance, truncated=chance)
    if compiled:
        example = _Example(algo, actor, storage, 0, 0.3, 0.3)
        laws.check_compiled(algo, algo.grad, *example.graded())
        laws.check_compiled(algo, algo.apply, *example.applied())


class _Example:
    """A state a little away from its beginning, and a batch."""

    def __init__(self, algo: Any, actor: Any, storage: Any, seed: int, terminated: float, truncated: float) -> None:
        self.algo, self.actor = algo, actor
        self.key, envs = random.key(seed), 2 * algo.plan.minibatches
        weights = example_weights(actor, algo, storage, self.key)
        rollout = example_rollout(actor, weights, storage.steps, envs, seed, terminated, truncated)
        data = storage.prepare(storage.append(storage.init(), rollout), actor, weights)
        rows = storage.order(actor, algo.plan, envs, self.key)[0]
        self.batch = storage.take(data, rows)
        vector = weights.params.vector
        moved = vector + 0.05 * random.normal(random.fold_in(self.key, 7), tuple(vector.shape))
        self.weights = dataclasses.replace(weights, params=Params(moved, weights.params.layout))
        self.noise = tree.index(algo.noise(actor, self.key, 1, rows.shape[0]), 0)
        self.state = AlgoState.fresh(self.weights, algo.optimiser.init(self.weights.params))

    def graded(self, weights: Weights | None = None) -> tuple[Any, ...]:
        return self.actor, weights or self.weights, self.batch, self.noise

    def loss(self, vector: Tensor) -> Tensor:
        params = Params(vector, self.weights.params.layout)
        return self.algo.loss(self.actor, params, self.weights, self.batch, self.noise)[0]

    def applied(self, **hyper: float) -> tuple[Any, ...]:
        """A state and an update for it, with these hyper-parameters."""
        grads, aux = self.algo.grad(*self.graded())
        new = {n: torch.full_like(v, hyper[n]) if n in hyper else v for n, v in self.weights.hyper.items()}
        weights = dataclasses.replace(self.weights, hyper=new)
        return dataclasses.replace(self.state, weights=weights), grads, aux.info


def _check_loss(algo: Any, example: _Example) -> None:
    actor, weights, batch, noise = example.graded()
    loss, aux = laws.check_call(algo, algo.loss, actor, weights.params, weights, batch, noise)
    if not isinstance(aux, Aux):
        laws.broken(algo, laws.SHAPES, f"loss gives a {type(aux).__name__} besides the loss, expected fnrl.types.Aux")
    for name, x in {"loss": loss, **aux.info}.items():
        if x.shape != () or not x.is_floating_point():
            laws.broken(algo, SCALAR, f"{name} is {x.dtype}{list(x.shape)}, expected a 0-d float")
    laws.finite(algo, "what loss gives", {"loss": loss, **aux.info})


def _check_grad(algo: Any, examples: list[_Example]) -> None:
    example = examples[0]
    start: Tensor = example.weights.params.vector
    grads, aux = laws.check_call(algo, algo.grad, *example.graded())
    laws.expect(algo, "the gradient", grads, tuple(start.shape), torch.float32)
    leaf = start.clone().requires_grad_()
    loss = example.loss(leaf)
    (expected,) = torch.autograd.grad(loss, leaf)
    laws.finite(algo, "the gradient", {"grad": Params(grads, example.weights.params.layout).tree()})
    laws.close(algo, GRADIENT, {"grad": grads}, {"grad": expected}, "grad", "torch.autograd's")
    if "loss" not in aux.info or not torch.allclose(aux.info["loss"], loss.detach(), rtol=1e-5, atol=1e-6):
        laws.broken(algo, GRADIENT, f"its metrics {sorted(aux.info)} hold no `loss` equal to {float(loss.detach())}")
    if aux.info["loss"].requires_grad or grads.requires_grad:
        laws.broken(algo, GRADIENT, "what it gives still carries an autograd graph")
    norm = float(grads.norm())
    if norm > 1e-3:
        sizes = (3e-2, 1e-2, 3e-3, 1e-3)
        after = [float(example.loss(start - size * grads / norm)) for size in sizes]
        if min(after) >= float(loss.detach()):
            laws.broken(
                algo,
                DOWNHILL,
                f"the loss is {float(loss.detach())}, and {after} after steps of length {sizes} "
                f"against a gradient of norm {norm}",
            )
    laws.check_lanes(algo, algo.grad, *(e.graded() for e in examples))


def _check_apply(algo: Any, examples: list[_Example]) -> None:
    example = examples[0]
    state, grads, info = example.applied(target_kl=1e6)
    after, told = laws.check_call(algo, algo.apply, state, grads, info)
    laws.finite(algo, "what apply gives", (after, told))
    laws.check_saved(algo, "the state after an update", after)
    if tree.flatten(after)[1] != tree.flatten(state)[1]:
        laws.broken(algo, laws.SHAPES, f"apply made {tree.describe(after)} of {tree.describe(state)}")
    if "grad_norm" not in told or any(n not in told for n in info):
        laws.broken(algo, TELLS, f"it was told {sorted(info)}, and tells {sorted(told)}")
    if not torch.allclose(told["grad_norm"], grads.norm(), rtol=1e-4):
        laws.broken(algo, TELLS, f"grad_norm is {float(told['grad_norm'])}, the norm is {float(grads.norm())}")
    moved = after.weights.params.vector - state.weights.params.vector
    if float(grads.norm()) > 1e-3:
        if float(moved @ grads) >= 0.0:
            laws.broken(
                algo, LEARNS, f"(new - old) . gradient = {float(moved @ grads)} in the first update, not negative"
            )
        half, _ = algo.apply(*example.applied(target_kl=1e6, lr=0.5 * float(state.weights.hyper["lr"])))
        less = half.weights.params.vector - state.weights.params.vector
        laws.close(
            algo, LEARNS, {"step": 2.0 * less}, {"step": moved}, "twice a step at half the rate", "the step", 1e-2
        )
    still, _ = algo.apply(*example.applied(target_kl=1e6, lr=0.0))
    laws.same(algo, STANDS, still.weights.params, state.weights.params, "the new parameters", "the old")
    laws.check_lanes(algo, algo.apply, *(e.applied() for e in examples))
    if "target_kl" in state.weights.hyper:
        _check_stop(algo, example)


def _check_stop(algo: Any, example: _Example) -> None:
    state, grads, info = example.applied(target_kl=0.01)
    calls = (
        ("a KL above 1.5 times target_kl", state, {**info, "approx_kl": torch.tensor(0.0151)}, True),
        (
            "a stop before",
            dataclasses.replace(state, stopped=~state.stopped),
            {**info, "approx_kl": torch.tensor(0.0)},
            True,
        ),
        ("a KL below 1.5 times target_kl", state, {**info, "approx_kl": torch.tensor(0.0149)}, False),
    )
    for why, before, metrics, stops in calls:
        after, _ = algo.apply(before, grads, metrics)
        if bool(after.stopped) != stops:
            laws.broken(algo, MASKED, f"after {why}, stopped is {bool(after.stopped)}")
        kept = (after.weights.params, after.opt), (before.weights.params, before.opt)
        if stops:
            laws.same(algo, MASKED, *kept, f"after {why}, what was kept", "what was there")
        elif tree.same_bits(*kept):
            laws.broken(algo, MASKED, f"after {why}, nothing moved")
