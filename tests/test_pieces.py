"""Rings in checkpoints: by pieces, of which only new ones are written; exact, atomic, and loud where damaged."""

import errno
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_cases import refused, step
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cases import Life
from test_checkpoint_crash import child_env, failing

import fnrl
from fnrl import tree
from fnrl.checkpoint import Checkpoints, CheckpointWarning, load, newest
from fnrl.errors import CheckpointError
from fnrl.storages import Frames, Prioritised, ring
from fnrl.testing import probes

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ring, "_PIECE", 200)


def pieces(path):
    return {p.name for p in path.iterdir()} - {"state.safetensors", "manifest.json"}


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # in place: every checkpoint that has this file has the damage


@settings(max_examples=15, deadline=None)
@given(
    capacity=st.integers(2, 40),
    frames=st.sampled_from([None, Frames(2), Frames(3, padding=0.0)]),
    prioritised=st.sampled_from([None, Prioritised()]),
    count=st.sampled_from([None, 2]),
    chance=st.sampled_from([0.0, 0.4, 1.0]),
    moves=st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_a_ring_comes_back_bit_for_bit_and_goes_on(
    tmp_path_factory, capacity, frames, prioritised, count, chance, moves
):
    """Whether its memory was shared or copied for the save; every kept checkpoint holds what it held."""
    life, kept = Life(capacity * 2, frames, prioritised, count, chance), {}
    with Checkpoints(tmp_path_factory.mktemp("run"), keep=2) as runs:
        for n, steps in enumerate(moves):
            for _ in range(steps):
                life.live()
            kept[n] = life.record()
            given_ = life.view() if n % 2 else kept[n]
            assert tree.same_bits(life.storage.gather(life.storage.restore(kept[n])), kept[n])
            runs.save(given_, step=n)
            for path in runs.paths():
                found = load(path)
                assert tree.different_bits(found.state, kept[found.step]) == []
        state = life.storage.restore(runs.newest().state, copy=False)
        life.live()
        again = Life(capacity * 2, frames, prioritised, count, chance)
        again.state = state
        for _ in range(sum(moves)):
            [w.rollout(1) for w in again.worlds]
        again.live()
        assert tree.same_bits(again.record(), life.record())


def test_only_new_rows_are_written_and_old_files_go(tmp_path):
    life, seen, now = Life(capacity=400), set(), set()
    life.live(150)
    with Checkpoints(tmp_path, keep=2) as runs:
        for n in range(12):
            before, now = now, pieces(runs.save(life.view(), step=n))
            new = now - before
            if n:
                assert 1 <= len(new) <= 3  # four rows to a piece: three rows, the one they end in, and the ring's end
                assert len(now & before) > 30
                assert not new & seen
            there = {name for path in runs.paths() for name in pieces(path)}
            assert there == now | before  # of two checkpoints, and nothing else
            assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(("step", ".lock"))] == []
            seen |= now
            life.live(3)
        shared = next(iter(now & before))
        assert {(p / shared).stat().st_nlink for p in runs.paths()} == {2}


def test_saving_copies_no_ring(tmp_path, monkeypatch):
    env = probes.ActionObservationReward(num_envs=2, continuous=True)
    parts = fnrl.Parts(env, fnrl.OffPolicyActorCritic(env.spec), fnrl.SAC(batch=4), fnrl.Replay(capacity=20, warmup=8))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    with fnrl.Learner(scheme, 100, tmp_path) as learner:
        learner.step(3)
        whole = scheme.gather(learner.state)
        rows = learner.state.node.child.storage.token.take().rows
        shared = scheme.gather(learner.state, copy=False).node.child.storage.ring.rows
        assert shared.obs.data_ptr() == rows.obs.data_ptr() != whole.node.child.storage.ring.rows.obs.data_ptr()
        monkeypatch.setattr(ring.Ring, "gather", None)
        path = learner.save()
    monkeypatch.undo()
    assert tree.same_bits(load(path).state.scheme, whole)
    full = ring.Ring.restore(10, whole.node.child.storage.ring, copy=False)
    assert (full.rows.obs.data_ptr() == whole.node.child.storage.ring.rows.obs.data_ptr()) == (full.size == 10)


