"""Every way in which a simulator breaks, and what is left behind: nothing but a state that can be saved."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch
from hosted_cases import (
    MODES,
    BadReset,
    Bare,
    Count,
    Elsewhere,
    Lost,
    Odd,
    Old,
    Stuck,
    UnpicklableError,
    Varied,
    Walk,
    children,
    key_of,
    run,
    seed,
)

import fnrl
from fnrl import tree
from fnrl.envs import gym
from fnrl.errors import EnvironmentFault, NonFiniteError, StaleStateError

# -- faults ---------------------------------------------------------------------------------------------------------


def key_with_parities(*wanted: int) -> torch.Tensor:
    """A key whose environments have odd (1) and even (0) seeds in their first episode."""
    return next(k for k in map(key_of, range(200)) if [seed(k, i, 1) % 2 for i in range(len(wanted))] == list(wanted))


KEY = key_with_parities(0, 1, 0)
SEED = seed(KEY, 1, 1)
WHERE = rf"Odd, environment 1, episode 1 \(seed {SEED}\), step 2: "


def break_it(error: type[BaseException], message: str, how: str, processes: bool, **kwargs) -> pytest.ExceptionInfo:
    """Runs into the fault; afterwards everything is closed, and the state before it can still be saved and restored."""
    env = gym(Odd, 3, processes=processes, how=how, **kwargs)
    state = env.init(KEY)
    state, _ = env.step(state, torch.full((3,), 3))
    assert len(children()) == (3 if processes else 0)
    with pytest.raises(error, match=message) as caught:
        env.step(state, torch.full((3,), 3))
    assert state.token.owner.closed
    assert children() == []
    with pytest.raises(StaleStateError, match="closed"):
        env.step(state, torch.full((3,), 3))
    assert tree.same_bits(gym(Odd, 3).restore(env.gather(state)).obs, state.obs)
    return caught


@MODES
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", EnvironmentFault, "it raised ValueError: boom"),
        ("unpicklable", EnvironmentFault, "it raised UnpicklableError: .*boom"),
        ("shape", EnvironmentFault, r"the observation is float32\[3\], its space declares float32\[4\]"),
        ("dtype", EnvironmentFault, r"the observation is float64\[4\], its space declares float32\[4\]"),
        ("list", EnvironmentFault, r"the observation is float64\[4\], its space declares float32\[4\]"),
        ("nan", NonFiniteError, "the observation is not finite"),
        ("inf", NonFiniteError, "the reward is not finite: inf"),
        ("none", EnvironmentFault, "the reward is NoneType None, expected a number"),
        ("two", EnvironmentFault, r"the reward is ndarray .*expected a number"),
    ],
)
def test_a_broken_step_is_named_and_closes_everything(how, error, message, processes):
    caught = break_it(error, WHERE + message, how, processes)
    if how == "raise":
        assert isinstance(caught.value.__cause__, ValueError)
    if how == "unpicklable":
        assert type(caught.value.__cause__) is (RuntimeError if processes else UnpicklableError)


def test_the_lane_is_named():
    env = gym(Odd, 3, how="raise")
    with pytest.raises(EnvironmentFault, match="Odd, lane 1, environment 1, episode 1"):
        run(env, env.init(torch.stack([key_with_parities(0, 0, 0), KEY])), torch.full((2, 2, 3), 3))


class SickAtReset(gymnasium.Env):
    """Episodes of three steps; where the seed says so, one that begins with a NaN."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, sick = 0, self.np_random.random() < 0.02
        return np.full(2, np.nan if sick else 1.0, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(2, np.float32), 1.0, False, self.t == 3, {}


@MODES
def test_a_lane_that_begins_with_a_nan_dies_alone(processes):
    env = gym(SickAtReset, 2, processes=processes)
    actor = fnrl.OnPolicyActorCritic(env.spec, fnrl.MLP((4,)), fnrl.MLP((4,)))
    parts = fnrl.Parts(env, actor, fnrl.PPO(epochs=1, minibatches=1), fnrl.GAE(steps=4))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    with pytest.warns(fnrl.DeadLaneWarning, match="reward is not finite: SickAtReset, lane"):
        state, _ = scheme.step(scheme.init(fnrl.seeds(4)), 12)
    alive = (~state.node.algo.dead).tolist()
    assert 0.0 < sum(alive) < 4.0
    assert bool(state.weights.params.vector.isfinite().all())
    scheme.close(state)


def test_a_return_of_an_evaluation_that_is_not_finite_is_told():
    env = gym(SickAtReset, 4)
    actor = fnrl.OnPolicyActorCritic(env.spec, fnrl.MLP((4,)), fnrl.MLP((4,)))
    parts = fnrl.Parts(env, actor, fnrl.PPO(), fnrl.GAE(steps=4))
    weights = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect))).init(fnrl.seeds(3)).weights
    with pytest.warns(RuntimeWarning, match=r"SickAtReset: in an evaluation of lane.* a return is not finite"):
        found = fnrl.evaluate(parts, weights, fnrl.seeds(3), 40)
    assert 0 < int(found.returns.isfinite().all(-1).sum()) < 3
    with pytest.raises(ValueError, match="the weights are of 3 lanes, the key of one seed"):
        fnrl.evaluate(parts, weights, fnrl.key(0))


def test_a_killed_process_is_a_fault():
    break_it(EnvironmentFault, WHERE + r"its process died \(exit code -9\)", "die", True)


def test_a_hung_process_is_a_fault():
    begin = time.monotonic()
    break_it(EnvironmentFault, WHERE + "its process gave no answer within 0.5 s", "hang", True, deadline=0.5)
    assert time.monotonic() - begin < 30  # it sleeps for 100 s and ignores SIGTERM


