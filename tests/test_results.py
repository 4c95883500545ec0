"""Statistics over seeds by plain loops from the paper, results read back, the report."""

import csv
import json
import re

import numpy as np
import pytest
from test_lanes import SIMPLE, parts

import fnrl
from fnrl import plots, report, results
from fnrl.cli import main

RNG = np.random.default_rng(0)


def plain_iqm(scores):
    """The mean of what is left without the lowest and the highest quarter."""
    flat = sorted(scores)
    cut = int(0.25 * len(flat))
    kept = flat[cut : len(flat) - cut]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("n", range(1, 14))
def test_the_interquartile_mean_is_the_papers(n):
    from scipy.stats import trim_mean

    scores = RNG.normal(size=n).tolist()
    assert results.iqm(scores) == pytest.approx(plain_iqm(scores))
    assert results.iqm(scores) == pytest.approx(trim_mean(scores, 0.25))


def test_an_interval_is_that_of_a_stratified_bootstrap():
    tasks = [RNG.normal(0.0, 1.0, 10), RNG.normal(50.0, 3.0, 7)]
    low, high = results.interval(tasks, samples=4000)
    rng = np.random.default_rng(1)

    def again(task):
        return task[rng.integers(0, len(task), len(task))]

    found = [plain_iqm([*again(tasks[0]), *again(tasks[1])]) for _ in range(4000)]  # each task's among themselves
    expected = np.percentile(found, [2.5, 97.5])
    spread = np.std(found)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.15 * spread)
    unstratified = [plain_iqm(again(np.concatenate(tasks))) for _ in range(4000)]
    assert np.std(unstratified) > 2 * spread  # so the two can be told apart
    assert results.interval(tasks) == results.interval(tasks)
    assert results.interval([[3.0]]) == (3.0, 3.0)
    with pytest.raises(ValueError, match=r"one seed can't be resampled.*\[1, 2\]"):
        results.interval([[1.0], [1.0, 2.0]])
    mean = results.interval(tasks, statistic=lambda x, axis: x.mean(axis), confidence=0.5)
    assert mean[0] < np.concatenate(tasks).mean() < mean[1]


def test_the_probability_of_improvement_is_the_papers():
    x, y = [RNG.integers(0, 5, 8).tolist(), RNG.integers(2, 9, 6).tolist()], [[3, 3, 1], [4.0, 4.0, 2.0, 7.0]]
    by_task = []
    for a, b in zip(x, y, strict=True):
        wins = 0.0
        for p in a:
            for q in b:
                wins += 1.0 if p > q else 0.5 if p == q else 0.0
        by_task.append(wins / (len(a) * len(b)))
    assert results.improvement(x, y) == pytest.approx(sum(by_task) / 2)
    assert results.improvement(x, y) + results.improvement(y, x) == pytest.approx(1.0)
    low, high = results.improvement_interval(x, y, samples=3000)
    rng = np.random.default_rng(2)
    found = [results.improvement(*[[rng.choice(t, len(t)) for t in side] for side in (x, y)]) for _ in range(3000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])), abs=0.05)
    assert results.improvement_interval([[1.0]], [[2.0]]) == (0.0, 0.0)


