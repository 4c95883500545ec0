"""The roots of a topology: where updates are applied and weights come from."""

import dataclasses
import time
from typing import Any, ClassVar

from torch import Tensor

from fnrl.apply import apply_update, declared, first_algo
from fnrl.lift import Run
from fnrl.parts import Parts
from fnrl.record import host, record
from fnrl.topology.base import fold, own, require
from fnrl.types import Info, Tree, Weights


@record
class RootState:
    """The algorithm's state and the node below; `pinned` names hyper-parameters a user has set, `settled` is whether
    the last update ended a plan.
    """

    algo: Tree
    child: Tree
    pinned: tuple[str, ...] = host(default=())
    settled: bool = host(default=True)


@dataclasses.dataclass(frozen=True)
class Centralised:
    """Applies updates in one place and sends weights down."""

    child: Any
    produces: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        require("centralised", self.child, "updates")

    def __repr__(self) -> str:
        return f"centralised({self.child!r})"

    def envs(self, parts: Parts) -> int:
        """Those of an update."""
        return self.child.envs(parts)

    def check(self, parts: Parts) -> None:
        """The node's own check."""
        self.child.check(parts)

    def init(self, run: Run, key: Tensor) -> RootState:
        """Fresh weights."""
        return RootState(first_algo(run, fold(run, key, 0)), self.child.init(run, fold(run, key, 1)))

    def step(self, run: Run, state: RootState, weights: Any = ()) -> tuple[RootState, Weights, Info]:
        """One update. Errors: NonFiniteError, before anything of the update is kept."""
        child, update, info = self.child.step(run, state.child, state.algo.weights)
        begin = time.perf_counter()
        algo, metrics = apply_update(run, state.algo, update, state.pinned)
        report = {**info.report, "time/apply": time.perf_counter() - begin}
        lags = {**info.lags, "scheme/metrics/gradient_lag": (state.algo.weights.version - update.version,)}
        state = dataclasses.replace(state, algo=algo, child=child, settled=update.last)
        return state, algo.weights, dataclasses.replace(info, metrics=metrics, report=report, lags=lags)

    def gather(self, run: Run, state: RootState) -> RootState:
        """The node below, gathered."""
        return dataclasses.replace(state, child=self.child.gather(run, state.child))

    def restore(self, run: Run, pure: RootState) -> RootState:
        """The node below, restored; hyper-parameters that nobody has set are the parts'."""
        own(run, self, pure, RootState)
        algo = declared(run, pure.algo, pure.pinned, pure.settled)
        return dataclasses.replace(pure, algo=algo, child=self.child.restore(run, pure.child))

    def close(self, run: Run, state: RootState) -> None:
        """Closes the node below."""
        self.child.close(run, state.child)


def centralised(node: Any) -> Centralised:
    """Applies the updates of `node` in one place."""
    return Centralised(node)
