"""The laws of storages."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.actors import OnPolicyActorCritic
from fnrl.algos import PPO
from fnrl.apply import at
from fnrl.component import hypers
from fnrl.errors import CompositionError
from fnrl.networks import GRU, MLP
from fnrl.record import fields_of
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.testing import laws, strategies
from fnrl.testing.actor import acted
from fnrl.testing.replay import check_replay
from fnrl.types import Plan, Rollout, Transition, Weights

HOLDS = "a storage is ready when it has been given a rollout, and not before or after"
WHOLE = "nothing is lost: a rollout that waits is not written over"
ONCE = "an epoch uses every sample once, as it was collected"
ORDERS = "the order of samples is drawn anew from its key"
DIVIDES = "a plan that does not divide a rollout is refused"
TERMINAL = "nothing follows a termination"
TIME_LIMIT = "a time limit bootstraps from the true successor"
CUT = "the end of a rollout bootstraps from the true successor"
LEAK = "nothing of the next episode reaches this one"


def check_storage(
    storage: Any, actor: Any = None, algo: Any = None, *, max_examples: int = 5, compiled: bool = False
) -> None:
    """The laws of a storage, with `actor` (by default one without memory and one with), and the plan and
    hyper-parameters of `algo` (by default PPO's, in two epochs of two minibatches).

    Of a replay: appends in place agree with those to copies, stale states are refused, forks are apart, what is saved
    comes back, samples of one step are the transitions that were collected, drawn alike (chi-square), or by their
    errors where it is `prioritised` (fnrl.Prioritised). The rest is of on-policy storages.

    Besides purity, determinism, lanes, finiteness and being a value: nothing is lost, every sample is used once an
    epoch and as it was collected, time limits and the rollout's end bootstrap from the true successor, terminations
    from nothing, and nothing leaks from one episode into the one before. `compiled` traces `prepare` and `take`.

    Errors: LawError.
    """
    laws.check_value(storage)
    if storage.family == "off-policy":
        spec = actor.spec if actor is not None else EnvSpec("an environment", Box((3,)), Discrete(3))
        check_replay(storage, spec, 2, max_examples)
        return
    algo = algo if algo is not None else PPO(epochs=2, minibatches=2)
    for who in (actor,) if actor is not None else (example_actor(), example_actor(memory=3)):
        _check_with(storage, who, algo, max_examples, compiled)


def _check_with(storage: Any, actor: Any, algo: Any, max_examples: int, compiled: bool) -> None:
    envs = 2 * algo.plan.minibatches

    def law(seed: int, terminated: float, truncated: float) -> None:
        examples = [_Example(storage, actor, algo, envs, seed + i, terminated, truncated) for i in range(3)]
        _check_flow(storage, examples[0])
        _check_samples(storage, examples)
        _check_targets(storage, examples[0])

    chance = strategies.chances()
    laws.for_all(law, max_examples, seed=st.integers(0, 2**31), terminated=chance, truncated=chance)
    if compiled:
        example = _Example(storage, actor, algo, envs, 0, 0.3, 0.3)
        laws.check_compiled(storage, storage.prepare, *example.prepared())
        laws.check_compiled(storage, storage.take, example.data(), example.order(random.key(0))[0])


def example_actor(memory: int = 0, spec: EnvSpec | None = None) -> OnPolicyActorCritic:
    """A small actor, with so much memory."""
    spec = spec or EnvSpec("an environment", Box((3,)), Discrete(3))
    recurrent = GRU(memory) if memory else None
    return OnPolicyActorCritic(spec, policy=MLP((5,)), value=MLP((6,)), recurrent=recurrent)


def example_weights(actor: Any, algo: Any, storage: Any, key: Tensor) -> Weights:
    """Weights as a scheme would begin with."""
    params, target, _ = algo.init(actor, actor.init(key))
    hyper = {n: torch.tensor(at(value, 0)) for n, value in hypers(algo, storage, actor).items()}
    return Weights(params, target, hyper, (), version=0, env_steps=0)


def example_rollout(
    actor: Any, weights: Weights, steps: int, envs: int, seed: int, terminated: float, truncated: float
) -> Rollout:
    """A rollout `[T, N]` acted by `actor`, whose `logp` (of a policy a little older) names every sample."""
    made = strategies.make_rollout(actor.spec, steps, envs, seed, terminated, truncated)
    steps_, _ = acted(actor, weights.params, made, random.fold_in(random.key(seed), 1))
    spread = torch.randperm(made.logp.numel(), generator=torch.Generator().manual_seed(seed))
    logp = steps_.logp.mean() + spread.reshape(made.logp.shape) * (0.5 / made.logp.numel())
    return Rollout(dataclasses.replace(steps_, logp=logp), (), version=0, env_steps=made.reward.numel())


class _Example:
    """A storage with a rollout in it, and all that its methods take."""

    def __init__(
        self, storage: Any, actor: Any, algo: Any, envs: int, seed: int, terminated: float, truncated: float
    ) -> None:
        self.storage, self.actor, self.plan, self.envs = storage, actor, algo.plan, envs
        self.weights = example_weights(actor, algo, storage, random.key(seed))
        self.rollout = example_rollout(actor, self.weights, storage.steps, envs, seed, terminated, truncated)

    def prepared(self, steps: Transition | None = None) -> tuple[Any, ...]:
        rollout = self.rollout if steps is None else dataclasses.replace(self.rollout, steps=steps)
        return self.storage.append(self.storage.init(), rollout), self.actor, self.weights

    def data(self) -> Any:
        return self.storage.prepare(*self.prepared())

    def order(self, key: Tensor) -> Tensor:
        return self.storage.order(self.actor, self.plan, self.envs, key)

    def targets(self, steps: Transition) -> Tensor:
        """The target of every sample, `[T, N]`."""
        data = self.storage.prepare(*self.prepared(steps))
        if self.storage.corrects:  # logp is the present policy's, and rows are in the order of the rollout
            return data.target.reshape(steps.reward.shape)
        order = torch.argsort(data.logp.flatten())
        back = torch.argsort(torch.argsort(steps.logp.flatten()))
        return data.target.flatten()[order][back].reshape(steps.reward.shape)


def _check_flow(storage: Any, example: _Example) -> None:
    empty, sizes = storage.init(), (example.plan, example.envs)
    if storage.ready(empty, *sizes):
        laws.broken(storage, HOLDS, "ready(init()) is true")
    full = laws.check_call(storage, storage.append, empty, example.rollout)
    if storage.ready(empty, *sizes) or not storage.ready(full, *sizes):
        found = storage.ready(full, *sizes), storage.ready(empty, *sizes)
        laws.broken(storage, HOLDS, f"after append, ready is {found[0]}, of the state before it {found[1]}")
    for what, state in (("the empty state", empty), ("the full state", full)):
        laws.check_saved(storage, what, state)
    try:
        storage.append(full, example.rollout)
    except ValueError:
        pass
    else:
        laws.broken(storage, WHOLE, "append to a full storage raised no ValueError")
    facts = example.actor, example.weights, example.plan, example.envs
    after, data, _ = storage.batches(lambda method: method, full, *facts, random.key(0))
    if storage.ready(after, *sizes):
        laws.broken(storage, HOLDS, "ready is true after batches")
    laws.check_call(storage, storage.feedback, after, data, torch.zeros(1, dtype=torch.int64), ())
    laws.same(storage, HOLDS, storage.restore(storage.gather(full)), full, "a restored state", "the state")
    many = storage.steps * example.envs + 1
    try:
        storage.check(Plan(1, many), example.actor, example.envs)
    except CompositionError:
        return
    laws.broken(storage, DIVIDES, f"{many} minibatches of {many - 1} samples raised no CompositionError")


def _check_samples(storage: Any, examples: list[_Example]) -> None:
    example, plan = examples[0], examples[0].plan
    data = laws.check_call(storage, storage.prepare, *example.prepared())
    laws.finite(storage, "what prepare gives", data)
    laws.check_lanes(storage, storage.prepare, *(e.prepared() for e in examples))
    keys = [random.key(i) for i in range(3)]
    statics = example.actor, plan, example.envs
    index = laws.check_call(storage, storage.order, *statics, keys[0])
    laws.expect(storage, "the index of order", index, (plan.updates, None), torch.int64)
    laws.check_lanes(storage, storage.order, *((*statics, key) for key in keys))
    if index.shape[1] > 4 and tree.same_bits(index, example.order(keys[1])):
        laws.broken(storage, ORDERS, "two keys give one order")
    laws.check_lanes(storage, storage.take, *((e.data(), e.order(k)[0]) for e, k in zip(examples, keys, strict=True)))
    steps: Transition = example.rollout.steps
    if storage.corrects:  # its samples have the present policy's logp: they name them as well
        steps = dataclasses.replace(steps, logp=data.logp.reshape(steps.logp.shape))
    wanted = _by_name(steps)
    for epoch in index.reshape(plan.epochs, plan.minibatches, -1).unbind(0):
        batches = [laws.check_call(storage, storage.take, data, rows) for rows in epoch.unbind(0)]
        found = _by_name(*batches)
        for name, x in wanted.items():
            y = found[name]
            if x.shape != y.shape or not tree.same_bits(x, y.to(x.dtype)):
                laws.broken(
                    storage,
                    ONCE,
                    f"{name} of one epoch (in the order of logp) {laws.difference(y, x)} of the rollout; "
                    f"{len(y)} samples of {len(x)}",
                )


def _by_name(*batches: Any) -> dict[str, Tensor]:
    """Observations, actions and `logp` of samples `[T * N, ...]`, in the order of `logp`, which names them."""
    parts = {n: torch.cat([getattr(b, n).flatten(0, 1) for b in batches]) for n in ("logp", "obs", "action")}
    order = torch.argsort(parts["logp"])
    return {n: x[order] for n, x in parts.items()}


def _check_targets(storage: Any, example: _Example) -> None:
    """Observations that must not matter are exchanged, and those that must."""
    steps: Transition = example.rollout.steps
    length, envs = steps.reward.shape
    other = strategies.make_rollout(example.actor.spec, length, envs, 2**31 + 1, 0.0, 0.0)
    done = steps.terminated | steps.truncated
    before = example.targets(steps)

    def moved(law: str, mask: Tensor, may: bool, **change: Tensor) -> None:
        difference = (example.targets(dataclasses.replace(steps, **change)) - before).abs()
        scale = 1.0 + float(before.abs().max())
        wrong = mask & ((difference <= 1e-6 * scale) if may else (difference > 1e-5 * scale))
        if bool(wrong.any()):
            t, i = torch.nonzero(wrong)[0].tolist()
            verb = "does not depend" if may else "depends"
            laws.broken(
                storage,
                law,
                f"the target of step {t} of environment {i} (terminated={bool(steps.terminated[t, i])}, "
                f"truncated={bool(steps.truncated[t, i])}, {length} steps) {verb} on {', '.join(change)} "
                f"{'of that step' if may or law == TERMINAL else 'of the next episode'}",
            )

    def exchanged(name: str, where: Tensor) -> Tensor:
        old = getattr(steps, name)
        return torch.where(where.reshape(*where.shape, *(1,) * (old.dim() - 2)), getattr(other, name), old)

    everywhere = torch.ones_like(done)
    if bool(steps.terminated.any()):
        moved(TERMINAL, everywhere, may=False, next_obs=exchanged("next_obs", steps.terminated))
    limit = steps.truncated & ~steps.terminated
    if bool(limit.any()):
        moved(TIME_LIMIT, limit, may=True, next_obs=exchanged("next_obs", limit))
    last = torch.zeros_like(done)
    last[-1] = ~done[-1]
    if bool(last.any()):
        moved(CUT, last, may=True, next_obs=exchanged("next_obs", last))
    later = torch.cat([torch.zeros_like(done[:1]), done[:-1]]).long().cumsum(0) > 0
    if bool(later.any()):
        names = [n for n in fields_of(Transition).data if n in ("obs", "reward", "next_obs")]
        moved(LEAK, ~later, may=False, **{n: exchanged(n, later) for n in names})
