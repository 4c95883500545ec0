"""The records that travel: weights down, rollouts and updates up."""

import dataclasses
import itertools
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fnrl import tree
from fnrl.record import cached, host, plain, record, static

ALGORITHMS = "algo"  # the group of parameters that an algorithm adds to its actor's; a policy leaves it behind

Tree = Any  # a tensor, or a record, tuple, list or dict of trees; `()` is "nothing"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How often and in how many pieces a rollout is used."""

    epochs: int
    minibatches: int

    @property
    def updates(self) -> int:
        """Updates one rollout gives."""
        return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a replay is used: updates per environment step (a fraction, too), and samples per update."""

    ratio: float
    batch: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names, shapes and groups of a flat parameter vector. Groups are contiguous: the part of a name before its
    first dot.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each leaf."""
        return tuple(math.prod(s) for s in self.shapes)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups' names, in order."""
        return tuple(dict.fromkeys(n.split(".", 1)[0] for n in self.names))

    @cached_property
    def places(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """The group, the rest of the name, and the shape of each leaf."""
        heads = (n.partition(".") for n in self.names)
        return tuple((group, rest, shape) for (group, _, rest), shape in zip(heads, self.shapes, strict=True))

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Elements of each group."""
        sizes = dict.fromkeys(self.groups, 0)
        for name, size in zip(self.names, self.sizes, strict=True):
            sizes[name.split(".", 1)[0]] += size
        return tuple(sizes.values())

    def spread(self, x: Tensor) -> Tensor:
        """One number a group `[G]` to one an element `[P]`; a 0-d tensor is left as it is."""
        if x.dim() == 0:
            return x
        values = x.unbind(0)
        if torch.compiler.is_compiling():  # chosen where they are used, and never written
            place = torch.arange(sum(self.sizes), dtype=torch.int32, device=x.device)
            ends = list(itertools.accumulate(self.group_sizes))
            out = values[-1].expand(len(place))
            for value, end in zip(reversed(values[:-1]), reversed(ends[:-1]), strict=True):
                out = torch.where(place < end, value, out)
            return out
        parts = [v.expand(n) for v, n in zip(values, self.group_sizes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def scale_(self, vector: Tensor, x: Tensor) -> Tensor:
        """`vector *= spread(x)` in place; outside a graph group by group, for what `spread` joins is as large."""
        if torch.compiler.is_compiling():
            return vector.mul_(self.spread(x))
        for part, v in zip(vector.split_with_sizes(self.group_sizes), x.unbind(0), strict=True):
            part.mul_(v)
        return vector


@record
class Params:
    """All of an actor's parameters: one vector `[P]` and its layout."""

    vector: Tensor
    layout: Layout = static()

    @cached
    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The parameters by group and by the rest of their names, taken apart by one split (once a record)."""
        parts = self.vector.split_with_sizes(self.layout.sizes)
        out: dict[str, dict[str, Tensor]] = {group: {} for group in self.layout.groups}
        for (group, rest, shape), part in zip(self.layout.places, parts, strict=True):
            out[group][rest] = part if len(shape) == 1 else part.view(shape)
        return out

    def tree(self) -> dict[str, Tensor]:
        """The parameters by their full names, for reading; with lanes in front, one per lane."""
        return {name: self[name] for name in self.layout.names}

    def __getitem__(self, name: str) -> Tensor:
        """One parameter, for reading; with lanes in front, one per lane."""
        if name not in self.layout.names:
            raise KeyError(f"no parameter {name!r}; there are: {', '.join(self.layout.names)}")
        i = self.layout.names.index(name)
        start = sum(self.layout.sizes[:i])
        part = self.vector[..., start : start + self.layout.sizes[i]]
        return part.reshape(self.vector.shape[:-1] + self.layout.shapes[i])

    @staticmethod
    def of(tree: dict[str, Tensor]) -> "Params":
        """The flat form of named tensors.

        Errors: ValueError when the parameters of one group are not next to each other.
        """
        layout = Layout(tuple(tree), tuple(tuple(v.shape) for v in tree.values()))
        heads = [n.split(".", 1)[0] for n in tree]
        if sum(a != b for a, b in itertools.pairwise(heads)) + 1 != len(layout.groups):
            raise ValueError(f"parameters of one group must be contiguous, got {list(tree)}")
        return Params(torch.cat([v.reshape(-1) for v in tree.values()]), layout)


@record
class Moments:
    """Count `[]`, mean and sum of squared deviations `[...]` in float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "Moments":
        """Of nothing yet."""
        return Moments(torch.zeros((), dtype=torch.float64), *torch.zeros(2, *shape, dtype=torch.float64).unbind(0))

    @staticmethod
    def of(x: Tensor, axes: int) -> "Moments":
        """Of samples that lie along the first `axes` axes."""
        flat = x.reshape(-1, *x.shape[axes:]).double()
        mean = flat.mean(0)
        return Moments(mean.new_full((), flat.shape[0]), mean, (flat - mean).square().sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Of both samples together (Chan, Golub and LeVeque 1979): `m2 = m2_a + m2_b + d^2 n_a n_b / n`."""
        count = self.count + other.count
        part = other.count / count.clamp(min=1.0)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * part, self.m2 + other.m2 + delta.square() * self.count * part)


@record
class Normaliser:
    """The running moments of raw observations; an identity until something has been counted."""

    moments: Moments
    clip: float = static()

    @cached
    def _affine(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m = self.moments
        scale = torch.where(m.count > 0, torch.rsqrt(m.m2 / m.count.clamp(min=1.0) + 1e-8), 1.0)
        limit = torch.where(m.count > 0, self.clip, math.inf)
        return m.mean.float(), scale.float(), -limit.float(), limit.float()

    def __call__(self, obs: Tensor) -> Tensor:
        """`clip((obs - mean) / sqrt(var + 1e-8), -c, c)`, float32 `[..., O]`; `obs` until something is counted."""
        mean, scale, low, high = self._affine
        return ((obs - mean) * scale).clamp(low, high)


@record
class Weights:
    """What flows down: all that a worker needs to act and to compute gradients."""

    params: Params
    target: Tree  # Params of a target network, or ()
    hyper: dict[str, Tensor]
    normaliser: Tree  # Normaliser, or ()
    version: int = host()
    env_steps: int = host()


@record
class Transition:
    """One step of N environments, or a rollout of T of them `[T, N]`.

    `next_obs` is the true successor, never the observation after a reset; `memory` is the actor's before the step.
    Observations are raw; `reward` is what the algorithm learns from (scaled, where the parts scale it).
    """

    obs: Tensor
    action: Tensor
    logp: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_obs: Tensor
    memory: Tensor


@record
class Rollout:
    """What collect sends up: transitions `[T, N]`, the moments of their raw observations (or `()`), and where they
    come from. `valid` `[T, N]` says which transitions happened; it is `()` where all did. `sound` `[]` says
    whether all was finite so far.
    """

    steps: Transition
    moments: Tree
    version: int = host()
    env_steps: int = host()
    valid: Tree = ()
    sound: Tree = ()


@record
class Episodes:
    """Episodes of a rollout: `end` marks the step at which one ended; there its return and length (raw reward)
    stand. All `[T, N]`.
    """

    end: Tensor
    returns: Tensor
    lengths: Tensor


@record
class OffPolicyBatch:
    """Samples `[B]`: what was earned until the state to bootstrap from, and what that state's value counts for.

    `discount` is `gamma^n (1 - terminated)`; `weight` corrects a sample that was not drawn uniformly; observations are
    normalised.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    discount: Tensor
    weight: Tensor


@record
class Batches:
    """A plan of K updates: the samples, the rows of each minibatch `[K, B]`, and the noise of each loss `[K, ...]`."""

    data: Tree
    index: Tensor
    noise: Tree

    @property
    def updates(self) -> int:
        """K."""
        return self.index.shape[-2]

    def at(self, i: int) -> tuple[Tensor, Tree]:
        """Rows and noise of minibatch `i`: views, so that a changing `i` stays on the host."""
        axis = self.index.dim() - 2  # behind the lanes
        return self.index.select(axis, i), tree.map(lambda x: x.select(axis, i), self.noise)


@record
class Update:
    """What gradients sends up: one gradient, with what the merge and the apply need to know."""

    grads: Tensor
    info: dict[str, Tensor]
    moments: Tree
    first: bool = host()  # whether it is the first of its plan
    last: bool = host()
    env_steps: int = host()
    version: int = host()


@record
class Aux:
    """What a loss says besides its value: metrics (0-d), and a priority per sample (or `()`)."""

    info: dict[str, Tensor]
    priority: Tree = ()


@plain
@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided by who was faster: an `arrival` (of the calls in flight, oldest first, number `value` came
    first), or a `length` (a rollout ended after `value` steps). It was number `count` of its kind at the node `node`.
    """

    kind: str
    node: str
    count: int
    value: int


@record
class Info:
    """What a step tells: metrics of the update (0-d means), episodes that ended, and facts of the host.

    `report` holds numbers to be added up (seconds, counts), `lags` how many versions behind the weights each product
    was (by the metric's name), `choices` what a replay has to choose likewise.
    """

    metrics: dict[str, Tensor]
    episodes: Tree  # a tuple of Episodes
    report: dict[str, float] = host(default_factory=dict)
    lags: dict[str, tuple[int, ...]] = host(default_factory=dict)
    choices: tuple[Choice, ...] = host(default=())


@record
class Landed:
    """A call of a replica that has ended: the replica's state after it, its product, and what it told."""

    state: Tree
    product: Tree
    info: Info
