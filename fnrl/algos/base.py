"""What all algorithms share: state, gradients, and the application of an update."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fnrl import tree
from fnrl.autodiff import under_transform, value_and_grad
from fnrl.errors import CompositionError
from fnrl.optim import Optimiser, clip_by_global_norm, global_norm
from fnrl.record import record, replace
from fnrl.spaces import Box, Discrete, EnvSpec, Space
from fnrl.types import Aux, Layout, Params, Plan, Sampling, Tree, Weights


@record
class AlgoState:
    """Weights, and what stays at home: the optimiser's memory, whether the rest of this plan is skipped, the number of
    updates tried, and the lanes that are dead.
    """

    weights: Weights
    opt: Tree
    stopped: Tensor
    updates: Tensor
    dead: Tree = ()  # with lanes, which of them turned non-finite `[S]`

    @staticmethod
    def fresh(weights: Weights, opt: Tree) -> "AlgoState":
        """Of no update yet."""
        return AlgoState(weights, opt, torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.int64))


class Algorithm:
    """Base of algorithms: a component with `loss`, `plan` and an optimiser inherits the rest.

    A subclass is a component (`fnrl.component`) with

    - `family: ClassVar[str]`, "on-policy" or "off-policy", as its actor and its storage have it;
    - hyper-parameters (`hyper(...)`) `lr` and `gamma`, and `max_grad_norm` and `target_kl` if it has them: losses read
      them from `weights.hyper`;
    - `optimiser`, such as `option(default=Adam(), help=...)`;
    - `plan`: `Plan(epochs, minibatches)` of a rollout, or `Sampling(ratio, batch)` of a replay;
    - `loss(actor, params, weights, batch, noise) -> loss, Aux({name: number})`, both 0-d.
    """

    family: ClassVar[str]
    actions: ClassVar[tuple[type[Space], ...]] = (Box, Discrete)
    instead: ClassVar[str] = ""  # what takes the others
    target_every: int = 1  # updates between two moves of the target
    optimiser: Optimiser

    @property
    def plan(self) -> Plan | Sampling:
        """How a rollout is used."""
        raise TypeError(f"{type(self).__name__} must define plan")

    @classmethod
    def check_actions(cls, spec: EnvSpec) -> None:
        """Refuses an environment whose actions the algorithm is not for (CompositionError)."""
        if not isinstance(spec.action, cls.actions):
            needs = " or ".join(kind.__name__ for kind in cls.actions)
            raise CompositionError(
                f"{cls.__name__} needs {needs} actions, {spec.name} takes {spec.action}: use {cls.instead}"
            )

    def check(self, actor: Any) -> None:
        """Refuses an actor that the loss has no use for (CompositionError)."""

    def init(self, actor: Any, params: Params) -> tuple[Params, Tree, Tree]:
        """`(params, target, optimiser state)` of an actor's fresh parameters, with the algorithm's own added."""
        return params, (), self.optimiser.init(params)

    def noise(self, actor: Any, key: Tensor, updates: int, batch: int) -> Tree:
        """What the losses of K updates draw, `[K, ...]`: drawn at once, so that no graph holds a generator."""
        return ()

    def loss(self, actor: Any, params: Params, weights: Weights, batch: Any, noise: Tree) -> tuple[Tensor, Aux]:
        """A 0-d loss, and what it says besides."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def rates(self, hyper: dict[str, Tensor], layout: Layout) -> Tensor:
        """The learning rate, 0-d or one per group `[G]`."""
        return hyper["lr"]

    def mask(self, updates: Tensor, layout: Layout) -> Tree:
        """Which groups `[G]` the update of this number (from 0) moves; `()` for all."""
        return ()

    def move_target(self, target: Tree, params: Params, hyper: dict[str, Tensor], updates: Tensor) -> Tree:
        """The target after the update of this number (from 0), which is one of those that move it."""
        return target

    def _moved(self, target: Tree, params: Params, hyper: dict[str, Tensor], updates: Tensor) -> Tree:
        if isinstance(target, tuple) and not target:
            return target
        if self.target_every == 1:
            return self.move_target(target, params, hyper, updates)
        due = (updates + 1) % self.target_every == 0
        if not under_transform() and not bool(due):
            return target
        return tree.where(due, self.move_target(target, params, hyper, updates), target)

    def grad(self, actor: Any, weights: Weights, batch: Any, noise: Tree = ()) -> tuple[Tensor, Aux]:
        """The gradient `[P]` of the loss at the weights, and what the loss says; `info` gains `loss`."""
        layout = weights.params.layout

        def loss(vector: Tensor) -> tuple[Tensor, Aux]:
            found = self.loss(actor, Params(vector, layout), weights, batch, noise)
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Aux)):
                raise TypeError(
                    f"{type(self).__name__}.loss gave {found!r}: expected a 0-d loss and what it says, Aux({{name: x}})"
                )
            return found

        (value, aux), grads = value_and_grad(loss)(weights.params.vector)
        return grads, Aux({"loss": value, **aux.info}, aux.priority)

    def apply(self, state: AlgoState, grads: Tensor, info: dict[str, Tensor]) -> tuple[AlgoState, dict[str, Tensor]]:
        """One optimiser step from a merged gradient `[P]`; `info` gains `grad_norm`.

        With `target_kl`, once the merged KL exceeds 1.5 times it, this and the other updates of the plan change
        nothing.
        """
        hyper, layout = state.weights.hyper, state.weights.params.layout
        stopped: Tensor = state.stopped
        if "max_grad_norm" in hyper:
            grads, norm = clip_by_global_norm(grads, hyper["max_grad_norm"])
        else:
            norm = global_norm(grads)
        if "target_kl" in hyper:
            stopped = stopped | (info["approx_kl"] > 1.5 * hyper["target_kl"])
        mask = self.mask(state.updates, layout)
        if "target_kl" in hyper:
            mask = ~stopped if isinstance(mask, tuple) else mask & ~stopped
        rates = self.rates(hyper, layout)
        params, opt = self.optimiser.update(grads, state.opt, state.weights.params, rates, mask)
        target = self._moved(state.weights.target, params, hyper, state.updates)
        if "target_kl" in hyper:
            target = tree.where(stopped, state.weights.target, target)
        weights = replace(state.weights, params=params, target=target)
        return AlgoState(weights, opt, stopped, state.updates + 1), {**info, "grad_norm": norm}
