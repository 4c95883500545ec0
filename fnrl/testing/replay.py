"""The laws of replays: what `check_storage` asks of an off-policy storage."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.apply import at
from fnrl.component import hypers
from fnrl.errors import StaleStateError
from fnrl.record import replace
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.testing import laws, strategies
from fnrl.types import OffPolicyBatch, Params, Rollout, Sampling, Transition, Weights

COPIES = "an append in place and one to a copy give the same ring"
STALE = "of a state only the newest can be stepped"
APART = "a fork is not touched by what happens to the other"
COUNTS = "what was collected is counted"
ALIKE = "what has had no error yet is drawn alike"
ERRORS = "samples follow their errors"
RING = "a sample of one step is a transition as it was collected"


def check_replay(storage: Any, spec: EnvSpec, envs: int, max_examples: int) -> None:
    """On sequences of appends and forks: copies agree with donation, stale states are refused, forks are apart. Of what
    is stored, samples of one step are the transitions themselves, drawn alike, or, `prioritised`, by their errors.

    Errors: LawError.
    """

    def law(seed: int, length: int, forks: int, terminated: float, truncated: float) -> None:
        state, collected = storage.init(), 0
        for k in range(length):
            made = strategies.make_rollout(spec, storage.steps, envs, seed + k, terminated, truncated)
            rollout = Rollout(_acted(spec, made), (), 0, storage.steps * envs)
            before = storage.gather(state)
            copy = storage.append(storage.restore(before), rollout)
            after = storage.append(state, rollout)
            collected += storage.steps * envs
            laws.same(storage, COPIES, storage.gather(copy), storage.gather(after), "the copy", "the donated one")
            if after.collected != collected:
                laws.broken(storage, COUNTS, f"collected is {after.collected} after {collected} transitions")
            if k > 0:
                _refused(storage, state, rollout)
            fork, other = storage.restore(storage.gather(after)), storage.gather(after)
            storage.append(after, rollout)
            laws.same(storage, APART, storage.gather(fork), other, "the fork", "what it was made of")
            state = fork if forks >> k & 1 else copy
            laws.check_saved(storage, "the state", storage.gather(state))

    chance = strategies.chances()
    numbers = {"seed": st.integers(0, 2**31), "length": st.integers(1, 6), "forks": st.integers(0, 63)}
    laws.for_all(law, max_examples, **numbers, terminated=chance, truncated=chance)
    whole = isinstance(spec.obs, Box) and spec.obs.stored.is_floating_point and spec.obs.size > 0
    if whole and not any(getattr(storage, option, None) for option in ("frames", "hindsight")):
        _check_draws(storage, spec, envs)


_DRAWS, _BATCH = 20, 1000


def _check_draws(storage: Any, spec: EnvSpec, envs: int) -> None:
    """In a storage of few transitions, whose first numbers of an observation name them, that has turned."""
    changes = {"capacity": 12 * envs, "steps": 3, "warmup": 0, "n_step": 1}
    few = dataclasses.replace(storage, **{n: x for n, x in changes.items() if hasattr(storage, n)})
    made = _named(spec, strategies.make_rollout(spec, 6 * few.steps, envs, 3, 0.15, 0.15))
    parts = [tree.map(lambda x, t=t: x[t : t + few.steps], made) for t in range(0, 6 * few.steps, few.steps)]
    state = few.init()
    for part in parts:
        state = few.append(state, Rollout(part, (), 0, few.steps * envs))
    kept = made if few.capacity >= made.reward.numel() else tree.map(lambda x: x[-(few.capacity // envs) :], made)
    stored: Transition = tree.map(lambda x: x.flatten(0, 1), kept)
    names = stored.obs.flatten(1)[:, 0].contiguous()
    alike = torch.full((len(names),), 1.0 / len(names), dtype=torch.float64)
    _, other, _ = _drawn(few, state, envs, names, 1)
    state, batch, which = _drawn(few, state, envs, names, 0)
    if tree.same_bits(batch.obs, other.obs):
        laws.broken(few, laws.KEYS, "two keys give the same samples")
    _check_ring(few, batch, tree.index(stored, which))
    _check_counts(few, ALIKE, which, alike)
    if getattr(few, "prioritised", None) is not None:
        _check_errors(few, state, envs, names)


def _check_errors(storage: Any, state: Any, envs: int, names: Tensor) -> None:
    """p_i^alpha / sum p^alpha, and importance weights."""
    errors = torch.linspace(0.1, 2.0, len(names)).double()
    state, data, rows = _plan(storage, state, envs, 2)
    for i in range(_DRAWS):
        index = rows[i]
        which = _places(storage, storage.take(data, index), names)
        state = storage.feedback(state, data, index, errors[which].float())
    option = storage.prioritised
    chance = (errors + option.eps) ** option.alpha
    chance = chance / chance.sum()
    _, batch, which = _drawn(storage, state, envs, names, 3)
    _check_counts(storage, ERRORS, which, chance)
    weight = (len(names) * chance[which]) ** -at(option.priority_beta, 0)
    weight = (weight.reshape(_DRAWS, _BATCH) / weight.reshape(_DRAWS, _BATCH).amax(-1, keepdim=True)).flatten()
    laws.close(storage, ERRORS, {"weight": batch.weight}, {"weight": weight.float()}, "the batch", "(M P)^-beta / max")


def _check_ring(storage: Any, batch: OffPolicyBatch, steps: Transition) -> None:
    discount = torch.where(steps.terminated, 0.0, _GAMMA)
    wanted = {"obs": steps.obs, "action": steps.action, "reward": steps.reward, "next_obs": steps.next_obs}
    found = {n: getattr(batch, n) for n in wanted} | {"discount": batch.discount}
    laws.close(storage, RING, found, wanted | {"discount": discount}, "the sample", "the transition")


def _check_counts(storage: Any, law: str, which: Tensor, chance: Tensor) -> None:
    """Pearson's chi-square of the draws: its deviation from what is expected, in its own standard deviations."""
    counts, expected = which.bincount(minlength=len(chance)).double(), chance * len(which)
    free = len(chance) - 1
    excess = float(((counts - expected).square() / expected).sum() - free) / (2.0 * free) ** 0.5
    if excess > 8.0:
        worst = int(((counts - expected).abs() / expected.sqrt()).argmax())
        laws.broken(
            storage,
            law,
            f"of {len(which)} draws {int(counts[worst])} are of transition {worst} of {len(chance)}, expected "
            f"{float(expected[worst]):.0f}; chi-square lies {excess:.0f} deviations above its mean",
        )


