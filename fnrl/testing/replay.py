"""The laws of replays: what `check_storage` asks of an off-policy storage."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from fnrl.errors import StaleStateError
from fnrl.spaces import Discrete, EnvSpec
from fnrl.testing import laws, strategies
from fnrl.types import Rollout

COPIES = "an append in place and one to a copy give the same ring"
STALE = "of a state only the newest can be stepped"
APART = "a fork is not touched by what happens to the other"
COUNTS = "what was collected is counted"


def check_replay(storage: Any, spec: EnvSpec, envs: int, max_examples: int) -> None:
    """On sequences of appends and forks: copies agree with donation, stale states are refused, forks are apart.

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
