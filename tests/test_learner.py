"""The learner on pure CartPole, small: exact resume with everything on, refusals, faults, logs; the saved policy."""

import dataclasses
import json
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from learner_cases import ENV, PLAN, SIMPLE, STEPS, bits, light, parts, quiet, scheme, tensorboard  # noqa: F401

import fnrl
from fnrl import tree
from fnrl.checkpoint import CheckpointWarning, newest
from fnrl.collect import act
from fnrl.component import printed
from fnrl.config import ACTIVATIONS, rebuild
from fnrl.logs import LogWarning, read_lines
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.topology import centralised, collect, gradients, synchronous


def windows(learner):
    h = learner._history
    return list(h.returns), list(h.lengths), h.episodes, h.evaluated, learner.get_metrics()["algo/loss"]


def test_the_shell_learns_what_the_bare_loop_learns():
    s = scheme()
    state = s.init(fnrl.key(3))
    for _ in range(2 * PLAN):
        state, _ = s.step(state)
    with quiet(s, 2 * STEPS, seed=3) as learner:
        learner.train(progress=False)
        assert learner.done()
        assert learner.state.version == 2 * PLAN  # the last rollout is learnt from in full
        assert tree.different_bits(bits(learner), s.gather(state)) == []


@pytest.mark.parametrize("at", [5, 8, 19])
def test_resume_is_exact_with_evaluation_on(tmp_path, at):
    evaluation = fnrl.Evaluate(every=STEPS, episodes=2)
    with quiet(scheme(), 4 * STEPS, evaluation=evaluation) as whole:
        whole.step(at)
        whole.step(4 * PLAN - at)
        with quiet(scheme(), 4 * STEPS) as bare:
            bare.step(4 * PLAN)
            assert tree.different_bits(bits(whole), bits(bare)) == []  # evaluation disturbs nothing
        with quiet(scheme(), 4 * STEPS, tmp_path, evaluation=evaluation) as first:
            first.step(at)
            first.save()
        with fnrl.Learner.resume(tmp_path, scheme()) as second:
            assert second.state.version == at
            assert windows(second) == windows(first)
            second.step(4 * PLAN - at)
            assert second.done()
            assert tree.different_bits(bits(second), bits(whole)) == []
            assert windows(second) == windows(whole)
            assert torch.equal(second._history.test.returns, whole._history.test.returns)
    told = [x["updates"] for x in read_lines(tmp_path) if "event" not in x]
    assert told == [PLAN, 2 * PLAN, 3 * PLAN, 4 * PLAN]


def test_lines_after_the_checkpoint_come_once(tmp_path):
    with quiet(scheme(), 4 * STEPS, tmp_path) as learner:
        learner.step(PLAN)
        learner.save()
        learner.step(2 * PLAN)
        before = read_lines(tmp_path)
    with fnrl.Learner.resume(tmp_path, scheme()) as learner:
        assert read_lines(tmp_path) == before[:1]
        learner.step(2 * PLAN)
    after = read_lines(tmp_path)
    assert [x["updates"] for x in after] == [PLAN, 2 * PLAN, 3 * PLAN]
    same = [n for n in before[0] if n.startswith(("algo/", "performance/")) or n in ("env_steps", "episodes")]
    assert [[x[n] for n in same] for x in after] == [[x[n] for n in same] for x in before]