_GAMMA = 0.9


def _named(spec: EnvSpec, steps: Transition) -> Transition:
    """With the number of each transition for the first number of its observation."""
    number = torch.arange(1.0, steps.reward.numel() + 1).reshape(steps.reward.shape).to(steps.obs.dtype)
    obs = steps.obs.clone()
    obs.flatten(2)[..., 0] = number
    return dataclasses.replace(_acted(spec, _following(steps, obs)), obs=obs)


def _following(steps: Transition, obs: Tensor) -> Transition:
    """With the next observation for a successor, where the episode goes on."""
    done = (steps.terminated | steps.truncated)[:-1].reshape(-1, steps.reward.shape[1], *[1] * (obs.dim() - 2))
    following = torch.where(done, steps.next_obs[:-1], obs[1:])
    return dataclasses.replace(steps, next_obs=torch.cat([following, steps.next_obs[-1:]]))


def _plan(storage: Any, state: Any, envs: int, seed: int) -> tuple[Any, Any, Tensor]:
    """The storage, the samples and the rows of a plan of so many batches, whatever was earned before."""
    state = replace(state, rate=None) if hasattr(state, "rate") else state
    ratio = (_DRAWS + getattr(state, "updates", 0) + 0.5) / state.collected
    hyper = {n: torch.tensor(at(x, 0)) for n, x in hypers(storage).items()} | {"gamma": torch.tensor(_GAMMA)}
    weights = Weights(Params(torch.zeros(0), ()), (), hyper, (), 0, 0)  # type: ignore[arg-type]
    facts = None, weights, Sampling(ratio, _BATCH), envs
    return storage.batches(lambda method: method, state, *facts, random.key(seed))


def _drawn(storage: Any, state: Any, envs: int, names: Tensor, seed: int) -> tuple[Any, OffPolicyBatch, Tensor]:
    """The storage after a plan, all its samples, and which transitions they are."""
    after, data, rows = _plan(storage, state, envs, seed)
    batch = tree.concatenate([storage.take(data, r) for r in rows.unbind(0)], 0)
    return after, batch, _places(storage, batch, names)


def _places(storage: Any, batch: OffPolicyBatch, names: Tensor) -> Tensor:
    found = batch.obs.flatten(1)[:, 0].contiguous()
    which = torch.searchsorted(names, found).clamp(max=len(names) - 1)
    if not torch.equal(names[which], found):
        strange = found[names[which] != found][0]
        laws.broken(storage, RING, f"a sample is of transition {float(strange):g}; stored are {names.tolist()}")
    return which


def _acted(spec: EnvSpec, steps: Any) -> Any:
    """Actions as an off-policy actor stores them: in [-1, 1], or whole."""
    if isinstance(spec.action, Discrete):
        return steps
    return dataclasses.replace(steps, action=torch.tanh(steps.action))


def _refused(storage: Any, state: Any, rollout: Rollout) -> None:
    for use in (lambda: storage.gather(state), lambda: storage.append(state, rollout)):
        try:
            use()
        except StaleStateError:
            continue
        laws.broken(storage, STALE, "a state from before the last append was taken without StaleStateError")
