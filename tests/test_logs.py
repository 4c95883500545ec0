"""What a run shows of itself: speed without the warm-up, and how an evaluation gets on."""

import sys

import pytest

import fnrl
from fnrl import logs


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a clock, to be set."""
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def told(clock, made, seconds, steps):
    clock[0] = seconds
    return made.text(steps)


def test_speed_is_that_of_the_last_minute(clock):
    made = logs.Clock(0, 100_000)
    assert "1% " in told(clock, made, 10.0, 1_000)
    assert "  100 steps/s  16:30 left" in told(clock, made, 10.0, 1_000)
    for second in range(20, 101, 10):  # a tenth as fast from there on
        text = told(clock, made, float(second), 1_000 + 10 * (second - 10))
    assert "  10 steps/s" in text
    assert "? left" in logs.Clock(7, 100).text(7)


def test_a_warm_up_says_nothing_of_speed(clock):
    made = logs.Clock(0, 11_000, warmup=1_000)
    assert "  ? steps/s  ? left" in told(clock, made, 1.0, 1_000)
    assert "  20 steps/s  8:15 left" in told(clock, made, 6.0, 1_100)
    resumed = logs.Clock(2_000, 3_000, warmup=1_000)
    assert "  50 steps/s" in told(clock, resumed, 16.0, 2_500)


def test_the_metric_of_speed_leaves_the_warm_up_out():
    env = fnrl.envs.CartPole(num_envs=2)
    actor = fnrl.OffPolicyActorCritic(env.spec, fnrl.MLP((4,)), fnrl.MLP((4,)))
    parts = fnrl.Parts(env, actor, fnrl.SAC(batch=4), fnrl.Replay(capacity=400, warmup=100))
    with fnrl.Learner(fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect))), 10**6) as learner:
        learner.step()
        assert list(learner._history.pace) == [(100, learner._history.busy)]
        learner.step(200)
        (first, begun), (last, busy) = learner._history.pace[0], learner._history.pace[-1]
        assert first == 100
        assert learner.get_metrics()["scheme/metrics/fps"] == pytest.approx((last - first) / (busy - begun))


def test_an_evaluation_is_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with logs.episodes(20) as show:
        show(3, 1_250)
    said = capsys.readouterr()
    assert said.out == ""
    assert "3/20" in said.err
    assert "1,250 steps" in said.err
