"""What a learner tells of its run: windows over the last episodes, updates and plans, and the means over them."""

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnrl import tree
from fnrl.evaluate import Evaluation
from fnrl.lanes import iqm
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
    faults: dict[str, float] = host()  # of workers that were replaced, by kind


def faults_of(info: Info) -> dict[str, float]:
    """The faults of workers that a step tells of, by kind."""
    return {name: n for name, n in info.report.items() if name.startswith("faults/")}


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
        self.faults: dict[str, float] = {}
        self.episodes, self.evaluated, self.busy, self.begun = 0, 0, 0.0, time.monotonic()
        if told is not None:
            self.returns.extend(told.returns.tolist())
            self.lengths.extend(told.lengths.tolist())
            self.recent.extend(told.recent.tolist())
            size = max((len(x) for x in told.window.values()), default=0)
            self.window.extend({n: x[i] for n, x in told.window.items()} for i in range(size))
            self.episodes, self.evaluated, self.begun = told.episodes, told.evaluated, self.begun - told.seconds
            self.test = Evaluation(*told.test) if told.test else None
            self.faults = dict(told.faults)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, all sessions together."""
        return time.monotonic() - self.begun

    def update(self, info: Info, seconds: float) -> None:
        """Takes in one update that took so long."""
        info = self._host(info, seconds)
        self.window.append(info.metrics)
        for episodes in info.episodes:
            ended = episodes.returns[episodes.end].tolist()
            self.returns.extend(ended)
            self.lengths.extend(episodes.lengths[episodes.end].tolist())
            self.recent.extend(ended)
            self.episodes += len(ended)

    def _host(self, info: Info, seconds: float) -> Info:
        """Takes in the facts of the host; gives the info there, too: what it holds is read number by number."""
        self.busy += seconds
        self.reports.append(info.report)
        self.lags.append(info.lags)
        self.count(faults_of(info))
        return info if all(x.is_cpu for x in info.metrics.values()) else tree.to(info, "cpu")

    def count(self, faults: dict[str, float]) -> None:
        """Takes in faults of workers, by kind."""
        for name, n in faults.items():
            self.faults[name] = self.faults.get(name, 0.0) + n

    def begin_pace(self, env_steps: int) -> None:
        """Speed counts from here on: what came before was a warm-up."""
        self.pace.clear()
        self.pace.append((env_steps, self.busy))

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
        return found | self.speed()

    def speed(self) -> dict[str, float]:
        """Seconds of a plan by what they were spent on, lags, and environment steps a second."""
        names = dict.fromkeys(n for report in self.reports for n in report)
        found = {name: sum(report.get(name, 0.0) for report in self.reports) for name in names}
        for name in dict.fromkeys(n for lags in self.lags for n in lags):
            behind = [lag for lags in self.lags for lag in lags.get(name, ())]
            found[name] = sum(behind) / len(behind)
        found |= self.faults
        (first, begun), (last, busy) = self.pace[0], self.pace[-1]
        return found | ({"scheme/metrics/fps": (last - first) / (busy - begun)} if busy > begun else {})

    def line(self) -> dict[str, Any]:
        """What a line of metrics says besides: the mean return since the last one."""
        recent, self.recent = self.recent, []
        return {"performance/recent": sum(recent) / len(recent)} if recent else {}

    def tested(self, found: Evaluation) -> dict[str, Any]:
        """Takes in an evaluation; gives what is told of it."""
        self.test = found
        spread = {"performance/test_std": found.std, "performance/test_episodes": len(found.returns)}
        return {"performance/test": found.mean, **spread}

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
            dict(self.faults),
        )


class LaneHistory(History):
    """A history for each lane that is shown, and what they come to together.

    `places` are where the lanes lie in what a step tells, by their numbers. Means and the interquartile mean are over
    the lanes that are alive; `lanes/*` are lists, a number for each lane in its order, None where there is none.
    """

    def __init__(self, plan: int, env_steps: int, places: dict[int, int], told: Sequence[Told] = ()) -> None:
        super().__init__(plan, env_steps)
        self.numbers, self.places = list(places), list(places.values())
        self.each = [History(plan, env_steps, t) for t in told or [None] * len(self.places)]
        if told:
            self.evaluated, self.begun, self.faults = told[0].evaluated, self.each[0].begun, dict(told[0].faults)
            tests = [h.test for h in self.each if h.test is not None]
            self.test = tree.stack(tests) if tests else None

    def update(self, info: Info, seconds: float) -> None:
        """Takes in one update that took so long."""
        info = self._host(info, seconds)
        metrics = {n: x.unbind(0) for n, x in info.metrics.items()}
        for h, i in zip(self.each, self.places, strict=True):
            h.update(Info({n: x[i] for n, x in metrics.items()}, tree.index(info.episodes, i)), seconds)

    @property
    def alive(self) -> list[bool]:
        """Which of the lanes are."""
        return [not h.window or bool(h.window[-1]["alive"] > 0.0) for h in self.each]

    def metrics(self) -> dict[str, float]:
        """Means over the lanes that are alive; `episodes` and `scheme/metrics/fps` of all together."""
        each = [h.metrics() for h, alive in zip(self.each, self.alive, strict=True) if alive]
        found = {n: [m[n] for m in each if n in m] for n in dict.fromkeys(n for m in each for n in m)}
        total = {n: math.fsum(x) / len(x) for n, x in found.items() if n not in ("time/total", "algo/alive")}
        total |= {f"{n}_iqm": iqm(found[n]) for n in ("performance/train", "performance/test") if n in found}
        speed = self.speed()
        if "scheme/metrics/fps" in speed:
            speed["scheme/metrics/fps"] *= len(self.each)
        count = {"lanes/alive": sum(self.alive), "episodes": sum(h.episodes for h in self.each)}
        return {**total, **speed, **count, "time/total": self.seconds}

    def line(self) -> dict[str, Any]:
        """The mean return since the last line, and `performance/*` of each lane."""
        lines = [{**h.metrics(), **h.line()} for h in self.each]
        recent = [x["performance/recent"] for x in lines if "performance/recent" in x]
        found: dict[str, Any] = {"performance/recent": math.fsum(recent) / len(recent)} if recent else {}
        for name in ("performance/train", "performance/recent", "performance/length", "algo/alive"):
            found[f"lanes/{name}"] = [x.get(name) for x in lines]
        return {**found, "lanes/number": self.numbers}

    def tested(self, found: Evaluation) -> dict[str, Any]:
        """Takes in an evaluation of all lanes; gives what is told of it."""
        self.test = tree.index(found, self.places)
        means = self.test.returns.double().mean(-1).tolist()
        for i, h in enumerate(self.each):
            h.tested(tree.index(self.test, i))
        living = [m for m, alive in zip(means, self.alive, strict=True) if alive]
        mean = math.fsum(living) / len(living)
        return {
            "performance/test": mean,
            "performance/test_iqm": iqm(living),
            "performance/test_std": math.sqrt(math.fsum((m - mean) ** 2 for m in living) / len(living)),
            "performance/test_episodes": self.test.returns.shape[-1],
            "lanes/performance/test": means,
            "lanes/number": self.numbers,
        }

    def told(self) -> Any:
        """What to save: a record for each lane. What a dead one says of its updates is not finite: zeros are kept."""
        for h in self.each:
            h.evaluated, h.begun, h.faults = self.evaluated, self.begun, self.faults
        return tuple(tree.map(torch.nan_to_num, h.told()) for h in self.each)
