"""A learner that goes on: what counts of the saved and of the given configuration, how far it goes, what it tells."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from hosted_cases import Count, limited
from learner_cases import PLAN, STEPS, bits, light, quiet, scheme  # noqa: F401

import fnrl
from fnrl import tree
from fnrl.checkpoint import CheckpointWarning, newest
from fnrl.component import printed
from fnrl.config import rebuild
from fnrl.logs import read_lines


def saved_at(path, updates, steps=4 * STEPS, evaluation=None, **algo):
    with quiet(scheme(**algo), steps, path, evaluation=evaluation) as learner:
        learner.step(updates)
        learner.save()
        return bits(learner)


def lr(learner):
    return float(learner.state.weights.hyper["lr"])


# -- hyper-parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [PLAN, PLAN + 3])
def test_a_constant_given_in_code_counts_from_now_on(tmp_path, at):
    before = saved_at(tmp_path, at, lr=3e-4)
    with pytest.warns(CheckpointWarning, match=r"given counts from now on.*\n  parts\.algo\.lr: 0\.0003 -> 0\.0$"):
        learner = fnrl.Learner.resume(tmp_path, scheme(lr=0.0))
    with learner:
        assert lr(learner) == 0.0
        learner.step(PLAN)
        assert torch.equal(learner.state.weights.params.vector, before.weights.params.vector)  # nothing was learnt
        learner.save()
    assert float(newest(tmp_path).state.scheme.weights.hyper["lr"]) == 0.0
    assert json.loads((tmp_path / "config.json").read_text())["scheme"]["parts"]["algo"]["lr"] == 0.0
    assert [x["hyper/lr"] for x in read_lines(tmp_path) if x.get("event") == "set"] == [0.0]


def test_what_was_set_stays_whatever_the_code_says(tmp_path):
    with quiet(scheme(lr=3e-4, gamma=0.99), 4 * STEPS, tmp_path) as learner:
        learner.step(3)
        learner.update_algo_parameter("lr", 5e-4)
        learner.save()
    with pytest.warns(CheckpointWarning, match=r"lr: 0\.0003 -> 0\.01\n.*gamma.*\n  lr stays 0\.0005: it was set$"):
        learner = fnrl.Learner.resume(tmp_path, scheme(lr=1e-2, gamma=0.9))
    with learner:
        learner.step(2 * PLAN)
        assert learner.get_metrics()["hyper/lr"] == pytest.approx(5e-4)
        assert float(learner.state.weights.hyper["gamma"]) == pytest.approx(0.9)


def test_a_schedule_given_in_code_begins_with_the_next_plan(tmp_path):
    line = fnrl.Linear(1e-2, 1e-3, steps=8 * STEPS)
    saved_at(tmp_path / "inside", PLAN + 3, lr=3e-4)
    saved_at(tmp_path / "between", PLAN, lr=3e-4)
    with pytest.warns(CheckpointWarning):
        inside, between = (fnrl.Learner.resume(tmp_path / d, scheme(lr=line)) for d in ("inside", "between"))
    with inside, between:
        assert (lr(inside), lr(between)) == (pytest.approx(3e-4), pytest.approx(line(STEPS)))
        inside.step(PLAN - 3)
        assert lr(inside) == pytest.approx(line(2 * STEPS))


@pytest.mark.parametrize("at", [0, 3, PLAN, PLAN + 3])
def test_restoring_with_the_same_schedule_changes_no_bit(at):
    s = scheme(lr=fnrl.Linear(1e-3, 1e-5, steps=3 * STEPS), clip=fnrl.Linear(0.3, 0.1, steps=3 * STEPS))
    state = s.init(fnrl.key(0))
    for _ in range(at):
        state, _ = s.step(state)
    assert tree.different_bits(s.gather(s.restore(s.gather(state))), s.gather(state)) == []


# -- how far --------------------------------------------------------------------------------------------------------


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    saved_at(tmp_path, 3 * PLAN)
    with pytest.raises(ValueError, match=rf"target_steps={STEPS}\): {3 * STEPS} environment steps are done already"):
        fnrl.Learner.resume(tmp_path, scheme(), STEPS)
    fnrl.Learner.resume(tmp_path, scheme(), 3 * STEPS).close()


def test_the_target_it_had_may_be_given_again(tmp_path):
    with quiet(scheme(), STEPS - 1, tmp_path) as learner:  # the last rollout goes past it
        learner.train(progress=False)
        assert learner.state.env_steps == STEPS
    with fnrl.Learner.resume(tmp_path, scheme(), STEPS - 1) as learner:
        assert learner.done()


def test_a_rate_that_ends_before_the_run_is_told(tmp_path):
    line = fnrl.Linear(1e-3, 0.0, steps=2 * STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved_at(tmp_path, PLAN, steps=2 * STEPS, lr=line)
        with fnrl.Learner.resume(tmp_path, scheme(lr=line)) as learner:
            learner.step()
    with fnrl.Learner.resume(tmp_path, scheme(lr=line), 4 * STEPS) as learner:
        with pytest.warns(
            UserWarning, match=f"lr is 0 from {2 * STEPS} .*goes to {4 * STEPS}: the rest learns nothing"
        ):
            learner.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learner.step()  # once is enough
    with fnrl.Learner.resume(tmp_path, scheme(lr=line), 4 * STEPS) as learner, warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.update_algo_parameter("lr", 1e-4)
        learner.step()


# -- evaluation and metrics -----------------------------------------------------------------------------------------

SHORT = fnrl.envs.CartPole(num_envs=3, time_limit=5)


def test_the_environment_of_the_evaluation_is_saved_with_the_run(tmp_path):
    saved_at(tmp_path, PLAN, evaluation=fnrl.Evaluate(every=STEPS, episodes=3, env=SHORT))
    with fnrl.Learner.resume(tmp_path, scheme()) as learner:
        assert learner.evaluation.env == SHORT
        assert learner.evaluate().lengths.max() == 5
        learner.step(PLAN)
        assert learner._history.test.lengths.tolist() == [5, 5, 5]
    with fnrl.Learner.resume(tmp_path, scheme(), evaluation=fnrl.Evaluate(every=STEPS)) as learner:
        assert learner.evaluation.env is None  # what is given counts


class Own(fnrl.envs.CartPole):
    """An environment that no file can name."""


def test_an_environment_that_can_not_be_saved_must_be_given_again(tmp_path):
    evaluation = fnrl.Evaluate(every=9 * STEPS, episodes=2, env=Own(num_envs=2))
    saved_at(tmp_path, PLAN, evaluation=evaluation)
    with pytest.raises(
        fnrl.CheckpointError, match=r"Own.*Learner\.resume\(\.\.\., evaluation=Evaluate\(env=\.\.\.\)\)"
    ):
        fnrl.Learner.resume(tmp_path, scheme())
    fnrl.Learner.resume(tmp_path, scheme(), evaluation=evaluation).close()


def test_environments_made_by_code_of_ones_own_are_not_rebuilt_from_text():
    plain = fnrl.envs.gym("CartPole-v1", num_envs=2, deadline=9.0)
    assert rebuild(json.loads(json.dumps(printed(plain))), "") == plain
    for env, made in (
        (fnrl.envs.gym(Count), r"hosted_cases\.Count"),
        (fnrl.envs.gym("CartPole-v1", wrappers=[limited]), "limited"),
    ):
        with pytest.raises(fnrl.CheckpointError, match=rf"is made by .*{made}, which is not fnrl's own: do so"):
            rebuild(json.loads(json.dumps(printed(env))), "do so")


def test_an_evaluation_needs_the_same_spaces_not_the_same_name(tmp_path):
    pytest.importorskip("gymnasium")
    hosted = fnrl.envs.gym("CartPole-v0", num_envs=2)
    assert hosted.spec.name != SHORT.spec.name
    with quiet(scheme(), STEPS, evaluation=fnrl.Evaluate(every=STEPS, episodes=2, env=hosted)) as learner:
        assert len(learner.evaluate().returns) == 2
    other = fnrl.envs.gym("MountainCar-v0")
    with pytest.raises(fnrl.CompositionError, match=r"the actor was made for .*MountainCar"):
        quiet(scheme(), STEPS, tmp_path / "never", evaluation=fnrl.Evaluate(env=other))
    assert not (tmp_path / "never").exists()


def test_recent_episodes_are_told_after_a_resume_inside_a_plan(tmp_path):
    with quiet(scheme(), 4 * STEPS) as whole:
        whole.step(PLAN)
        with quiet(scheme(), 4 * STEPS, tmp_path / "whole") as told:
            told.step(2 * PLAN)
    saved_at(tmp_path / "a", PLAN + 3)
    with fnrl.Learner.resume(tmp_path / "a", scheme()) as learner:
        learner.step(PLAN - 3)
    a, b = (read_lines(tmp_path / d)[1] for d in ("a", "whole"))
    assert a["performance/recent"] == b["performance/recent"]


# -- interrupts -----------------------------------------------------------------------------------------------------

LOOP = """
    import sys, time
    import fnrl
    from learner_cases import STEPS, quiet, scheme
    with quiet(scheme(), 10**9, sys.argv[1]) as learner:
        while not learner.done():
            learner.step()
            print(learner.state.version, flush=True)
            {pause}
"""


@pytest.mark.parametrize("pause", ["", "time.sleep(0 if learner.state.version < 5 else 60)"], ids=["steps", "between"])
def test_a_loop_of_ones_own_is_saved_on_sigterm(tmp_path, pause):
    code = textwrap.dedent(LOOP.format(pause=pause))
    here = Path(__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
    try:
        while int(process.stdout.readline()) < 5:
            pass
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 143
    last = int(rest.split()[-1]) if rest.split() else 5
    assert newest(tmp_path).state.scheme.version in (last, last + 1)
    assert read_lines(tmp_path)[-1]["event"] == "interrupted"


def test_a_handler_of_ones_own_is_left_alone(tmp_path):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("own"))
    try:
        with quiet(scheme(), STEPS, tmp_path) as learner:
            os.kill(os.getpid(), signal.SIGTERM)
            learner.train(progress=False)
        assert came == ["own"]
    finally:
        signal.signal(signal.SIGTERM, before)