def run_directory(path, scores, seeds=None, swept=(), alive=None):
    """A run directory by hand: `scores` are by lane, at 100, 200, ... steps."""
    path.mkdir()
    lr = {"": "fnrl.component.PerLane", "values": list(swept)} if swept else 1e-3
    config = {"env": {"": "fnrl.envs.cartpole.CartPole"}, "algo": {"": "fnrl.algos.ppo.PPO", "lr": lr}}
    learner = {"seed": 5, "seeds": seeds or []}
    (path / "config.json").write_text(json.dumps({"scheme": {"parts": config}, "learner": learner}))
    lines = []
    for t, each in enumerate(zip(*scores, strict=True), 1):
        line = {"env_steps": 100 * t, "updates": t, "time/total": 3.0 * t, "performance/test": float(np.mean(each))}
        lanes = {"lanes/performance/test": each, "lanes/number": list(range(len(each)))}
        lines.append({"event": "evaluation", **line, **(lanes if seeds else {})})
        if seeds:
            lines.append({"env_steps": 100 * t, "lanes/algo/alive": alive or [1.0] * len(each), **lanes})
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_results_are_read_back_and_told(tmp_path, capsys):
    one = run_directory(tmp_path / "solo", [[1.0, 4.0]])
    many = run_directory(tmp_path / "many", [[1, 10], [2, 20], [3, 30], [4, 400]], [7, 8, 9, 3], alive=[1, 1, 0, 1])
    values = [1e-3, 1e-3, {"": "fnrl.component.Linear", "start": 0.01, "end": 0.0, "steps": 400}, 1e-4]
    sweep = run_directory(tmp_path / "sweep", [[5], [7], [50], [1]], [0, 1, 0, 0], values)
    solo, lanes, swept = (results.read(x) for x in (one, many, sweep))
    assert (solo.env, solo.algo, solo.scores, solo.lanes[0].seed) == ("CartPole", "PPO", [4.0], 5)
    assert [x.seed for x in lanes.lanes] == [7, 8, 9, 3]
    assert lanes.at() == ([100, 200], [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 400.0]])
    assert (results.iqm(lanes.scores), lanes.env_steps, lanes.seconds) == (25.0, 200, 6.0)
    best, second, last = results.settings(swept)
    assert best.values == {"lr": "Linear(start=0.01, end=0, steps=400)"}
    assert (best.iqm, second.scores, second.values, last.iqm) == (50.0, [5.0, 7.0], {"lr": "0.001"}, 1.0)
    out = tmp_path / "out" / "report.html"
    assert main(["report", str(one), str(many), str(sweep), "--out", str(out)]) == 0
    page, shown = out.read_text(), capsys.readouterr().out
    for text in ("Probability of improvement on CartPole", "Settings of sweep", "Lanes that died", "25.0"):
        assert text in page
        assert text in shown
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 2
    assert "http" not in page  # it needs nothing besides itself
    assert report.report([many], tmp_path / "page.md").read_text().count("![") == 2
    assert len(list(tmp_path.glob("page-*.png"))) == 2
    assert main(["report", str(sweep), "--out", str(tmp_path / "sweep.csv")]) == 0
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["lr"], r["lanes"], float(r["iqm"]), r["scores"]) for r in rows] == [
        ("Linear(start=0.01, end=0, steps=400)", "1", 50.0, "50.0"),
        ("0.001", "2", 6.0, "5.0 7.0"),
        ("0.0001", "1", 1.0, "1.0"),
    ]
    table = json.loads(report.report([sweep], tmp_path / "sweep.json").read_text())
    assert table[1] == {"lr": "0.001", "lanes": 2, "iqm": 6.0, "low": 5.0, "high": 7.0, "scores": [5.0, 7.0]}
    capsys.readouterr()
    two = [str(sweep), str(one), "--out", "x.csv"]
    wrong = (["nowhere"], "not a run directory"), ([str(one), "--out", "x.pdf"], ".html or .md"), (two, "for one run")
    for words, told in wrong:
        assert main(["report", *words]) == 1
        assert told in capsys.readouterr().err


def test_a_learner_leaves_what_is_reported(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError

    monkeypatch.setattr("fnrl.logs.TensorBoard", missing)
    sweep = fnrl.sweep(fnrl.Scheme(parts(), SIMPLE), lr=[1e-2, 1e-4], seeds=2)
    evaluation = fnrl.Evaluate(every=128, episodes=2)
    with fnrl.Learner(sweep.scheme, 384, tmp_path / "a", evaluation=evaluation, seeds=sweep.seeds) as learner:
        learner.step(8)
        learner.drop(1)
        learner.train(progress=False)
        tests = learner._history.test.returns.double().mean(-1).tolist()
    found = results.read(tmp_path / "a")
    assert [(x.number, x.seed, x.values["lr"], len(x.scores)) for x in found.lanes] == [
        (0, 0, "0.01", 3),
        (1, 1, "0.01", 2),
        (2, 0, "0.0001", 3),
        (3, 1, "0.0001", 3),
    ]
    assert [found.scores[i] for i in (0, 2, 3)] == tests
    assert (tmp_path / "a" / "curve.png").stat().st_size > 10_000
    assert plots.curves([found]).startswith(b"\x89PNG")


def test_runs_that_differ_in_the_seed_are_one_and_a_single_seed_has_no_interval(tmp_path, capsys):
    for i, scores in enumerate(([1.0, 5.0], [2.0, 9.0], [3.0, 7.0])):
        (tmp_path / "study").mkdir(exist_ok=True)
        run_directory(tmp_path / "study" / f"ppo-{i}", [scores])
    other = run_directory(tmp_path / "other", [[0.0, 6.0]])
    config = json.loads((other / "config.json").read_text())
    config["scheme"]["parts"]["algo"]["lr"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    study, alone = results.collected([tmp_path / "study", other])
    assert (study.name, study.scores, [x.number for x in study.lanes]) == ("ppo", [5.0, 9.0, 7.0], [0, 1, 2])
    assert (study.env_steps, study.seconds, alone.scores) == (200, 18.0, [6.0])
    found, improvements = report.tables([study, alone])
    assert [row[7] for row in found.rows] == ["5 to 9", "one seed"]
    assert [row[1:] for row in improvements.rows] == [("", "0.67"), ("0.33", "")]
    assert main(["report", str(tmp_path / "study"), str(other), "--out", str(tmp_path / "x.md")]) == 0
    assert "one seed" in capsys.readouterr().out
