"""The command line: options reach the parts, presets, errors and exit codes, train, interrupt, resume, evaluate."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
import torch

import fnrl
from fnrl import checkpoint, logs, tree
from fnrl.cli import architecture, main
from fnrl.cli.options import build
from fnrl.cli.words import read_train
from fnrl.presets import PRESETS
from fnrl.spaces import Box, Discrete, EnvSpec, Goal

SMALL = "--num-envs 2 --storage.steps 16 --algo.epochs 1 --algo.minibatches 2 --actor.policy.hidden 8"


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """Neither TensorBoard nor a picture: the learner's own test has them."""

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(logs, "TensorBoard", missing)
    monkeypatch.setattr(fnrl.plots, "curve", lambda directory: None)


def made(line):
    said, values = read_train(line.split())
    return build(said.env, values)


def run(line):
    return main(line.split())


# -- options --------------------------------------------------------------------------------------------------------


def test_options_reach_every_part():
    parts = made(
        "--env CartPole --preset none --num-envs 3 --env.time_limit 77 --algo.lr 1e-3:1e-4 --steps 5e3"
        " --algo.clip 0.3:0.1:200 --algo.target_kl 0.02 --algo.clip_value --no-algo.normalise_advantage"
        " --algo.optimiser SGD --algo.optimiser.momentum .5"
        " --storage.steps 12 --storage.gae-lambda 0.8 --actor.policy.hidden 5 6 --actor.policy.activation relu"
        " --actor.value.hidden --actor.torso MLP --actor.torso.hidden 9 --actor.recurrent --actor.recurrent.size 7"
        " --actor.log-std -1e-1 --normalise-obs --normalise_obs.clip 4 --no-scale-reward"
    )
    env = fnrl.envs.CartPole(num_envs=3, time_limit=77)
    actor = fnrl.OnPolicyActorCritic(
        env.spec,
        policy=fnrl.MLP((5, 6), torch.relu),
        value=fnrl.MLP(()),
        torso=fnrl.MLP((9,)),
        recurrent=fnrl.GRU(7),
        log_std=-0.1,
    )
    algo = fnrl.PPO(
        lr=fnrl.Linear(1e-3, 1e-4, steps=5000),
        clip=fnrl.Linear(0.3, 0.1, steps=200),
        target_kl=0.02,
        clip_value=True,
        normalise_advantage=False,
        optimiser=fnrl.SGD(momentum=0.5),
    )
    storage = fnrl.GAE(steps=12, gae_lambda=0.8)
    assert parts == fnrl.Parts(env, actor, algo, storage, normalise_obs=fnrl.NormaliseObs(clip=4.0))


def test_another_algorithm_has_its_own_defaults_and_options():
    parts = made("--env CartPole --algo A2C --storage Returns --storage.steps 8 --algo.max_grad_norm none")
    assert parts.algo == fnrl.A2C(max_grad_norm=None)  # PPO's preset does not leak into it
    assert parts.storage == fnrl.Returns(steps=8)
    assert made("--env CartPole --preset none --algo=A2C --algo.optimiser=Adam").algo == fnrl.A2C(optimiser=fnrl.Adam())


def test_every_field_of_the_parts_is_an_option():
    said, values = read_train(["--env", "CartPole", "--preset", "none", "--actor.recurrent", "--scale-reward"])
    fields = {
        "algo": fnrl.PPO,
        "storage": fnrl.GAE,
        "algo.optimiser": fnrl.Adam,
        "actor.recurrent": fnrl.GRU,
        "actor.policy": fnrl.MLP,
        "scale_reward": fnrl.ScaleReward,
    }
    names = {f"{prefix}.{n}" for prefix, cls in fields.items() for n in (f.name for f in dataclasses.fields(cls))}
    assert names <= set(values)
    assert all(values[n] is not None for n in names if n != "algo.target_kl")
    env = fnrl.envs.CartPole()
    assert build(said.env, values) == fnrl.Parts(
        env,
        fnrl.OnPolicyActorCritic(env.spec, recurrent=fnrl.GRU()),
        fnrl.PPO(),
        fnrl.GAE(),
        scale_reward=fnrl.ScaleReward(),
    )


