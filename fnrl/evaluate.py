"""Evaluation: whole episodes with the most likely actions, in environments of their own."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnrl import random, tree
from fnrl.collect import acting, advance, first_state
from fnrl.executor.inline import Inline
from fnrl.lift import Run
from fnrl.parts import Parts
from fnrl.record import record
from fnrl.types import Weights


@record
class Evaluation:
    """Raw returns `[E]` and lengths `[E]` of whole episodes; with lanes `[S, E]`."""

    returns: Tensor
    lengths: Tensor

    def __repr__(self) -> str:
        lanes = "" if self.returns.dim() == 1 else f"{self.returns.shape[0]} lanes of "
        each, steps = self.returns.shape[-1], float(self.lengths.double().mean())
        return f"Evaluation(return {self.mean:.4g} ± {self.std:.4g} over {lanes}{each} episodes of {steps:.4g} steps)"

    @property
    def mean(self) -> float:
        """The mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """The deviation of returns between episodes (not of the mean)."""
        return float(self.returns.std(correction=0))


def evaluate(
    parts: Parts,
    weights: Weights,
    key: Tensor,
    episodes: int = 10,
    env: Any = None,
    max_steps: int = 1_000_000,
    told: Callable[[int, int], None] = lambda episodes, steps: None,
) -> Evaluation:
    """The deterministic policy over `episodes` whole episodes, the same number in every environment (rounded up).

    `env` is another vector of the same spaces, if not one like the parts' own. With a key per lane `[S, 2]` the weights
    are those of S lanes, played in one vector of S * N environments, and a lane's episodes don't depend on the others.
    `told` hears how many episodes are over, and how many steps were made; but for that a pure function of its
    arguments. A lane's episode in which something is not finite has a return of NaN, with a warning.

    Errors: ValueError when episodes do not end within `max_steps` vector steps, or weights and keys are not of as many
    lanes; NonFiniteError for one seed.
    """
    if episodes < 1:
        raise ValueError(f"evaluate(episodes={episodes}): expected at least 1")
    of, asked = weights.params.vector.shape[:-1], key.shape[:-1]
    if of != asked:
        told_ = ("one seed" if not n else f"{n[0]} lanes" for n in (of, asked))
        raise ValueError("evaluate: the weights are of {}, the key of {}".format(*told_))
    parts = dataclasses.replace(parts, env=env or parts.env, scale_reward=None)
    run, vector = Run(parts, Inline(), lanes=None if key.dim() == 1 else len(key)), parts.env
    axis, fold, draw = run.axis, run.lift(random.fold_in), run.lift(vector.noise)
    each = math.ceil(episodes / vector.num_envs)
    state = first_state(run, key)
    env_state, memory, how = state.env, state.memory, acting(run, weights)
    total, length = state.tally.returns, state.tally.lengths
    counted = torch.zeros_like(length)
    noise: Any = ()
    ended: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for t in range(max_steps):
            if t % _CHUNK == 0:
                noise = draw(fold(state.key, t // _CHUNK), _CHUNK) if vector.pure else ()
            now = tree.map(lambda x, t=t: x.select(axis, t % _CHUNK), noise)
            env_state, memory, step = advance(run, how, env_state, memory, None, now)
            total, length = total + step.reward, length + 1
            done = step.terminated | step.truncated
            if bool(done.any()):
                counts = done & (counted < each)
                lane = torch.zeros_like(length) if axis == 0 else torch.arange(len(key))[:, None].expand_as(length)
                ended.append((lane[counts], total[counts], length[counts]))
                counted = counted + done.long()
                total, length = torch.where(done, 0.0, total), torch.where(done, 0, length)
                if int(counted.min()) >= each:
                    break
            told(int(counted.clamp(max=each).sum()), (t + 1) * counted.numel())
        else:
            raise ValueError(
                f"{vector.spec.name}: {each} episodes did not end in each environment in {max_steps} steps"
            )
    finally:
        if not vector.pure:
            vector.close(env_state)
    lane, returns, lengths = (torch.cat(x) for x in zip(*ended, strict=True))
    if axis == 0:
        return Evaluation(returns, lengths)
    order = lane.argsort(stable=True)  # by lane, and within one in the order in which they ended
    found = Evaluation(*(x[order].reshape(len(key), each * vector.num_envs) for x in (returns, lengths)))
    if wrong := torch.nonzero(~found.returns.isfinite().all(-1)).flatten().tolist():
        which = "lane" if len(wrong) == 1 else "lanes"
        where = f"{vector.spec.name}: in an evaluation of {which} {', '.join(map(str, wrong))}"
        warnings.warn(f"{where} a return is not finite, and so is the mean", RuntimeWarning, stacklevel=2)
    return found


_CHUNK = 128