ENV = probes.ActionObservationReward(num_envs=2, continuous=True)
POLE = fnrl.envs.CartPole(num_envs=2, time_limit=9)
SMALL = fnrl.MLP((8,))
AGENTS = {
    "sac": (fnrl.SAC, ENV, {"policy": SMALL}),
    "td3": (fnrl.TD3, ENV, {"policy": SMALL, "stochastic": False, "explore": fnrl.Gaussian()}),
    "ddpg": (fnrl.DDPG, ENV, {"policy": SMALL, "stochastic": False, "critics": 1, "explore": fnrl.OrnsteinUhlenbeck()}),
    "dqn": (fnrl.DQN, POLE, {"policy": None, "critics": 1, "explore": fnrl.EpsilonGreedy()}),
}


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("at", [4, 23, 24])
def test_a_run_resumed_from_its_files_ends_alike(tmp_path, name, at):
    """n-step and prioritised, saved before the ring turned, after it, and in the middle of a plan."""
    algo, env, options = AGENTS[name]
    storage = fnrl.Replay(capacity=40, steps=3, warmup=12, n_step=3, prioritised=Prioritised())
    parts = fnrl.Parts(
        env, fnrl.OffPolicyActorCritic(env.spec, critic=SMALL, **options), algo(batch=5, ratio=0.5), storage
    )
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    with fnrl.Learner(scheme, 10**6, tmp_path) as learner:
        learner.step(at)
        assert (learner.state.node.child.storage.token.owner.size == 20) == (at > 20)
        learner.save()
        learner.step(14)
        learner.save()
        end = scheme.gather(learner.state)
    newest(tmp_path)
    for path in sorted(tmp_path.glob("step-*"))[1:]:
        spoil(path / "state.safetensors")  # so that the first is gone on from
    with pytest.warns(CheckpointWarning, match="passed over"):
        learner = fnrl.Learner.resume(tmp_path, scheme)
    with learner:
        assert learner.state.version == at
        learner.step(14)
        assert tree.different_bits(scheme.gather(learner.state), end) == []


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_damage_spoils_those_that_need_the_file_and_the_next_save_heals(tmp_path):
    life, kept = Life(capacity=60), {}
    with Checkpoints(tmp_path, keep=9) as runs:
        for n in range(4):
            life.live(12)
            kept[n] = life.record()
            runs.save(life.view(), step=n)
        held = {n: pieces(step(tmp_path, n)) for n in range(4)}
        victim = sorted((held[3] & held[2]) - held[1])[0]
        spoil(step(tmp_path, 2) / victim)
        for n in (2, 3):
            with pytest.raises(CheckpointError, match=f"{victim} doesn't have the SHA-256 in its manifest"):
                load(step(tmp_path, n))
        with pytest.warns(CheckpointWarning) as told:
            found = newest(tmp_path)
        assert [f"step-{n:012d}" in str(w.message) for n, w in zip((3, 2), told, strict=True)] == [True, True]
        assert tree.same_bits(found.state, kept[1])
        for n in (0, 1):
            assert tree.same_bits(load(step(tmp_path, n)).state, kept[n])
        with pytest.warns(CheckpointWarning, match=f"{victim} is damaged: it is written anew"):
            runs.save(life.view(), step=9)
        assert tree.same_bits(runs.newest().state, kept[3])


def test_pieces_that_are_missing_swapped_or_grown_are_found(tmp_path):
    life = Life()
    life.live(6)
    with Checkpoints(tmp_path) as runs:
        path = runs.save(life.view(), step=0)
    one, two, *_ = sorted(path / n for n in pieces(path))
    data, other = one.read_bytes(), two.read_bytes()
    for wrong, says in (
        (None, "No such file"),
        (b"", "has 0 bytes"),
        (data + b"x", "bytes, expected"),
        (other, "SHA|bytes"),
    ):
        one.unlink(missing_ok=True)
        if wrong is not None:
            one.write_bytes(wrong)
        assert says.split("|")[0] in str(refused(lambda: load(path))) or says.split("|")[-1] in str(
            refused(lambda: load(path))
        )
    one.unlink()
    one.symlink_to(two)
    with pytest.raises(CheckpointError, match="symbolic link"):
        load(path)
    one.unlink()
    one.write_bytes(data)
    assert tree.same_bits(load(path).state, life.record())