@pytest.mark.parametrize(
    ("words", "algo", "actor"),
    [
        ("SAC", fnrl.SAC(), {}),
        ("SAC --algo.temperature 0.2:0.1:100", fnrl.SAC(temperature=fnrl.Linear(0.2, 0.1, steps=100)), {}),
        (
            "TD3 --actor.explore.noise_std 0.3",
            fnrl.TD3(),
            {"stochastic": False, "explore": fnrl.Gaussian(noise_std=0.3)},
        ),
        ("DDPG", fnrl.DDPG(), {"stochastic": False, "explore": fnrl.Gaussian(), "critics": 1}),
        (
            "DDPG --actor.explore OrnsteinUhlenbeck",
            fnrl.DDPG(),
            {"stochastic": False, "explore": fnrl.OrnsteinUhlenbeck(), "critics": 1},
        ),
    ],
)
def test_off_policy_algorithms_bring_their_parts(words, algo, actor, monkeypatch):
    spec = EnvSpec("Untuned-v0", Box((3,)), Box((1,), -2.0, 2.0))
    monkeypatch.setattr("fnrl.envs.hosted.probe", lambda *_, **__: spec)
    parts = made(f"--env Untuned-v0 --algo {words} --storage.capacity 5e4 --storage.prioritised --storage.n_step 3")
    replay = fnrl.Replay(capacity=50_000, prioritised=fnrl.Prioritised(), n_step=3)
    assert parts == fnrl.Parts(parts.env, fnrl.OffPolicyActorCritic(spec, **actor), algo, replay)


def test_a_preset_is_of_an_environment_and_an_algorithm():
    parts = made("--env Pendulum-v1 --algo TD3 --algo.delay 3")
    net = fnrl.MLP((64, 64), torch.relu)
    actor = fnrl.OffPolicyActorCritic(parts.env.spec, net, net, stochastic=False, explore=fnrl.Gaussian())
    algo = fnrl.TD3(lr=1e-3, gamma=0.98, batch=128, delay=3)
    assert parts == fnrl.Parts(parts.env, actor, algo, fnrl.Replay(capacity=200_000))


def test_dqn_on_the_command_line():
    parts = made("--env CartPole --algo DQN --actor.explore.epsilon 1:0.1:500 --algo.target_every 50 --actor.duelling")
    explore = fnrl.EpsilonGreedy(epsilon=fnrl.Linear(1.0, 0.1, steps=500))
    actor = fnrl.OffPolicyActorCritic(parts.env.spec, policy=None, critics=1, explore=explore, duelling=True)
    assert parts == fnrl.Parts(parts.env, actor, fnrl.DQN(target_every=50), fnrl.Replay())


def test_hindsight_on_the_command_line():
    parts = made("--env BitFlipping --env.n 7 --storage.hindsight.strategy FinalGoals --storage.hindsight.goals 2")
    env = fnrl.envs.BitFlipping(7, num_envs=64)
    hidden, explore = fnrl.MLP((256,), torch.relu), fnrl.EpsilonGreedy(epsilon=0.2)
    actor = fnrl.OffPolicyActorCritic(env.spec, None, hidden, critics=1, explore=explore)
    algo = fnrl.DQN(lr=1e-3, gamma=0.95, ratio=1 / 32, batch=128, target_every=50)
    hindsight = fnrl.Hindsight(goals=2.0, strategy=fnrl.FinalGoals())
    assert parts == fnrl.Parts(env, actor, algo, fnrl.Replay(steps=4, hindsight=hindsight))
    assert made("--env BitFlipping --no-storage.hindsight").storage == fnrl.Replay(steps=4)


def test_what_cells_reserve_and_where_they_run():
    words = "train --env CartPole --ray --ray-collect cpus=0.5 seat=1 placement=SPREAD --ray-gradients gpus=0.25"
    said, _ = read_train([*words.split()[1:], "--ray-address", "10.0.0.1:6379", "--ray-deadline", "60"])
    assert architecture.executor(said) == fnrl.Ray(
        address="10.0.0.1:6379",
        collect=fnrl.Resources(cpus=0.5, custom={"seat": 1}, placement="SPREAD"),
        gradients=fnrl.Resources(gpus=0.25),
        deadline=60.0,
    )
    assert architecture.executor(read_train(["--env", "CartPole"])[0]) == fnrl.Inline()


