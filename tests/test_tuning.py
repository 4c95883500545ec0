"""Trials of an optuna study are lanes of one program, told as optuna wants to hear of them."""

import sys
import warnings

import optuna
import pytest
import torch
from test_lanes import SIMPLE, Bad, parts

import fnrl
from fnrl.sweep import chosen

STEPS = 128


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """Neither TensorBoard nor a picture."""

    def missing(*_):
        raise ImportError

    monkeypatch.setattr("fnrl.logs.TensorBoard", missing)
    monkeypatch.setattr("fnrl.plots.curve", lambda directory: None)
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_of(seed=0):
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=seed))


SCHEME = fnrl.Scheme(parts(), SIMPLE)


def test_a_trial_has_the_score_of_its_lanes(tmp_path):
    study, space = study_of(), {"lr": fnrl.LogUniform(1e-4, 1e-2), "clip": [0.1, 0.3], "gamma": fnrl.Uniform(0.9, 1.0)}
    fnrl.tune(study, SCHEME, STEPS, tmp_path, trials=5, at_once=3, seeds=[4, 9], episodes=4, **space)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trial-0", "trial-3"]
    for trial in study.trials:
        assert 1e-4 <= trial.params["lr"] <= 1e-2
        assert trial.params["clip"] in (0.1, 0.3)
        assert 0.9 <= trial.params["gamma"] <= 1.0
    assert len({t.params["lr"] for t in study.trials}) == 5
    trial = study.trials[4]  # alone it comes to the same: its lanes have the bits that they had among others
    alone = chosen(SCHEME, [trial.params], [4, 9])
    assert (alone.seeds, len(alone)) == ((4, 9), 2)
    with fnrl.Learner(alone.scheme, STEPS, evaluation=fnrl.Evaluate(STEPS, 4), seeds=alone.seeds) as learner:
        hyper = learner.state.weights.hyper
        torch.testing.assert_close(hyper["lr"], torch.full((2,), trial.params["lr"]))
        learner.train(progress=False)
        scores = learner.evaluate().returns.mean(-1).tolist()
    assert trial.value == fnrl.results.iqm(scores)
    assert fnrl.results.read(tmp_path / "trial-3").scores[2:] == scores


@pytest.mark.parametrize("at_once", [6, 1])  # alone a trial that dies leaves no lane
def test_a_trial_that_dies_fails_and_the_others_count(at_once):
    study = study_of()
    p = parts()
    scheme = fnrl.Scheme(fnrl.Parts(p.env, p.actor, Bad(minibatches=2, epochs=2), p.storage, p.normalise_obs), SIMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fnrl.DeadLaneWarning)
        fnrl.tune(study, scheme, STEPS, trials=6, at_once=at_once, episodes=2, clip=[0.2, 0.3])
    told = {(t.params["clip"], t.state.name, t.value is None) for t in study.trials}
    assert told == {(0.2, "COMPLETE", False), (0.3, "FAIL", True)}


def test_what_training_raises_leaves_no_trial_open():
    study = study_of()
    with pytest.raises(fnrl.CompositionError, match="shapes the program"):
        fnrl.tune(study, SCHEME, STEPS, trials=4, at_once=2, epochs=[1, 2])
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL"]


def test_what_cannot_be_tuned_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="returns are to be maximised"):
        fnrl.tune(optuna.create_study(), SCHEME, STEPS, trials=1, lr=[1e-3])
    for wrong, told in (("lr", "expected a Uniform"), ([], "expected a Uniform"), ([fnrl.Linear(1.0, 0.0)], "Linear")):
        with pytest.raises(TypeError, match=told):
            fnrl.tune(study_of(), SCHEME, STEPS, trials=1, lr=wrong)
    for name in ("trials", "at_once"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            fnrl.tune(study_of(), SCHEME, STEPS, **{"trials": 1, name: 0}, lr=[1e-3])
    with pytest.raises(ValueError, match="same hyper-parameters"):
        chosen(SCHEME, [{"lr": 1e-3}, {"clip": 0.1}])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'fnrl\[optuna\]'"):
        fnrl.tune(None, SCHEME, STEPS, trials=1, lr=[1e-3])