def test_where_files_can_not_be_linked_they_are_written(tmp_path, monkeypatch):
    def no(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    life = Life()
    life.live(6)
    with Checkpoints(tmp_path, keep=2) as runs:
        runs.save(life.view(), step=0)
        monkeypatch.setattr(os, "link", no)
        path = runs.save(life.view(), step=1)
        assert {(path / n).stat().st_nlink for n in pieces(path)} == {1}
        assert tree.same_bits(load(path).state, life.record())
        runs.save(life.view(), step=2)  # the one before is needed no more, and goes
        assert len(runs.paths()) == 2


def test_rings_that_were_saved_whole_are_read(tmp_path, monkeypatch):
    life = Life(prioritised=Prioritised())
    life.live(6)
    with Checkpoints(tmp_path) as runs:
        record = life.record()
        monkeypatch.delattr(ring.RingRecord, "apart")
        path = runs.save(record, step=0)
        monkeypatch.undo()
        assert not pieces(path)
        assert tree.same_bits(load(path).state, life.record())


def test_a_ring_that_is_not_finite_is_not_saved(tmp_path):
    life = Life()
    life.live(6)
    life.state.token.take().rows.reward[3, 1] = float("nan")
    with Checkpoints(tmp_path) as runs, pytest.raises(CheckpointError, match=r"isn't finite.*reward"):
        runs.save(life.view(), step=0)
    assert not list(tmp_path.glob("*step*"))


def test_a_save_that_fails_anywhere_leaves_what_was_there(tmp_path, monkeypatch):
    """Also between two pieces, and while old ones are removed: each file is held by whatever needs it."""
    monkeypatch.setattr(ring, "_PIECE", 300)
    outcomes = []
    for at in range(200):
        life = Life(capacity=40)
        life.live(9)
        with Checkpoints(tmp_path / str(at), keep=1) as runs:
            before = life.record()
            runs.save(life.view(), step=1)
            life.live(2)
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with failing(at, error) as seen, warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                error = refused(functools.partial(runs.save, life.view(), step=2))
            outcomes.append("failed" if error else "told" if told else "passed")
            published = seen.count("rename") > (seen[at : at + 1] == ["rename"] and outcomes[-1] == "failed")
            assert tree.same_bits(runs.newest().state, life.record() if published else before)
            life.live(1)
            runs.save(life.view(), step=3)
            assert tree.same_bits(runs.newest().state, life.record())
            assert [p.name for p in runs.directory.iterdir() if p.name[0] != "."] == ["step-000000000003"]
        if len(seen) <= at:
            break
    assert seen.count("link") >= 2
    assert outcomes[-1] == "passed"
    assert outcomes.count("failed") >= 9


KILLED = """
import json, os, signal, sys, builtins
sys.path.insert(0, sys.argv[2])
import torch
from replay_cases import Life
from fnrl.storages import ring
from fnrl.checkpoint import Checkpoints

torch.set_num_threads(1)
ring._PIECE = 300

def child(directory, life, at):
    seen = 0
    def wrap(real):
        def operation(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return operation
    runs = Checkpoints(directory, keep=1)
    for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "link"):
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = wrap(builtins.open)
    runs.save(life.view(), step=2)
    os._exit(0)

for at in range(1, 200):
    life = Life(capacity=40)
    life.live(9)
    directory = f"{sys.argv[1]}/{at}"
    with Checkpoints(directory, keep=1) as runs:
        runs.save(life.view(), step=1)
    life.live(2)
    pid = os.fork()
    if not pid:
        child(directory, life, at)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        break
print(at)
"""


def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "_PIECE", 300)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_env())
    assert made.returncode == 0, made.stderr
    life = Life(capacity=40)
    life.live(9)
    records = {1: life.record()}
    life.live(2)
    records[2] = life.record()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = []
        for at in range(1, int(made.stdout) + 1):
            found = newest(tmp_path / str(at))
            steps.append(found.step)
            assert tree.same_bits(found.state, records[found.step])
            with Checkpoints(tmp_path / str(at), keep=1) as runs:
                runs.save(records[2], step=3)
                assert tree.same_bits(runs.newest().state, records[2])
                assert [p.name for p in runs.directory.iterdir() if p.name[0] != "."] == ["step-000000000003"]
                assert not list(runs.directory.glob(".tmp-*"))
    finally:
        torch.set_num_threads(threads)
    assert steps == sorted(steps)
    assert {*steps} == {1, 2}
    assert len(steps) > 20
