"""The learner: the loop around a scheme, in a shell that saves, resumes, evaluates, logs, and shows how it gets on.

All of the learning is in `learner.state`, a value; the shell holds what a person wants besides. The same updates are
made as in `while ...: state, info = scheme.step(state)`, with or without evaluation, saving and logging.
"""

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnrl import checkpoint, lanes, logs, plots, random, saved, tree
from fnrl.checkpoint import CheckpointWarning
from fnrl.component import printed
from fnrl.errors import CheckpointError, StaleStateError
from fnrl.evaluate import Evaluation, evaluate
from fnrl.history import History, LaneHistory, faults_of
from fnrl.interrupts import Held, terminating
from fnrl.merge import merge_infos
from fnrl.policy import FILE, policy_of, save_lanes
from fnrl.rundir import RunDirectory
from fnrl.saved import LearnerState
from fnrl.scheme import Scheme, SchemeState
from fnrl.settings import Evaluate, Settings, idle_rates, of_evaluation
from fnrl.types import Info

_LINE = 100  # environment steps between two lines of metrics, at least
_EVALUATION_KEY = 2  # folded into the run's key, which the scheme folds with 0 and 1


class Learner:
    """Trains a scheme to `target_steps` environment steps, from one seed, or from several as lanes of one program.

    `seeds` is a count (0, 1, ...), the seeds themselves, or keys `[S, 2]`; lane i is what seed i is alone, and one seed
    alone runs twice, so that its bits are those it has among others. Metrics are then means and interquartile means
    over the lanes that are alive, with a list for each lane in `metrics.jsonl`; a lane that turns non-finite is warned
    of (`DeadLaneWarning`) and stands still.

    With `log_dir` the run has a directory: checkpoints every `save_every` environment steps (the `keep` newest stay),
    `metrics.jsonl`, `tensorboard/`, `config.json`, `arrivals.jsonl` where something is not synchronous, at
    the end `curve.png` and `policy.safetensors`. A context manager; in `with` and in `train` the update under way is
    finished and saved on Ctrl-C or SIGTERM (which raises SystemExit, unless the program handles it itself), and a
    second Ctrl-C stops at once.

    Errors: ValueError for a bad number; CheckpointError when the directory is in use or holds a run already. A fault
    while stepping (NonFiniteError, EnvironmentFault) is told in `metrics.jsonl`, closes the learner and is raised.
    """

    def __init__(
        self,
        scheme: Scheme,
        target_steps: int,
        log_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        evaluation: Evaluate | None = None,
        save_every: int = 100_000,
        keep: int = 3,
        seeds: int | Sequence[int] | Tensor | None = None,
    ) -> None:
        _require_scheme(scheme)
        which = () if seeds is None else lanes.named(seeds, repeated=lanes.swept(scheme.parts))
        settings = Settings(seed, target_steps, save_every, keep, **of_evaluation(evaluation), seeds=which)
        with self._opening(scheme, settings, evaluation, log_dir):
            self._home.refuse_a_run()
            with Held():
                self.state = scheme.init(settings.keys())
            self._start(None)

    @classmethod
    def resume(
        cls,
        log_dir: str | os.PathLike[str],
        scheme: Scheme,
        target_steps: int | None = None,
        evaluation: Evaluate | None = None,
    ) -> "Learner":
        """The learner of a run directory as it was at its newest good checkpoint; exact, metrics' windows included.

        The scheme comes from code: where it differs from the one that was saved, a `CheckpointWarning` shows how, and
        the code's counts from now on (schedules from the next plan); only what `update_algo_parameter` has set stays.
        Give `target_steps` to go on further, `evaluation` to change it.
        Errors: CheckpointError when there is no good checkpoint, it doesn't fit, or the directory is in use; ValueError
        for fewer `target_steps` than are done.
        """
        if not Path(log_dir).is_dir():
            raise CheckpointError(f"{log_dir} is not a run directory: there is nothing to resume")
        _require_scheme(scheme)
        like, settings, evaluation = saved.continuing(log_dir, scheme, target_steps, evaluation)
        self = cls.__new__(cls)
        with self._opening(scheme, settings, evaluation, log_dir):
            newest = checkpoint.newest(log_dir, like)  # again, under the lock
            with Held():
                self.state = scheme.restore(tree.to(newest.state.scheme, scheme.device), copy=False)
            self._start(newest.state.told)
            before, now = newest.state.scheme.weights.hyper, self.state.weights.hyper
            moved = {f"hyper/{n}": x.tolist() for n, x in now.items() if not torch.equal(x.cpu(), before[n])}
            if moved:
                self._event("set", moved)
            else:
                self._saved = self.state, self._history.test, newest.path
        return self

    # -- NAPPO's methods ----------------------------------------------------------------------------------------

    def step(self, updates: int = 1) -> Info:
        """`updates` updates; evaluates, logs and saves where a plan ends and it is time. The metrics are means."""
        if updates < 1:
            raise ValueError(f"step(updates={updates}): expected at least 1")
        if self._closed:
            raise RuntimeError("this learner is closed: Learner.resume(log_dir, scheme) goes on from its checkpoint")
        if self._fresh:  # only now: a rate may have been set since the learner was made
            self._fresh, declared = False, self.scheme.parts.hypers()
            for text in idle_rates(declared, self.state.node.pinned, self.settings.target_steps):
                warnings.warn(text, stacklevel=2)
        return merge_infos(self._update() for _ in range(updates))

    def _update(self) -> Info:
        """One update, and what it led to."""
        try:
            with Held():
                begin = time.perf_counter()
                self.state, info = self.scheme.step(self.state)
                self._history.update(info, time.perf_counter() - begin)
                self._note_faults(faults_of(info))
                self._home.choices(self.state.version, info.choices)
                if self.state.version == 1 and self.scheme.parts.storage.warmup:
                    self._history.begin_pace(self.state.env_steps)
        except Exception as error:
            self._fault(error, sound=False)
            raise
        try:
            self._between_plans()
        except Exception as error:
            self._fault(error, sound=True)
            raise
        return info

    @property
    def directory(self) -> Path | None:
        """The run's directory, if it has one."""
        return self._home.path

    def done(self) -> bool:
        """Whether the target is reached, and the rollout that reached it has been learnt from in full."""
        return self.state.env_steps >= self.settings.target_steps and self.state.settled

    def print_info(self) -> None:
        """Prints where the run stands."""
        print(f"{self.state.env_steps:,} steps  {logs.summary(self.get_metrics())}", flush=True)

    def get_metrics(self) -> dict[str, float]:
        """Means over the last 100 episodes (`performance/train`, `/length`) and the last plan's updates (`algo/*`).

        Besides: `performance/test` (the last evaluation), `time/*` (seconds a plan, of all workers together),
        `scheme/metrics/fps` (environment steps a second, evaluation and saving apart), `scheme/metrics/collection_lag`
        and `gradient_lag` (versions that rollouts and gradients were behind the weights they were used with),
        `env_steps`, `updates`, `episodes`, `hyper/*` where one moves; `faults/*`, the workers that were replaced in
        the whole run, by what befell them.
        """
        found: dict[str, float] = {"env_steps": self.state.env_steps, "updates": self.state.version}
        pinned, declared = self.state.node.pinned, self.scheme.parts.hypers()
        moving = [n for n, v in declared.items() if n in pinned or not isinstance(v, int | float)]
        now = {n: self.state.weights.hyper[n].flatten() for n in moving}
        hyper = {f"hyper/{n}": float(x[0]) for n, x in now.items() if bool((x == x[0]).all())}
        return found | self._history.metrics() | hyper

    def save_model(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes the policy alone, for `fnrl.load_policy`: to `path`, or `policy.safetensors` in the directory. With
        lanes each has a file, `policy-lane3.safetensors`.
        """
        if path is None:
            path = self._home.store("save_model(path=...) needs a path").directory / FILE
        weights, actor = self.state.weights, self.scheme.parts.actor
        if self.state.lanes is None:
            return policy_of(actor, weights).save(path)
        return save_lanes(actor, weights, lanes.shown(self.state), Path(path))

    def drop(self, *numbers: int) -> None:
        """Takes some lanes out: the others go on bit for bit. Errors: ValueError for a lane that isn't there."""
        before, told, places = self.state, self._history.told(), lanes.shown(self.state)
        self.state = self.scheme.drop(before, *numbers)
        self.scheme.close(before)
        kept = [t for n, t in zip(places, told, strict=True) if n not in numbers]  # type: ignore[arg-type]
        self._history = self._history_of(kept)
        self._event("dropped", {"lanes": list(numbers)})

    def update_algo_parameter(self, name: str, value: float | Sequence[float]) -> None:
        """Sets a hyper-parameter from now on, to a number or one for each lane; a schedule of that name no longer moves
        it, also when resumed.

        Errors: ValueError for an unknown name (with the nearest) or a value out of range.
        """
        self.state = self.scheme.set(self.state, **{name: value})
        self._event("set", {f"hyper/{name}": value})

    # -- saving, evaluating, training ---------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of everything. Errors: CheckpointError; ValueError without log_dir."""
        store = self._home.store("save() needs a directory")
        if self._saved is None or self._saved[0] is not self.state or self._saved[1] is not self._history.test:
            state = LearnerState(self.scheme.gather(self.state, copy=False), self._history.told(), self.settings)
            path = store.save(state, step=self.state.env_steps, config=self.scheme, metrics=self.get_metrics())
            self._saved, self._saved_steps = (self.state, self._history.test, path), self.state.env_steps
        return self._saved[2]

    def evaluate(self, episodes: int | None = None) -> Evaluation:
        """The deterministic policy over whole episodes (those of `evaluation`, or 10), told in the metrics; with lanes
        all of them are played at once, returns `[S, E]`.

        The key is folded from the version: a pure function of the state, which does not move.
        """
        episodes = episodes or self.settings.episodes or 10
        parts, weights = self.scheme.parts, tree.to(self.state.weights, "cpu")
        env = self.evaluation.env if self.evaluation and self.evaluation.env is not None else None
        if env is None:
            env = dataclasses.replace(parts.env, num_envs=min(episodes, 10))  # type: ignore[type-var]
        keys = self.settings.keys(lanes.order(self.state))
        fold = random.fold_in if self.state.lanes is None else torch.func.vmap(random.fold_in, (0, None))
        found = evaluate(parts, weights, fold(fold(keys, _EVALUATION_KEY), self.state.version), episodes, env)
        self._event("evaluation", self._history.tested(found))
        assert self._history.test is not None
        return self._history.test

    def train(self, progress: bool = True) -> dict[str, float]:
        """Steps to the target, then evaluates (if there is an `evaluation`), saves, leaves the policy and the learning
        curve; gives the metrics.
        """
        env_steps, target = self.state.env_steps, self.settings.target_steps
        warmup = self.scheme.parts.storage.warmup
        shown = logs.progress(env_steps, target, warmup) if progress and not self.done() else logs.Silent()
        with contextlib.closing(shown), terminating():
            try:
                self._evaluate_when_due()
                while not self.done():
                    info = self.step()
                    if progress and "time/compile" in info.report:
                        print(
                            f"compiled in {info.report['time/compile']:.1f} s; later runs find it on disk", flush=True
                        )
                    shown.update(self.get_metrics, self.state.env_steps)
                self._finish()
            except (KeyboardInterrupt, SystemExit):
                self._interrupted()
                raise
        return self.get_metrics()

    def close(self) -> None:
        """Closes environments, workers and logs, and gives the directory back; safe to call twice."""
        self._closed = True
        self._closing.close()

    def __enter__(self) -> "Learner":
        self._inside.enter_context(terminating())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._inside:
            if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
                self._interrupted()
            self.close()

    # -- inside -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opening(
        self, scheme: Scheme, settings: Settings, evaluation: Evaluate | None, log_dir: str | os.PathLike[str] | None
    ) -> Iterator[None]:
        """Takes the directory; what is open is closed again if the rest of opening fails."""
        if evaluation is not None and evaluation.env is not None:
            dataclasses.replace(scheme.parts, env=evaluation.env)  # refuses other spaces
        self.scheme, self.settings, self.evaluation = scheme, settings, evaluation
        self._closing, self._closed, self._fresh = contextlib.ExitStack(), False, True
        self._inside = contextlib.ExitStack()  # of a `with` block
        self._home = RunDirectory(log_dir, settings.keep)
        self._saved: tuple[SchemeState, Evaluation | None, Path] | None = None
        self._closing.callback(self._home.close)
        try:
            yield
        except BaseException:
            self._closing.close()
            raise

    def _start(self, told: Any) -> None:
        self._closing.callback(lambda: self.scheme.close(self.state))
        version, steps = self.state.version, self.state.env_steps
        self._history = self._history_of(told)
        self._line_at, self._saved_steps = version, steps
        said = {"scheme": printed(self.scheme), "learner": dataclasses.asdict(self.settings)}
        faults = {"faults": self._history.faults} if self._history.faults else {}
        self._home.begin(None if told is None else version, said | faults)

    def _note_faults(self, faults: dict[str, float]) -> None:
        """Tells of workers that were replaced: at once, and in the run's configuration."""
        if faults:
            self._event("recovered", faults)
            self._home.amend({"faults": self._history.faults})

    def _note_late_faults(self) -> None:
        """Those that were met as the state was gathered, where no step comes after it to tell them."""
        faults = self.scheme.executor.untold()
        self._history.count(faults)
        self._note_faults(faults)

    def _history_of(self, told: Any) -> History:
        about = self._updates_of_a_line(), self.state.env_steps
        if self.state.lanes is None:
            return History(*about, told)
        return LaneHistory(*about, lanes.shown(self.state), told or ())

    def _updates_of_a_line(self) -> int:
        rollout = self.scheme.parts.storage.steps * self.scheme.topology.envs(self.scheme.parts)
        return self.scheme.updates * math.ceil(_LINE / rollout)

    def _between_plans(self) -> None:
        if not self.state.settled:
            return
        self._evaluate_when_due()
        every = self._updates_of_a_line()
        if self.state.version // every > self._line_at // every or self.done():
            self._history.pace.append((self.state.env_steps, self._history.busy))
            self._tell()
        every = self.settings.save_every
        if self._home and self.state.env_steps // every > self._saved_steps // every:
            try:
                self.save()
            except CheckpointError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                warnings.warn(
                    f"{error}; training goes on, the next try is at the next save", CheckpointWarning, stacklevel=3
                )
                self._saved_steps = self.state.env_steps

    def _evaluate_when_due(self) -> None:
        every, steps = self.settings.every, self.state.env_steps
        if every and self.state.settled and steps // every > self._history.evaluated // every:
            self.evaluate()
            self._history.evaluated = steps

    def _tell(self) -> None:
        """One line of metrics."""
        if self.state.settled and self.state.version > self._line_at:
            line = self.get_metrics() | self._history.line()
            for name in ("performance/test", "performance/test_iqm"):  # evaluations have lines of their own
                line.pop(name, None)
            self._home.write(line)
            self._line_at = self.state.version

    def _event(self, kind: str, facts: dict[str, Any]) -> None:
        where = {"updates": self.state.version, "env_steps": self.state.env_steps}
        self._home.write({"event": kind, **where, "time/total": self._history.seconds, **facts})

    def _finish(self) -> None:
        try:
            if self.settings.every and self._history.evaluated < self.state.env_steps:
                self.evaluate()
                self._history.evaluated = self.state.env_steps
            if self._home.path:
                self.save()
                self._note_late_faults()
                self.save_model()
                plots.curve(self._home.path)
                self._event("finished", {})
        except Exception as error:
            self._fault(error, sound=True)
            raise

    def _interrupted(self) -> None:
        if self._closed:
            return
        self._tell()
        saved = None
        try:
            saved = self.save() if self._home else None
            self._note_late_faults()
        except (CheckpointError, StaleStateError) as error:
            warnings.warn(f"the run was interrupted and could not be saved: {error}", CheckpointWarning, stacklevel=3)
        self._event("interrupted", {"saved": saved and saved.name})
        self._close_anyhow()

    def _fault(self, error: Exception, sound: bool) -> None:
        """Tells a fault and closes; the state is saved if the fault was not in stepping it."""
        if sound and self._home and not isinstance(error, CheckpointError):
            with contextlib.suppress(CheckpointError, StaleStateError):
                self.save()
        met = Counter(vars(error).get("faults", {})) + Counter(self.scheme.executor.untold())  # and not told yet
        faults = {n: float(x) for n, x in met.items()}
        self._event("fault", {"error": type(error).__name__, "message": str(error), **faults})
        if faults:
            self._history.count(faults)
            self._home.amend({"faults": self._history.faults})
        self._close_anyhow()

    def _close_anyhow(self) -> None:
        try:
            self.close()
        except Exception as error:
            warnings.warn(
                f"not everything could be closed: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3
            )


def _require_scheme(scheme: Any) -> None:
    if not isinstance(scheme, Scheme):
        raise TypeError(f"Learner takes a Scheme(parts, topology), got {scheme!r}")
