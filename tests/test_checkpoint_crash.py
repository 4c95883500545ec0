"""A write that fails or is killed at any moment loses nothing, and two runs do not share a directory."""

import builtins
import errno
import json
import os
import resource
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import a_state, facts, refused

import fnrl
from fnrl.checkpoint import Checkpoints, newest
from fnrl.errors import CheckpointError
from fnrl.types import Moments

pytestmark = pytest.mark.filterwarnings("error")


OPERATIONS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "link")


@contextmanager
def failing(at: int, error: BaseException) -> Iterator[list[str]]:
    """Raises at the `at`-th operation on files; yields the operations there were."""
    seen: list[str] = []
    kept = {(os, n): getattr(os, n) for n in OPERATIONS} | {(builtins, "open"): builtins.open}

    def wrap(name: str, real: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == at + 1:
                raise error
            return real(*args, **kwargs)

        return operation

    for (module, name), real in kept.items():
        setattr(module, name, wrap(name, real))
    try:
        yield seen
    finally:
        for (module, name), real in kept.items():
            setattr(module, name, real)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("again", [False, True])
def test_a_write_that_fails_anywhere_leaves_what_was_there(tmp_path: Path, number: int, again: bool) -> None:
    outcomes = []
    for at in range(100):
        with Checkpoints(tmp_path / str(at), keep=1) as runs:
            runs.save(a_state(1), step=1)
            error = OSError(number, os.strerror(number))
            with failing(at, error) as seen, warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                error = refused(lambda: runs.save(a_state(2), step=1 if again else 2))
            if error is not None:
                assert isinstance(error.__cause__, OSError)
                assert error.__cause__.errno == number
                assert os.strerror(number) in str(error)
            assert not told or (error is None and "could not be removed" in str(told[0].message))
            outcomes.append("failed" if error else "told" if told else "passed")
            renamed = seen.count("rename") > (seen[at : at + 1] == ["rename"] and "failed" in outcomes[-1])
            assert facts(runs.newest().state) == facts(a_state(2 if renamed else 1))
            if not told:
                assert not list(runs.directory.glob(".tmp-*"))
            runs.save(a_state(3), step=3)
            assert [p.name for p in runs.paths()] == ["step-000000000003"]
            assert not list(runs.directory.glob(".tmp-*"))
        if len(seen) <= at:
            break
    assert outcomes[-1] == "passed"
    assert outcomes.count("failed") >= 9
    assert outcomes.count("told") >= 3


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as runs:
        kept = runs.save(a_state(1), step=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(CheckpointError, match="File too large"):
                runs.save(torch.zeros(10_000), step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert runs.paths() == [kept]
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock.owner", kept.name]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as runs:
        kept = runs.save(a_state(1), step=1)
        with pytest.raises(KeyboardInterrupt), failing(3, KeyboardInterrupt()):
            runs.save(a_state(2), step=2)
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock.owner", kept.name]


def test_a_directory_that_can_not_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        Checkpoints(tmp_path / "file" / "run")
    with failing(-1, OSError()) as seen:
        Checkpoints(tmp_path / "new" / "run").close()
    assert seen.count("fsync") == 2, "a new directory lasts when the one above it is synced"
    with failing(0, OSError(errno.EROFS, "read-only")), pytest.raises(CheckpointError, match="read-only"):
        Checkpoints(tmp_path / "run")
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(CheckpointError, match="full") as held:  # the error holds the frame, and the frame the lock
        Checkpoints(tmp_path / "run")
    monkeypatch.undo()
    with Checkpoints(tmp_path / "run") as runs:
        runs.save((), step=0)
    assert isinstance(held.value.__cause__, OSError)


CRASH = """
import builtins, json, os, shutil, signal, sys
import torch
from fnrl.checkpoint import Checkpoints
from fnrl.types import Moments

torch.set_num_threads(1)
root = sys.argv[1]

def child(directory, step, at):
    seen = 0

    def point():
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(real):
        def operation(*args, **kwargs):
            point()
            return real(*args, **kwargs)
        return operation

    real_open = builtins.open

    def opened(*args, **kwargs):
        point()
        file = real_open(*args, **kwargs)
        if "x" not in args[1]:
            return file
        real_write = file.write

        class Halves:
            def __getattr__(self, name):
                return getattr(file, name)
            def __enter__(self):
                return self
            def __exit__(self, *_):
                file.close()
            def write(self, data):
                file.write(data[: len(data) // 2])
                file.flush()
                point()
                file.write(data[len(data) // 2 :])

        return Halves()

    runs = Checkpoints(directory, keep=1)
    for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = opened
    runs.save(Moments.zeros((3,)), step=step)
    os._exit(0)

report = []
for step in (1, 2):
    for at in range(1, 100):
        directory = f"{root}/{step}-{at}"
        with Checkpoints(directory, keep=1) as runs:
            runs.save(Moments.zeros((2,)), step=1)
        pid = os.fork()
        if not pid:
            child(directory, step, at)
        status = os.waitpid(pid, 0)[1]
        report.append([directory, os.WIFSIGNALED(status)])
        if not os.WIFSIGNALED(status):
            break
print(json.dumps(report))
"""


def child_env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fnrl.__file__).parents[1])}


def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True, timeout=120, env=child_env()
    )
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        widths, leftovers = [], 0
        for directory, killed in report:
            width = newest(directory).state.mean.shape[0]  # warnings are errors here: nothing may look damaged
            widths.append((Path(directory).name[0], width))
            assert killed or width == 3
            with Checkpoints(directory, keep=1) as runs:  # the lock of the dead doesn't hold
                leftovers += len(list(Path(directory).glob(".tmp-*")))
                runs.save(Moments.zeros((4,)), step=2)
                assert len(runs.paths()) == 1
                assert runs.newest().state.mean.shape == (4,)
                assert not list(Path(directory).glob(".tmp-*"))
    finally:
        torch.set_num_threads(threads)
    assert len(report) >= 30
    assert leftovers >= 20
    assert all(("12"[i], width) in widths for i in (0, 1) for width in (2, 3))
    assert widths == sorted(widths), "once the new one is there it stays"


HOLD = """
import sys
from fnrl.checkpoint import Checkpoints
runs = Checkpoints(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    command, pipe = [sys.executable, "-c", HOLD, str(tmp_path)], subprocess.PIPE
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_env())
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on {socket.gethostname()}"):
            Checkpoints(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    with Checkpoints(tmp_path) as runs:
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"):
            Checkpoints(tmp_path)
        runs.save((), step=0)
        assert newest(tmp_path).step == 0  # reading takes no lock
    runs.close()
    Checkpoints(tmp_path).close()
