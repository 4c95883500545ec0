"""A scheme: parts, a topology, and where it runs. State in, state out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnrl import lanes, tree
from fnrl.component import nearest
from fnrl.errors import CompositionError
from fnrl.executor.base import Executor
from fnrl.executor.inline import Inline
from fnrl.lift import Run
from fnrl.parts import Parts
from fnrl.record import host, record, replace
from fnrl.topology.drawing import draw
from fnrl.types import Info, Tree, Weights


@record
class SchemeState:
    """Everything a run is: stepping it again gives the same bits again."""

    node: Tree
    lanes: int | None = host(default=None)
    which: tuple[int, ...] = host(default=())  # the lanes' numbers, where they aren't 0, 1, ...

    @property
    def weights(self) -> Weights:
        """The present weights."""
        return self.node.algo.weights

    @property
    def env_steps(self) -> int:
        """Environment steps learnt from so far (of one lane)."""
        return self.weights.env_steps

    @property
    def version(self) -> int:
        """Updates so far."""
        return self.weights.version

    @property
    def settled(self) -> bool:
        """Whether the last update was the last of its plan: what was collected has been learnt from in full."""
        return self.node.settled


@dataclasses.dataclass(frozen=True)
class Scheme:
    """`parts` trained by `topology` on `executor`; composing it checks everything and starts nothing.

    `compile=True` compiles a few small graphs on first use. `init` takes one key `[2]`, or a key per lane `[S, 2]`:
    then every tensor of the state has a leading axis `[S]`, and lane i draws what its key draws alone. Errors:
    CompositionError.
    """

    parts: Parts
    topology: Any
    executor: Executor = dataclasses.field(default_factory=Inline)
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Parts):
            raise CompositionError(f"a scheme is made of Parts(env, actor, algo, storage), got {self.parts!r}")
        if isinstance(self.executor, type) or not isinstance(self.executor, Executor):
            raise CompositionError(f"executor={self.executor!r}: expected a value such as Inline() or Ray()")
        _require_device(self.device)
        made = getattr(self.topology, "produces", None)
        if made != "weights" or isinstance(self.topology, type):
            raise CompositionError(
                f"a scheme's topology applies updates, as centralised(gradients(collect)) does; got {self.topology!r}"
                + (f", which produces {made}" if made else "")
            )
        self.topology.check(self.parts)

    def __str__(self) -> str:
        place = "here" if isinstance(self.executor, Inline) else "cells"
        return draw(self.topology, self.parts, place)

    @property
    def updates(self) -> int:
        """Updates of one plan."""
        return self.parts.storage.updates(self.parts.algo.plan, self.topology.envs(self.parts))

    def _run(self, state: SchemeState, copy: bool = True) -> Run:
        return Run(self.parts, self.executor, (), state.lanes, self.compile, self.device, copy, state.which)

    def _with(self, state: SchemeState, node: Tree) -> SchemeState:
        return SchemeState(node, state.lanes, state.which)

    def init(self, key: Tensor) -> SchemeState:
        """A fresh run from one key `[2]`, or from one key per lane `[S, 2]`.

        One lane alone runs twice, as its own shadow: products round alike from two lanes on.

        Errors: CompositionError when the parts are swept over another number of lanes, or so many need more memory than
        there is.
        """
        is_key = isinstance(key, Tensor) and key.dtype == torch.int32
        if not is_key or key.dim() not in (1, 2) or key.shape[-1] != 2 or not len(key):
            got = f"{key.dtype}{list(key.shape)}" if isinstance(key, Tensor) else repr(key)
            seed = key if isinstance(key, int) else "seed"
            raise ValueError(f"init takes a key [2] or keys [S, 2], as fnrl.key({seed}) makes them; got {got}")
        one = key.shape[0] == 1 and key.dim() == 2
        blank = SchemeState((), 2, (0, 0)) if one else SchemeState((), None if key.dim() == 1 else key.shape[0])
        key, run = (key.expand(2, 2) if one else key), self._run(blank)
        lanes.check(run, self.topology)
        with self.executor.opening(run, self.topology):
            return self._with(blank, self.topology.init(run, key.to(self.device)))

    def step(self, state: SchemeState, updates: int = 1) -> tuple[SchemeState, Info]:
        """`updates` updates; the metrics are their means. Nothing of `state` changes.

        Where graphs had to be compiled in this process, `info.report["time/compile"]` says how many seconds it took.
        """
        if updates < 1:
            raise ValueError(f"step(updates={updates}): expected at least 1")
        node, info = self.topology.steps(self._run(state), state.node, updates)
        return self._with(state, node), info

    def gather(self, state: SchemeState, copy: bool = True) -> SchemeState:
        """The state as pure records, tokens replaced by what they stand for: to save, compare, and resume on any
        executor. With `copy=False` it shares the memory of rings: save it before the next step, and let go of it.
        """
        return self._with(state, self.topology.gather(self._run(state, copy), state.node))

    def restore(self, pure: SchemeState, copy: bool = True) -> SchemeState:
        """A state that can be stepped, from a gathered one; with `copy=False` in its memory, so that it is used up."""
        run = self._run(pure, copy)
        with self.executor.opening(run, self.topology):
            return self._with(pure, self.topology.restore(run, pure.node))

    def fork(self, state: SchemeState) -> SchemeState:
        """A copy that can be stepped apart from `state`."""
        return self.restore(self.gather(state))

    def close(self, state: SchemeState) -> None:
        """Closes simulators and cells behind a state."""
        self.topology.close(self._run(state), state.node)

    def select(self, state: SchemeState, numbers: Sequence[int]) -> SchemeState:
        """A state of some lanes, which go on bit for bit as they would have; lanes keep their numbers.

        One lane alone runs twice, as its own shadow: products round alike from two lanes on. `state` stays as it is;
        close it if it isn't stepped any more. Errors: ValueError for a lane that isn't there.
        """
        places, which = lanes.places(state, numbers)
        pure = lanes.pick(self.gather(state, copy=False).node, places, state.lanes or 0)
        return self.restore(SchemeState(pure, len(which), which), copy=False)

    def drop(self, state: SchemeState, *numbers: int) -> SchemeState:
        """The state without some lanes: `select` of the others."""
        lanes.places(state, numbers)
        return self.select(state, [i for i in lanes.numbers(state) if i not in numbers])

    def set(self, state: SchemeState, **hyper: float | Sequence[float]) -> SchemeState:
        """A state with hyper-parameters set from now on, to a number, or to one for each lane; a schedule of the same
        name no longer moves it.

        Errors: ValueError for an unknown name (with the nearest) or a value out of range.
        """
        node, algo = state.node, state.node.algo
        for name, value in hyper.items():
            if name not in algo.weights.hyper:
                raise ValueError(f"no part has a hyper-parameter {name!r}{nearest(name, algo.weights.hyper)}")
            for x in lanes.each(name, value, state.lanes):
                self.parts.check_hyper(name, x)
        old = algo.weights.hyper
        new = {n: v.new_tensor(hyper[n]).expand_as(v).clone() if n in hyper else v for n, v in old.items()}
        algo = replace(algo, weights=replace(algo.weights, hyper=new))
        pinned = tuple(dict.fromkeys((*node.pinned, *hyper)))
        return replace(state, node=self.topology.set(node, algo, pinned))

    def same(self, a: SchemeState, b: SchemeState) -> bool:
        """Whether two states hold the same bits, wherever they run."""
        return tree.same_bits(self.gather(a), self.gather(b))


def _require_device(device: Any) -> None:
    try:
        usable = isinstance(device, str) and torch.empty(0, device=device).device.type != "meta"
        why = ""
    except (RuntimeError, AssertionError) as error:  # an assertion is what torch says of a backend it was built without
        usable, why = False, f" ({str(error).splitlines()[0]})"
    if not usable:
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
        raise CompositionError(f"device={device!r} can't be used{why}: expected one of {', '.join(here)}")