def test_an_idle_process_that_is_killed_is_a_fault():
    env = gym(Count, 3, processes=True)
    state = env.init(key_of(0))
    os.kill(state.token.owner.vector.vector.processes[2].pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"environment 2, .*its process died"):
        run(env, state, torch.full((2, 3), 3))
    assert children() == []


def test_a_process_that_hangs_before_its_first_step_is_a_fault():
    env = gym(Stuck, 2, processes=True, deadline=0.5)
    with pytest.raises(
        EnvironmentFault, match=r"environment 0, episode 0 .*reset: its process gave no answer within 0.5 s"
    ):
        env.init(key_of(0))
    assert children() == []


@MODES
def test_a_broken_reset_is_named(processes):
    env = gym(BadReset, 2, processes=processes, limit=2)  # the probe resets four times, this one a fifth
    state = env.init(key_of(0))
    with pytest.raises(
        EnvironmentFault, match=r"BadReset, environment 0, episode 4 \(seed \d+\), reset: it raised OSError"
    ) as e:
        run(env, state, torch.full((9, 2), 3))
    assert isinstance(e.value.__cause__, OSError)
    assert children() == []


def test_an_environment_that_opens_only_here_is_a_fault():
    env = gym(Elsewhere, 2, processes=True)
    with pytest.raises(
        EnvironmentFault, match=r"environment 0, episode 0 .*reset: it raised FileNotFoundError: no display"
    ):
        env.init(key_of(0))
    assert children() == []


def test_declarations_are_checked_when_probed():
    with pytest.raises(EnvironmentFault, match=r"Odd, probe, seed 0, reset: the observation is float64\[4\]"):
        gym(Odd, how="dtype", always=True)
    with pytest.raises(EnvironmentFault, match=r"Old, probe, seed 1, step 1: step returned 4 values, expected \(obs"):
        gym(Old)
    with pytest.raises(
        EnvironmentFault, match=r"Bare, probe, seed 0, reset: reset returned a ndarray, expected \(obs, info\)"
    ):
        gym(Bare)
    unprobed = gym(Old, exact=False)  # opened and reset, never stepped
    with pytest.raises(EnvironmentFault, match=r"environment 0, .*step 1: step returned 4 values"):
        unprobed.step(unprobed.init(key_of(0)), torch.tensor([3]))


def test_a_first_observation_must_be_finite():
    with pytest.raises(NonFiniteError, match=r"Lost, environment 0, episode 0 .*reset: the observation is not finite"):
        gym(Lost, 2).init(key_of(0))


def test_every_simulator_must_be_as_its_probe():
    with pytest.raises(EnvironmentFault, match=r"Varied, environment 0, episode 0 .*opened with .*its probe had "):
        gym(Varied).init(key_of(0))


def test_an_interrupted_step_leaves_a_state_to_save():
    break_it(KeyboardInterrupt, "^$", "interrupt", False)


def test_actions_must_be_finite():
    env = gym(Walk, 2)
    state = env.init(key_of(0))
    with pytest.raises(NonFiniteError, match=r"environment 1, .*the action is not finite"):
        env.step(state, torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
    env.step(state, torch.zeros(2, 2))


# -- lifetime -------------------------------------------------------------------------------------------------------


def test_a_state_is_stepped_once():
    env = gym(Walk, 2)
    old = env.init(key_of(0))
    new, _ = env.step(old, torch.zeros(2, 2))
    for method in (lambda s: env.step(s, torch.zeros(2, 2)), env.gather):
        with pytest.raises(StaleStateError, match="stale"):
            method(old)
    env.step(new, torch.zeros(2, 2))


@MODES
def test_closed_once_by_hand_or_by_the_garbage_collector(processes):
    env = gym(Walk, 2, processes=processes)
    Walk.closed = 0
    state = env.init(key_of(0))
    env.close(state)
    env.close(state)
    assert (Walk.closed, children()) == (0 if processes else 2, [])
    state, _ = run(env, env.init(key_of(0)), torch.zeros(3, 2, 2))
    del state, _
    gc.collect()
    assert (Walk.closed, children()) == (0 if processes else 4, [])


def test_a_forked_child_does_not_close_what_it_inherits():
    env = gym(Walk, 2, processes=True)
    state = env.init(key_of(0))
    child = multiprocessing.get_context("fork").Process(target=state.token.owner.close)
    child.start()
    child.join()
    assert child.exitcode == 0
    _, state = run(env, state, torch.zeros(3, 2, 2))
    env.close(state)


def test_closed_when_the_interpreter_ends(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import gymnasium, numpy, os\n"
        "class Loud(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(0, 1, (2,))\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        return numpy.zeros(2, numpy.float32), {}\n"
        "    def step(self, action):\n"
        "        return numpy.zeros(2, numpy.float32), 0.0, False, False, {}\n"
        "    def close(self):\n"
        "        os.write(1, b'closed\\n')\n"
    )
    program = (
        "import loud; from fnrl import random; from fnrl.envs import gym\n"
        "inside, outside = gym(loud.Loud, 2), gym(loud.Loud, 2, processes=True)\n"
        "states = [e.init(random.key(0)) for e in (inside, outside)]\n"
        "print(*[p.pid for p in states[1].token.owner.vector.vector.processes], flush=True)\n"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    paths = os.pathsep.join([str(tmp_path), root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")
    assert lines.count("closed") == 2 + 2 + 2  # two probes, two here, two in processes
    pids = next(line for line in lines if line and line[0].isdigit()).split()
    assert len(pids) == 2
    assert not [p for p in pids if os.path.exists(f"/proc/{p}")]
