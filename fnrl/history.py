"""What a learner tells of its run: windows over the last episodes, updates and plans, and the means over them."""

import collections
import time

import torch
from torch import Tensor

from fnrl.evaluate import Evaluation
from fnrl.record import host, record
from fnrl.types import Info, Tree

_EPISODES, _PLANS = 100, 10


@record
class Told:
    """The part of a history that is saved."""

    returns: Tensor  # raw, of the last episodes
    lengths: Tensor
    recent: Tensor  # returns since the last line of metrics
    window: dict[str, Tensor]  # metrics of the last updates
    test: Tree  # returns and lengths of the last evaluation, or ()
    episodes: int = host()
    evaluated: int = host()  # environment steps at the last evaluation that was due
    seconds: float = host()


class History:
    """Windows of a run with `plan` updates a plan, from `env_steps` on; `told` is what an earlier session saved."""

    def __init__(self, plan: int, env_steps: int, told: Told | None = None) -> None:
        self.returns: collections.deque[float] = collections.deque(maxlen=_EPISODES)
        self.lengths: collections.deque[int] = collections.deque(maxlen=_EPISODES)
        self.window: collections.deque[dict[str, Tensor]] = collections.deque(maxlen=plan)
        self.reports: collections.deque[dict[str, float]] = collections.deque(maxlen=plan)
        self.lags: collections.deque[dict[str, tuple[int, ...]]] = collections.deque(maxlen=plan)
        self.pace = collections.deque([(env_steps, 0.0)], maxlen=_PLANS + 1)
        self.recent: list[float] = []  # returns of the episodes that ended since the last line of metrics
        self.test: Evaluation | None = None
        self.episodes, self.evaluated, self.busy, self.begun = 0, 0, 0.0, time.monotonic()
        if told is not None:
            self.returns.extend(told.returns.tolist())
            self.lengths.extend(told.lengths.tolist())
            self.recent.extend(told.recent.tolist())
            size = max((len(x) for x in told.window.values()), default=0)
            self.window.extend({n: x[i] for n, x in told.window.items()} for i in range(size))
            self.episodes, self.evaluated, self.begun = told.episodes, told.evaluated, self.begun - told.seconds
            self.test = Evaluation(*told.test) if told.test else None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, all sessions together."""
        return time.monotonic() - self.begun

    def update(self, info: Info, seconds: float) -> None:
        """Takes in one update that took so long."""
        self.busy += seconds
        self.window.append(info.metrics)
        self.reports.append(info.report)
        self.lags.append(info.lags)
        for episodes in info.episodes:
            ended = episodes.returns[episodes.end].tolist()
            self.returns.extend(ended)
            self.lengths.extend(episodes.lengths[episodes.end].tolist())
            self.recent.extend(ended)
            self.episodes += len(ended)

    def metrics(self) -> dict[str, float]:
        """The means: see `Learner.get_metrics`."""
        found: dict[str, float] = {"episodes": self.episodes, "time/total": self.seconds}
        if self.returns:
            found["performance/train"] = sum(self.returns) / len(self.returns)
            found["performance/length"] = sum(self.lengths) / len(self.lengths)
        if self.test is not None:
            found["performance/test"] = self.test.mean
        for name in self.window[-1] if self.window else ():
            found[f"algo/{name}"] = float(torch.stack([m[name] for m in self.window]).mean())
        for name in dict.fromkeys(n for report in self.reports for n in report):
            found[name] = sum(report.get(name, 0.0) for report in self.reports)
        for name in dict.fromkeys(n for lags in self.lags for n in lags):
            behind = [lag for lags in self.lags for lag in lags.get(name, ())]
            found[name] = sum(behind) / len(behind)
        (first, begun), (last, busy) = self.pace[0], self.pace[-1]
        return found | ({"scheme/fps": (last - first) / (busy - begun)} if busy > begun else {})

    def told(self) -> Told:
        """What to save."""
        return Told(
            torch.tensor(list(self.returns), dtype=torch.float64),
            torch.tensor(list(self.lengths), dtype=torch.int64),
            torch.tensor(self.recent, dtype=torch.float64),
            {n: torch.stack([m[n] for m in self.window]) for n in (self.window[-1] if self.window else ())},
            () if self.test is None else (self.test.returns, self.test.lengths),
            self.episodes,
            self.evaluated,
            self.seconds,
        )
