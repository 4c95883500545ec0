"""Many seeds in the learner: exact resume, metrics by lane and over lanes, evaluation, policies, the command line."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_lanes import SIMPLE, Bad, lane, parts, run, same

import fnrl
from fnrl import logs, tree
from fnrl.cli import main
from fnrl.logs import read_lines

PLAN, STEPS = 4, 128
EVALUATION = fnrl.Evaluate(every=STEPS, episodes=3)


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """Neither TensorBoard nor a picture."""

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(logs, "TensorBoard", missing)
    monkeypatch.setattr(fnrl.plots, "curve", lambda directory: None)


def scheme(**ppo):
    return fnrl.Scheme(parts(**ppo), SIMPLE)


def bits(learner):
    return learner.scheme.gather(learner.state)


def windows(learner):
    h = learner._history
    told = [(list(x.returns), list(x.lengths), x.recent, x.episodes) for x in h.each]
    return told, h.evaluated, h.test and h.test.returns.tolist(), learner.get_metrics()["algo/loss"]


def test_many_seeds_resume_exactly_with_evaluation_on(tmp_path):
    with fnrl.Learner(scheme(), 4 * STEPS, evaluation=EVALUATION, seeds=3) as whole:
        whole.step(16)
        bare, _ = run(whole.scheme, whole.scheme.init(fnrl.seeds(3)), 16)
        assert same(bits(whole), whole.scheme.gather(bare))
        with fnrl.Learner(scheme(), 4 * STEPS, tmp_path, evaluation=EVALUATION, seeds=[0, 1, 2]) as first:
            first.step(6)
            first.save()
        with fnrl.Learner.resume(tmp_path, scheme()) as second:
            assert windows(second) == windows(first)
            second.step(10)
            assert second.done()
            assert same(bits(second), bits(whole))
            assert windows(second) == windows(whole)
    with (
        pytest.warns(UserWarning, match="differ|configuration"),
        fnrl.Learner.resume(tmp_path, scheme(lr=1e-2)) as third,
    ):
        assert third.state.weights.hyper["lr"].tolist() == pytest.approx([1e-2] * 3)
    with pytest.raises(fnrl.CheckpointError, match="doesn't fit"):
        fnrl.Learner.resume(tmp_path, dataclasses.replace(scheme(), parts=parts(recurrent=True)))


def test_metrics_are_those_of_each_lane_and_their_means(tmp_path):
    with fnrl.Learner(scheme(), 3 * STEPS, tmp_path, evaluation=EVALUATION, seeds=4) as learner:
        state, returns, losses = learner.scheme.init(fnrl.seeds(4)), [[] for _ in range(4)], []
        for _ in range(12):
            state, info = learner.scheme.step(state)
            losses.append(info.metrics["loss"])
            for e in info.episodes:
                for i in range(4):
                    returns[i] += e.returns[i][e.end[i]].tolist()
        metrics = learner.train(progress=False)
        means = [np.mean(r[-100:]) for r in returns]
        assert metrics["performance/train"] == pytest.approx(np.mean(means))
        assert metrics["performance/train_iqm"] == pytest.approx(np.mean(sorted(means)[1:3]))
        assert metrics["algo/loss"] == pytest.approx(float(torch.stack(losses[-PLAN:]).mean()), rel=1e-5)
        assert (metrics["episodes"], metrics["lanes/alive"]) == (sum(map(len, returns)), 4)
        assert metrics["env_steps"] == 3 * STEPS
        tests = learner._history.test.returns
        assert tests.shape == (4, 3)
        assert metrics["performance/test"] == pytest.approx(float(tests.mean()))
    lines = read_lines(tmp_path)
    assert [x for x in lines if "event" not in x][-1]["lanes/performance/train"] == pytest.approx(means)
    last = [x for x in lines if x.get("event") == "evaluation"][-1]
    assert last["lanes/performance/test"] == pytest.approx(tests.double().mean(-1).tolist())
    assert json.loads((tmp_path / "config.json").read_text())["learner"]["seeds"] == [0, 1, 2, 3]


def test_episodes_of_a_lane_do_not_depend_on_the_others():
    s = scheme(lr=1e-2)
    state, _ = run(s, s.init(fnrl.seeds(3)), 20)
    keys = fnrl.seeds([5, 6, 7])
    three = fnrl.evaluate(s.parts, state.weights, keys, 6)
    two = fnrl.evaluate(s.parts, tree.map(lambda x: x[1:], state.weights), keys[1:], 6)
    assert three.returns.shape == (3, 8)  # two in each of four environments
    assert same((three.returns[1:], three.lengths[1:]), (two.returns, two.lengths))
    for i in range(3):
        alone = fnrl.evaluate(s.parts, tree.index(state.weights, i), keys[i], 6)
        assert torch.equal(alone.returns, three.returns[i])
    assert len(set(three.returns.flatten().tolist())) > 3


def test_a_policy_is_that_of_a_seed(tmp_path):
    with fnrl.Learner(scheme(), STEPS, tmp_path, seeds=[3, 9]) as learner:
        learner.train(progress=False)
        weights = learner.state.weights
    for seed, place in ((3, 0), (9, 1)):
        for policy in (
            fnrl.load_policy(tmp_path, seed=seed),
            fnrl.load_policy(tmp_path / f"policy-lane{place}.safetensors"),
        ):
            assert torch.equal(policy.params.vector, weights.params.vector[place])
            assert torch.equal(policy.normaliser.moments.mean, weights.normaliser.moments.mean[place])
    assert torch.equal(fnrl.load_policy(tmp_path, lane=1).params.vector, weights.params.vector[1])
    for wrong in ({}, {"seed": 1}, {"lane": 2}, {"seed": 3, "lane": 1}):
        with pytest.raises(fnrl.CheckpointError, match=r"0 \(seed 3\), 1 \(seed 9\)"):
            fnrl.load_policy(tmp_path, **wrong)


def test_one_seed_among_lanes_runs_twice_and_shows_once(tmp_path):
    with fnrl.Learner(scheme(), STEPS, tmp_path, seeds=[7], evaluation=EVALUATION) as one:
        metrics = one.train(progress=False)
        assert (one.state.lanes, metrics["lanes/alive"], one._history.test.returns.shape) == (2, 1, (1, 3))
    with fnrl.Learner(scheme(), STEPS, seeds=[1, 7], evaluation=EVALUATION) as two:
        two.train(progress=False)
        assert same(lane(bits(one), 0), lane(bits(two), 1))
        assert torch.equal(one._history.test.returns[0], two._history.test.returns[1])
    assert [p.name for p in tmp_path.glob("policy*")] == ["policy-lane0.safetensors"]
    assert torch.equal(fnrl.load_policy(tmp_path, seed=7).params.vector, one.state.weights.params.vector[0])


def test_a_lane_that_is_dropped_leaves_the_others_as_they_were(tmp_path):
    with fnrl.Learner(scheme(), 3 * STEPS, tmp_path, seeds=4, evaluation=EVALUATION) as learner:
        learner.step(6)
        learner.drop(1, 2)
        learner.step(2)
        learner.save()
    with fnrl.Learner.resume(tmp_path, scheme()) as learner:
        learner.step(4)
        few, told = bits(learner), windows(learner)[0]
        assert learner.state.which == (0, 3)
        learner.train(progress=False)
    with fnrl.Learner(scheme(), 3 * STEPS, seeds=4, evaluation=EVALUATION) as whole:
        whole.step(12)
        for place, number in enumerate((0, 3)):
            assert same(lane(few, place), lane(bits(whole), number))
            assert told[place] == windows(whole)[0][number]
            assert torch.equal(learner._history.test.returns[place], whole._history.test.returns[number])
    assert sorted(p.name for p in tmp_path.glob("policy*")) == ["policy-lane0.safetensors", "policy-lane3.safetensors"]


def test_a_dead_lane_is_told_and_saved_and_counts_no_more(tmp_path):
    s = dataclasses.replace(scheme(), parts=dataclasses.replace(parts(), algo=Bad(minibatches=2, epochs=2)))
    with fnrl.Learner(s, 4 * STEPS, tmp_path, seeds=3, evaluation=EVALUATION) as learner:
        learner.step(6)
        learner.update_algo_parameter("clip", [0.2, 0.3, 0.2])
        with pytest.warns(fnrl.DeadLaneWarning, match="lane 1 is dead: update 6"):
            metrics = learner.train(progress=False)
        h = learner._history
        assert h.alive == [True, False, True]
        assert metrics["lanes/alive"] == 2
        assert np.isfinite(list(metrics.values())).all()
        tests = h.test.returns.mean(-1)
        assert metrics["performance/test"] == pytest.approx(float(tests[[0, 2]].mean()))
        before = bits(learner)
    with fnrl.Learner.resume(tmp_path, s, 5 * STEPS) as learner:
        assert same(bits(learner), before)
        assert learner._history.alive == [True, False, True]


def test_seeds_that_come_twice_are_warned_of_but_not_in_a_sweep():
    with pytest.warns(UserWarning, match=r"more than once: \[1\]"):
        fnrl.Learner(scheme(), STEPS, seeds=[1, 1]).close()
    sweep = fnrl.sweep(scheme(), lr=[1e-3, 1e-4], seeds=2)
    with fnrl.Learner(sweep.scheme, STEPS, seeds=sweep.seeds) as learner:
        learner.step(PLAN)
        assert "hyper/lr" not in learner.get_metrics()
    with pytest.raises(ValueError, match="at least one seed"):
        fnrl.Learner(scheme(), STEPS, seeds=0)


def test_many_seeds_on_the_command_line(tmp_path, capsys):
    small = "--num-envs 2 --storage.steps 16 --algo.epochs 1 --algo.minibatches 2 --actor.policy.hidden 8"
    line = f"--env CartPole {small} --env.time_limit 20 --eval-episodes 2 --seeds 3 --quiet"
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(f"train {line} --steps 128 --algo.lr 1e-3 --dir {one}".split()) == 0
    assert main(f"resume {one} --steps 256 --quiet".split()) == 0
    assert main(f"train {line} --steps 256 --algo.lr 1e-3 --dir {two}".split()) == 0
    a, b = (fnrl.checkpoint.newest(d).state for d in (one, two))
    assert same(a.scheme, b.scheme)
    line_of = f"train {line.replace('--seeds 3', '--seeds 4')} --steps 64"
    for shards in (1, 2):
        assert main(f"{line_of} --shards {shards} --dir {tmp_path / str(shards)}".split()) == 0
    assert same(*(fnrl.checkpoint.newest(tmp_path / str(n)).state.scheme for n in (1, 2)))
    assert main(f"resume {tmp_path / '2'} --steps 128 --quiet".split()) == 0
    assert fnrl.checkpoint.newest(tmp_path / "2").state.scheme.env_steps == 128
    capsys.readouterr()
    assert main(f"evaluate {one} --episodes 4".split()) == 0
    out = capsys.readouterr().out
    assert "3 lanes" in out
    assert "interquartile mean" in out
    assert main(f"train {line} --seed 4 --steps 32 --dir {tmp_path / 'three'} --seeds 4 9".split()) == 0
    assert fnrl.checkpoint.newest(tmp_path / "three").state.settings.seeds == (4, 9)