def test_presets_are_defaults_that_options_override(monkeypatch):
    spec = EnvSpec("HalfCheetahBulletEnv-v0", Box((26,)), Box((6,), -1.0, 1.0))
    monkeypatch.setattr("fnrl.envs.hosted.probe", lambda *_, **__: spec)
    parts = made("--env HalfCheetahBulletEnv-v0 --algo.epochs 3 --no-scale-reward")
    assert (parts.env.num_envs, parts.storage.steps, parts.actor.log_std) == (8, 256, -1.0)
    assert (parts.algo.epochs, parts.algo.minibatches, parts.algo.lr) == (3, 16, 3e-4)
    assert parts.normalise_obs == fnrl.NormaliseObs()
    assert parts.scale_reward is None
    bare = made("--env HalfCheetahBulletEnv-v0 --preset none --env.kwargs render=false size=3 name=x")
    assert (bare.env.num_envs, bare.algo, bare.normalise_obs) == (1, fnrl.PPO(), None)
    assert dict(bare.env.kwargs) == {"render": False, "size": 3, "name": "x"}
    assert made("--env CartPole --steps 1000").algo.lr == fnrl.Linear(1e-3, 0.0, steps=1000)


@pytest.mark.parametrize("env", PRESETS)
def test_presets_name_options_there_are_and_compose(env, monkeypatch):
    spaces = (Box((4,)), Discrete(2)) if env.startswith("CartPole") else (Box((26,)), Box((6,), -1.0, 1.0))
    goal = Goal(20, 3) if env.startswith("Panda") else None
    monkeypatch.setattr("fnrl.envs.hosted.probe", lambda *_, **__: EnvSpec(env, *spaces, goal))
    monkeypatch.setattr(fnrl.envs.GymVector, "judge", lambda self, a, d: (a.new_zeros(a.shape[:-1]), ()))
    _, values = read_train(["--env", env])
    assert set(next(iter(PRESETS[env].values()))) <= set(values)
    parts = made(f"--env {env}")
    fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--env CartPole --algo.lrr 3", "no option --algo.lrr; did you mean '--algo.lr'?"),
        ("--env CartPole --lr 3", "no option --lr; did you mean --algo.lr?"),
        ("--env CartPole --learning-rate 3", "did you mean --algo.lr?"),
        ("--env Pendulum-v1 --batch-size 3", "did you mean --algo.batch?"),
        ("--env CartPole --num-env 3", "did you mean '--num-envs'?"),
        ("--env CartPole --algo A2C --algo.epochs 3", "no option --algo.epochs"),
        ("--env CartPole --algo PP0", "algo = 'PP0': expected one of PPO, A2C"),
        ("--env CartPole --actor.policy.activation tan", "invalid choice: 'tan'"),
        ("--env CartPole --steps 0", "expected a whole number of at least 1"),
        ("--steps 100", "--env"),
        ("--env CartPole 7", "not understood: 7"),
    ],
)
def test_a_wrong_command_line_is_told_with_what_would_fit(line, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(f"train {line}")
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train --env CartPole --algo.gamma 1.5", "PPO.gamma = 1.5 is out of range: expected a value in [0, 1]"),
        ("train --env CartPole --algo.minibatches 7", "does not divide"),
        ("train --env CartPole --workers 2 --ray-collect cpus=0.5", "--ray-collect says how workers run in Ray cells"),
        ("train --env CartPole --workers 2 --ray --ray-collect cpu=no", "--ray-collect: Resources: cpu = 'no'"),
        ("train --env CartPol-v1", "did you mean CartPole-v1"),
        (
            "train --env CartPole --algo DDPG",
            "DDPG needs Box actions, CartPole-v1 takes Discrete(n=2, start=0): use DQN",
        ),
        ("train --env CartPole --algo TD3", "TD3 needs Box actions, CartPole-v1 takes Discrete(n=2, start=0): use DQN"),
        ("train --env Pendulum-v1 --algo DQN", "DQN needs Discrete actions, Pendulum-v1 takes Box"),
        ("train --env CartPole --seed -1", "seed=-1"),
        ("train --env CartPole --scheme ape_x", "--scheme ape_x keeps a replay: add --algo DQN"),
        ("train --env no_module:X", "the module 'no_module' can't be imported"),
        ("train --env hosted_cases:X", "hosted_cases registers no environment 'X', and has no class"),
        ("train --env CartPole --device tpu", "device='tpu' can't be used"),
        ("resume nowhere", "nowhere is not a run directory"),
        ("evaluate nowhere", "nowhere is not a run directory"),
        ("evaluate .", "no good checkpoint"),
    ],
)
def test_an_error_of_fnrls_own_is_a_message_and_status_one(line, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(line) == 1
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_help_tells_the_options_of_the_chosen_parts(capsys):
    for line, there, absent in (
        ("train --help", "--algo.epochs", "--env.time_limit"),
        ("train --env CartPole --algo A2C --actor.recurrent --help", "--actor.recurrent.size", "--algo.epochs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(line)
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        assert there in out
        assert absent not in out
        assert "learning rate, in [0, inf)" in out
        assert "0 for none [a tenth of --steps, at least 20000]" in " ".join(out.split())


# -- runs -----------------------------------------------------------------------------------------------------------


def test_train_resume_evaluate(tmp_path, capsys, monkeypatch):
    line = f"--env CartPole {SMALL} --env.time_limit 20 --eval-episodes 2"
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(f"train {line} --steps 128 --dir {one} --workers 2") == 0
    assert checkpoint.newest(one).state.settings.every == 20_000
    where = min(str(one), os.path.relpath(one), key=len)  # as short as it can be told
    assert f"fnrl resume {where}" in capsys.readouterr().out
    assert run(f"resume {one} --steps 64") == 1
    assert "128 environment steps are done already" in capsys.readouterr().err
    assert run(f"resume {one} --steps 256 --quiet") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "lr is 0 from 128 environment steps on and this run goes to 256" in said.err  # the preset's line
    assert run(f"train {line} --steps 256 --dir {two} --workers 2 --algo.lr 1e-3:0:128 --quiet") == 0
    a, b = (checkpoint.newest(d).state for d in (one, two))
    assert a.scheme.env_steps == b.scheme.env_steps == 256
    assert tree.different_bits(a.scheme, b.scheme) == []
    before = sorted(p.name for p in one.iterdir())
    capsys.readouterr()
    monkeypatch.setattr(logs, "_EVERY", 0.0)
    assert run(f"evaluate {one} --episodes 3") == 0
    said = capsys.readouterr()
    assert "CartPole-v1 after 256 steps, 3 episodes" in said.out
    assert said.err.splitlines()[:2] == ["0/3 episodes, 3 steps", "0/3 episodes, 6 steps"]
    assert run(f"evaluate {one} --episodes 3 --quiet") == 0
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in one.iterdir()) == before
    assert run(f"train {line} --dir {one}") == 1
    assert "already holds a run" in capsys.readouterr().err


def test_a_run_of_a_device_that_is_not_here_is_evaluated_and_resumed_on_another(tmp_path, capsys, monkeypatch):
    where = tmp_path / "run"
    run(f"train --env CartPole {SMALL} --steps 64 --dir {where} --quiet")
    found = checkpoint.newest(f"{where}")
    moved = dataclasses.replace(found, config={**found.config, "device": "elsewhere"})
    monkeypatch.setattr(checkpoint, "newest", lambda *_: moved)
    assert run(f"evaluate {where} --episodes 2 --quiet") == 0
    assert run(f"resume {where} --steps 128") == 1
    assert "device='elsewhere' can't be used" in capsys.readouterr().err
    assert run(f"resume {where} --steps 128 --device cpu --quiet") == 0


def test_resume_begins_an_episode_anew_only_where_it_is_told_to(tmp_path, capsys):
    gymnasium.register("Hiding-v0", "hosted_cases:Hidden")
    where = tmp_path / "run"
    line = SMALL.replace("--storage.steps 16", "--storage.steps 53")
    try:
        assert run(f"train --env Hiding-v0 {line} --eval-every 0 --steps 106 --dir {where} --quiet") == 0
        assert run(f"resume {where} --steps 212 --quiet") == 1
        assert "(fnrl resume --inexact): such an episode is then restarted" in capsys.readouterr().err
        assert run(f"resume {where} --steps 212 --inexact --quiet") == 0
        said = capsys.readouterr().err
    finally:
        del gymnasium.registry["Hiding-v0"]
    assert "parts.env.exact: True -> False" in said
    assert "so the episode was restarted: Hiding-v0, environment 0" in said
    assert checkpoint.newest(where).step == 212


def test_resume_sets_what_it_is_told(tmp_path, capsys):
    where = tmp_path / "run"
    assert run(f"train --env CartPole {SMALL} --eval-every 0 --steps 64 --dir {where} --quiet") == 0
    assert run(f"resume {where} --set lrr=1 --quiet") == 1
    assert "did you mean 'lr'?" in capsys.readouterr().err
    assert run(f"resume {where} --steps 128 --set lr=2e-4 clip=0.1 --quiet") == 0
    assert capsys.readouterr().err == ""
    state = checkpoint.newest(where).state.scheme
    assert [float(state.weights.hyper[n]) for n in ("lr", "clip")] == pytest.approx([2e-4, 0.1])


def test_an_interrupt_ends_with_130_and_resumes_exactly(tmp_path):
    """A process of its own, on hosted simulators in processes: the terminal signals all of them."""
    line = (
        f"--env CartPole-v1 {SMALL} --env.processes --eval-every 0 --algo.lr 1e-3 --steps 100000 --dir {tmp_path / 'a'}"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fnrl", "train", *line.split()]
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        metrics = tmp_path / "a" / "metrics.jsonl"
        for _ in range(600):
            time.sleep(0.1)
            if metrics.exists() and metrics.read_text().count("\n") > 2:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    last = json.loads(metrics.read_text().splitlines()[-1])
    saved = checkpoint.newest(tmp_path / "a").state
    assert (last["event"], last["updates"]) == ("interrupted", saved.scheme.version)
    target = saved.scheme.env_steps + 64
    assert run(f"resume {tmp_path / 'a'} --steps {target} --quiet") == 0
    straight = line.replace("100000", str(target)).replace(str(tmp_path / "a"), str(tmp_path / "b"))
    assert run(f"train {straight} --quiet".replace("--env.processes", "--no-env.processes")) == 0
    a, b = (checkpoint.newest(tmp_path / d).state.scheme for d in "ab")
    assert tree.different_bits(a, b) == []


def test_a_module_brings_an_environment_and_is_found_again(tmp_path, capsys, monkeypatch):
    """From the directory it lies in, as a class or as an id that it registers."""
    (tmp_path / "brought.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Short(CartPoleEnv):\n    pass\n"
        "gymnasium.register('Brought-v0', entry_point=Short, max_episode_steps=20)\n"
    )
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("brought:Short", "brought:Brought-v0")):
        assert (
            run(f"train --env {name} {SMALL} --steps 64 --eval-every 64 --eval-episodes 2 --dir runs/{i} --quiet") == 0
        )
        assert run(f"evaluate runs/{i} --episodes 3 --quiet") == 0
        assert f"{name} after 64 steps" in capsys.readouterr().out
    assert run(f"train --env brought:Short {SMALL} --steps 64 --eval-every 0 --quiet") == 0
    assert [p.name[:18] for p in Path("runs").glob("brought*")] == ["brought-Short-PPO-"]


def test_a_run_says_what_it_is_and_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(f"train --env CartPole {SMALL} --steps 64 --algo.lr 1e-3:0 --eval-every 0 --dir a") == 0
    out = capsys.readouterr().out
    assert "PPO with GAE on CartPole-v1 (2 environments, centralised(gradients(collect))), in a: Ctrl-C" in out
    assert "fnrl resume a --steps N --set lr=X" in out
    assert run("resume a --steps 128 --set algo.lr=1e-4 --quiet") == 0
    assert float(checkpoint.newest("a").state.scheme.weights.hyper["lr"]) == pytest.approx(1e-4)
    assert (
        run(f"train --env CartPole --scheme impala --workers 2 {SMALL} --steps 64 --eval-every 0 --dir b --quiet") == 0
    )
    assert '"fnrl.storages.rollout.VTrace"' in Path("b/config.json").read_text()


def test_what_a_loop_saved_is_evaluated(tmp_path, capsys):
    env = fnrl.envs.CartPole(num_envs=2)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(), fnrl.GAE(steps=16))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    with checkpoint.Checkpoints(tmp_path) as store:
        store.save(scheme.gather(scheme.init(fnrl.seeds(2))), step=0, config=scheme)
    assert run(f"evaluate {tmp_path} --episodes 2 --quiet") == 0
    assert "lane 1: " in capsys.readouterr().out
    assert run(f"evaluate {tmp_path} --seed -1 --quiet") == 1
    assert "seed" in capsys.readouterr().err