def test_metrics_are_the_means_they_say(tmp_path):
    with quiet(scheme(), 9 * STEPS, tmp_path, evaluation=fnrl.Evaluate(every=2 * STEPS, episodes=3)) as learner:
        s, infos, returns, lengths = learner.scheme, [], [], []
        state = s.init(fnrl.key(0))
        for _ in range(9 * PLAN):
            state, info = s.step(state)
            infos.append(info)
            for e in info.episodes:
                returns += e.returns[e.end].tolist()
                lengths += e.lengths[e.end].tolist()
        metrics = learner.train(progress=False)
        assert len(returns) > 30
        assert metrics["performance/train"] == pytest.approx(np.mean(returns[-100:]))
        assert metrics["performance/length"] == pytest.approx(np.mean(lengths[-100:]))
        assert (metrics["episodes"], metrics["env_steps"], metrics["updates"]) == (len(returns), 9 * STEPS, 9 * PLAN)
        for name in ("loss", "entropy", "grad_norm"):
            expected = np.mean([float(i.metrics[name]) for i in infos[-PLAN:]])
            assert metrics[f"algo/{name}"] == pytest.approx(expected, rel=1e-5)
        assert metrics["scheme/metrics/fps"] > 0
        assert metrics["time/collect"] > 0
    lines = read_lines(tmp_path)
    tests = [x for x in lines if x.get("event") == "evaluation"]
    assert [x["env_steps"] // STEPS for x in tests] == [2, 4, 6, 8, 9]
    assert tests[-1]["performance/test"] == metrics["performance/test"]
    assert all(x["performance/test_episodes"] == 3 for x in tests)
    assert lines[-1]["event"] == "finished"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scheme"]["parts"]["algo"]["minibatches"] == 2
    assert config["learner"]["target_steps"] == 9 * STEPS
    assert {"torch", "numpy", "python"} <= set(config["versions"])
    assert len(config["commands"]) == 1


def test_evaluation_depends_on_the_version_alone():
    with quiet(scheme(), 10 * STEPS) as learner:
        learner.step()
        once, again = learner.evaluate(4), learner.evaluate(4)
        assert torch.equal(once.returns, again.returns)
        assert len(once.returns) == 4


def test_checkpoints_come_every_so_often_and_few_stay(tmp_path):
    with quiet(scheme(), 6 * STEPS, tmp_path, save_every=2 * STEPS, keep=2) as learner:
        learner.train(progress=False)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{4 * STEPS:012d}", f"step-{6 * STEPS:012d}"]
    before = (tmp_path / f"step-{6 * STEPS:012d}").stat().st_ino
    with fnrl.Learner.resume(tmp_path, scheme()) as learner:
        assert learner.done()
        learner.train(progress=False)  # nothing left to do, nothing written twice
    assert (tmp_path / f"step-{6 * STEPS:012d}").stat().st_ino == before


def test_a_directory_is_one_runs(tmp_path):
    with quiet(scheme(), STEPS, tmp_path) as learner:
        with pytest.raises(fnrl.CheckpointError, match="in use by process"):
            quiet(scheme(), STEPS, tmp_path)
        learner.train(progress=False)
        with pytest.raises(fnrl.CheckpointError, match="in use by process"):
            fnrl.Learner.resume(tmp_path, scheme())
    kept = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(fnrl.CheckpointError, match=r"already holds a run.*resume"):
        quiet(scheme(), STEPS, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    fnrl.Learner.resume(tmp_path, scheme()).close()  # the refusals gave the directory back
    with pytest.raises(fnrl.CheckpointError, match="not a run directory"):
        fnrl.Learner.resume(tmp_path / "elsewhere", scheme())
    assert not (tmp_path / "elsewhere").exists()


def test_resume_shows_what_differs_and_refuses_what_does_not_fit(tmp_path):
    with quiet(scheme(), STEPS, tmp_path) as learner:
        learner.train(progress=False)
    with pytest.warns(CheckpointWarning, match=r"parts\.algo\.lr: 0\.0003 -> 0\.001"):
        fnrl.Learner.resume(tmp_path, scheme(lr=1e-3)).close()
    with pytest.raises(fnrl.CheckpointError, match="recurrent"):
        fnrl.Learner.resume(tmp_path, scheme(recurrent=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fnrl.Learner.resume(tmp_path, scheme(), 3 * STEPS) as learner:
            assert not learner.done()
            learner.train(progress=False)
            assert learner.state.env_steps == 3 * STEPS
        with fnrl.Learner.resume(tmp_path, scheme()) as learner:
            assert learner.settings.target_steps == 3 * STEPS


def test_a_parameter_that_was_set_stays_set(tmp_path):
    falling = fnrl.Linear(1e-3, 0.0, steps=4 * STEPS)
    with quiet(scheme(lr=falling), 4 * STEPS, tmp_path) as learner:
        learner.step(PLAN)
        learner.update_algo_parameter("lr", 5e-4)
        with pytest.raises(ValueError, match="did you mean 'clip'"):
            learner.update_algo_parameter("clipp", 0.1)
        learner.save()
    with fnrl.Learner.resume(tmp_path, scheme(lr=falling)) as learner:
        learner.step(2 * PLAN)
        assert learner.get_metrics()["hyper/lr"] == pytest.approx(5e-4)
    assert {"event": "set", "hyper/lr": 5e-4}.items() <= read_lines(tmp_path)[1].items()


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize("name", ["target_steps", "save_every", "keep"])
def test_numbers_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        fnrl.Learner(scheme(), **{"target_steps": STEPS, name: value})


# -- interrupts and faults ------------------------------------------------------------------------------------------


class Interrupting(fnrl.PPO):
    """Sends a signal from inside its loss, at the given clip."""

    number = signal.SIGINT

    def loss(self, actor, params, weights, batch, noise):
        if float(weights.hyper["clip"]) == pytest.approx(0.3):
            os.kill(os.getpid(), self.number)
        return super().loss(actor, params, weights, batch, noise)


class Terminating(Interrupting):
    """The same with SIGTERM."""

    number = signal.SIGTERM


@pytest.mark.parametrize(("algo", "raised"), [(Interrupting, KeyboardInterrupt), (Terminating, SystemExit)])
def test_an_interrupt_finishes_the_update_and_saves(tmp_path, algo, raised):
    clip = fnrl.Linear(0.1, 0.3, steps=2 * STEPS)  # 0.3 at the beginning of the third plan
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    learner = quiet(scheme(algo=algo, clip=clip), 9 * STEPS, tmp_path)
    with pytest.raises(raised):
        learner.train(progress=False)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert newest(tmp_path).state.scheme.version == 2 * PLAN + 1
    assert read_lines(tmp_path)[-1]["event"] == "interrupted"
    with pytest.raises(RuntimeError, match="closed"):
        learner.step()
    free = scheme(clip=clip)
    state = free.init(fnrl.key(0))
    for _ in range(3 * PLAN):
        state, _ = free.step(state)
    with pytest.warns(CheckpointWarning, match="Interrupting|Terminating"):
        on = fnrl.Learner.resume(tmp_path, free)
    on.step(PLAN - 1)
    assert tree.different_bits(bits(on), free.gather(state)) == []
    on.close()


def test_an_interrupt_in_a_loop_of_ones_own_saves_too(tmp_path):
    clip = fnrl.Linear(0.1, 0.3, steps=STEPS)

    def loop():
        with quiet(scheme(algo=Interrupting, clip=clip), 9 * STEPS, tmp_path) as learner:
            while not learner.done():
                learner.step()

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert newest(tmp_path).state.scheme.version == PLAN + 1


def test_steps_outside_the_main_thread_touch_no_signals():
    with quiet(scheme(), STEPS) as learner:
        thread = threading.Thread(target=learner.train, args=(False,))
        thread.start()
        thread.join()
        assert learner.done()


class Exploding(fnrl.PPO):
    """Its loss is infinite once clip has been set to 0.3."""

    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss / (weights.hyper["clip"] != 0.3).float(), aux


def test_a_fault_leaves_the_last_checkpoint_and_is_told(tmp_path):
    s = scheme(algo=Exploding)
    learner = quiet(s, 9 * STEPS, tmp_path, save_every=STEPS)
    learner.step(PLAN)
    learner.update_algo_parameter("clip", 0.3)
    with pytest.raises(fnrl.NonFiniteError):
        learner.train(progress=False)
    assert newest(tmp_path).state.scheme.version == PLAN
    last = read_lines(tmp_path)[-1]
    assert (last["event"], last["error"], last["updates"]) == ("fault", "NonFiniteError", PLAN)
    assert "loss" in last["message"]
    with fnrl.Learner.resume(tmp_path, s) as learner:  # the directory was given back
        assert learner.state.version == PLAN
        learner.step()


class Faulty(fnrl.envs.CartPole):
    """An evaluation environment that raises."""

    def step(self, state, action, noise):
        raise fnrl.EnvironmentFault("the pole broke")


def test_a_fault_in_evaluation_loses_no_training(tmp_path):
    broken = fnrl.Evaluate(every=2 * STEPS, episodes=2, env=Faulty(num_envs=2, time_limit=20))
    with (
        quiet(scheme(), 9 * STEPS, tmp_path, evaluation=broken) as learner,
        pytest.raises(fnrl.EnvironmentFault, match="the pole broke"),
    ):
        learner.train(progress=False)
    assert newest(tmp_path).state.scheme.version == 2 * PLAN
    assert read_lines(tmp_path)[-1]["error"] == "EnvironmentFault"


def test_logs_that_can_not_be_written_stop_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # neither removed nor opened
    with pytest.warns(LogWarning, match=r"metrics\.jsonl can't be written") as warned:
        learner = quiet(scheme(), 2 * STEPS, tmp_path)
    learner.train(progress=False)
    learner.close()
    assert len([w for w in warned if issubclass(w.category, LogWarning)]) == 1
    assert newest(tmp_path).state.scheme.env_steps == 2 * STEPS


def test_a_full_disk_is_told_once(tmp_path):
    with quiet(scheme(), 3 * STEPS, tmp_path) as learner:
        learner._home._logs.sinks["metrics.jsonl"].file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.warns(LogWarning, match="No space left") as warned:
            learner.train(progress=False)
    assert len([w for w in warned if issubclass(w.category, LogWarning)]) == 1


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_and_the_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(scheme(), 3 * STEPS, tmp_path, evaluation=fnrl.Evaluate(every=STEPS, episodes=2)) as learner:
        learner.train(progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [x for x in read_lines(tmp_path) if "algo/loss" in x]
    assert [(e.step, e.value) for e in events.Scalars("algo/loss")] == [
        (x["env_steps"], pytest.approx(x["algo/loss"])) for x in lines
    ]
    assert [e.step for e in events.Scalars("performance/test")] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_progress_say_where_the_run_stands(capsys):
    with quiet(scheme(), 2 * STEPS) as learner:
        learner.train()
        learner.print_info()
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith(f"{2 * STEPS}/{2 * STEPS} steps  100%")
    assert "left" in out[-2]
    assert "return" in out[-1]


# -- the policy alone -----------------------------------------------------------------------------------------------


def trained(path, **kwargs):
    learner = quiet(scheme(**kwargs), 2 * STEPS, path)
    learner.train(progress=False)
    learner.close()
    return learner


def test_a_policy_is_the_actors_most_likely_action(tmp_path):
    learner = trained(tmp_path, lr=3e-2)
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    w = learner.state.weights
    expected = act(learner.scheme.parts.actor, w.params, w.normaliser, torch.from_numpy(obs), torch.zeros(64, 0), None)[
        1
    ]
    assert 0 < expected.sum() < 64
    for path in (tmp_path, next(tmp_path.glob("step-*")), tmp_path / "policy.safetensors"):
        policy = fnrl.load_policy(path)
        assert np.array_equal(policy(obs), expected.numpy())
        assert [int(policy(o)) for o in obs[:8]] == expected[:8].tolist()
        assert policy(obs[0].astype(np.float64)).shape == ()
    with pytest.raises(ValueError, match=r"is \[4\], a batch \['N', 4\]; got \[3\]"):
        policy(obs[0, :3])
    with pytest.raises(fnrl.NonFiniteError):
        policy(np.full(4, np.nan))


def test_a_policy_with_memory_is_a_function_of_it(tmp_path):
    learner = trained(tmp_path, recurrent=True)
    policy = fnrl.load_policy(tmp_path)
    w, actor = learner.state.weights, learner.scheme.parts.actor
    memory, theirs = policy.initial(), actor.memory(1)
    for obs in np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32):
        action, memory = policy(obs, memory)
        _, expected, _, theirs = act(actor, w.params, w.normaliser, torch.from_numpy(obs)[None], theirs, None)
        assert int(action) == int(expected)
        assert np.array_equal(memory, theirs[0].numpy())
    actions, memories = policy(np.zeros((3, 4)), policy.initial(3))
    assert (actions.shape, memories.shape) == ((3,), (3, 4))
    with pytest.raises(ValueError, match=r"policy\.initial\(\)"):
        policy(np.zeros(4))
    with pytest.raises(ValueError, match=r"expected a memory \[4\], got \[3\]"):
        policy(np.zeros(4), np.zeros(3))


def test_box_actions_come_clipped_and_scaled(tmp_path):
    spec = fnrl.spaces.EnvSpec("Reacher", fnrl.spaces.Box((3,)), fnrl.spaces.Box((2,), (-2.0, 0.0), (2.0, 1.0)))
    actor = fnrl.OnPolicyActorCritic(spec, policy=fnrl.MLP((4,)), value=fnrl.MLP((4,)))
    params = actor.init(fnrl.key(0))
    params = dataclasses.replace(params, vector=params.vector * 500)
    policy = fnrl.load_policy(fnrl.Policy(actor, params).save(tmp_path / "p.safetensors"))
    actions = policy(np.random.default_rng(0).normal(size=(200, 3)))
    assert actions.dtype == np.float32
    assert (actions.min(0) == [-2.0, 0.0]).all()
    assert (actions.max(0) == [2.0, 1.0]).all()


class Net(torch.nn.Module):
    """A network of the user's own."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 8)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def test_a_network_of_ones_own_is_passed_not_imported(tmp_path):
    actor = fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.module(Net), value=fnrl.MLP((4,)))
    path = fnrl.Policy(actor, actor.init(fnrl.key(0))).save(tmp_path / "p.safetensors")
    with pytest.raises(fnrl.CheckpointError, match=r"policy is 'test_learner\.Net'.*load_policy\(path, actor="):
        fnrl.load_policy(path)
    assert int(fnrl.load_policy(path, actor=actor)(np.zeros(4))) in (0, 1)
    other = dataclasses.replace(actor, value=fnrl.MLP((5,)))
    with pytest.raises(fnrl.CheckpointError, match=r"value\.0\.weight: the actor has \(5, 4\), the file \(4, 4\)"):
        fnrl.load_policy(path, actor=other)


def test_an_activation_of_ones_own_is_not_guessed(tmp_path):
    actor = fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.MLP((4,), activation=tanh), value=fnrl.MLP((4,)))
    path = fnrl.Policy(actor, actor.init(fnrl.key(0))).save(tmp_path / "p.safetensors")
    with pytest.raises(fnrl.CheckpointError, match=r"policy\.activation is 'test_learner\.tanh'"):
        fnrl.load_policy(path)


def tanh(x):
    return 2 * torch.tanh(x)


@pytest.mark.parametrize("name", ["policy.0.weight", "normaliser.mean", "sha256"])
def test_a_changed_bit_is_found(tmp_path, name):
    trained(tmp_path)
    path = tmp_path / "policy.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    at = 8 + size + header[name]["data_offsets"][0] if name in header else data.index(b"clip")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(fnrl.CheckpointError, match="damaged"):
        fnrl.load_policy(path)


def test_what_is_no_policy_is_refused(tmp_path):
    with pytest.raises(fnrl.CheckpointError, match="does not exist"):
        fnrl.load_policy(tmp_path / "nothing")
    with pytest.raises(fnrl.CheckpointError, match="no good checkpoint"):
        fnrl.load_policy(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(fnrl.CheckpointError, match="can't be read"):
        fnrl.load_policy(tmp_path / "x.safetensors")


def test_every_configuration_of_fnrls_own_is_rebuilt():
    topology = centralised(synchronous(gradients(synchronous(collect, 2)), 2))
    for activation in ACTIVATIONS.values():
        actor = fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.MLP((4,), activation), recurrent=fnrl.GRU(3))
        algo = fnrl.PPO(lr=fnrl.Linear(1e-3, 0.0, steps=7), minibatches=2, optimiser=fnrl.RMSProp(), max_grad_norm=None)
        made = fnrl.Parts(ENV, actor, algo, fnrl.Returns(steps=32), scale_reward=fnrl.ScaleReward(clip=3.0))
        value = fnrl.Scheme(made, topology)
        assert rebuild(json.loads(json.dumps(printed(value))), "") == value


def test_a_policy_counts_discrete_observations_from_their_start():
    spec = EnvSpec("counted", Discrete(4, start=10), Discrete(3))
    actor = fnrl.OnPolicyActorCritic(spec, fnrl.MLP((5,)), fnrl.MLP((5,)))
    params = actor.init(fnrl.key(3))
    params = dataclasses.replace(params, vector=params.vector + fnrl.random.normal(fnrl.key(4), params.vector.shape))
    policy = fnrl.Policy(actor, params)
    expected = actor.act(params, torch.arange(4), actor.memory(4), None)[0]
    assert policy(np.arange(10, 14)).tolist() == expected.tolist()
    assert int(policy(12)) == int(expected[2])
    for bad in (9, 14, 0, 11.5):
        with pytest.raises(ValueError, match="one of the integers 10 to 13"):
            policy(bad)


def test_a_policy_that_explored_with_a_memory_acts_without_one():
    spec = EnvSpec("box", Box((3,)), Box((1,), -2.0, 2.0))
    explore = fnrl.OrnsteinUhlenbeck()
    actor = fnrl.OffPolicyActorCritic(spec, fnrl.MLP((5,)), fnrl.MLP((5,)), stochastic=False, explore=explore)
    policy = fnrl.Policy(actor, actor.init(fnrl.key(0)))
    assert policy(np.zeros(3, np.float32)).shape == (1,)


def test_a_policy_leaves_the_temperature_behind(tmp_path):
    env = fnrl.envs.CartPole(num_envs=2)
    actor = fnrl.OffPolicyActorCritic(env.spec, fnrl.MLP((5,)), fnrl.MLP((5,)))
    made = fnrl.Parts(env, actor, fnrl.SAC(batch=4), fnrl.Replay(capacity=100, warmup=4))
    with fnrl.Learner(fnrl.Scheme(made, centralised(gradients(collect))), 12, tmp_path) as learner:
        learner.train(progress=False)
    obs = np.zeros(4, np.float32)
    actions = [fnrl.load_policy(p)(obs) for p in (tmp_path, tmp_path / "policy.safetensors")]
    assert actions[0] == actions[1]
