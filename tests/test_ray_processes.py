"""Clusters started for a run: for this machine alone, for this user alone, and gone when the run is."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray_cases import descendants, left_of, on_policy, on_ray

import fnrl
from fnrl.executor.ray import cluster
from fnrl.topology import centralised, collect, gradients, synchronous

HERE = Path(__file__).parent
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture
def driver(tmp_path):
    command = [sys.executable, str(HERE / "ray_driver.py"), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "running\n"
    yield process
    process.kill()


@linux
def test_after_the_drivers_sigkill_no_process_is_left(driver):
    below = descendants(driver.pid)
    lines = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in below}
    agents = {p for p, line in lines.items() if b"Agent" in line}  # Ray's two wait a minute for what is gone
    assert sum(line.startswith(b"ray::Cell") for line in lines.values()) >= 2 + 2 * 2  # cells, and their simulators
    driver.kill()
    driver.wait()
    assert left_of({p: begun for p, begun in below.items() if p not in agents}, 30) == []
    assert len(agents) <= 2


@pytest.mark.slow
@linux
def test_ctrl_c_saves_and_leaves_no_process(driver, tmp_path):
    below = descendants(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    driver.wait(timeout=60)
    assert left_of(below, 60) == []
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "interrupted"
    assert (tmp_path / "run" / last["saved"]).is_dir()
    assert last["updates"] >= 9


def listening():
    """Addresses (as /proc prints them) on which processes below this one listen."""
    below, inodes = descendants(os.getpid()), set()
    for pid in below:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                link = os.readlink(fd)
            except OSError:
                continue
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    rows = [r.split() for n in ("tcp", "tcp6") for r in Path(f"/proc/net/{n}").read_text().splitlines()[1:]]
    return {r[1].split(":")[0] for r in rows if r[3] == "0A" and r[9] in inodes}


@linux
def test_a_cluster_of_ones_own_is_private_and_ends_with_its_last_cell():
    scheme = fnrl.Scheme(on_policy(), centralised(synchronous(gradients(collect), 1)), on_ray())
    state, _ = scheme.step(scheme.init(fnrl.key(0)))
    addresses = listening()
    assert addresses  # 127.0.0.1, plain and mapped into IPv6
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}
    token = Path.home() / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1")
    fork = scheme.fork(state)
    scheme.close(state)
    assert ray.is_initialized()
    scheme.close(fork)
    assert not ray.is_initialized()


@pytest.fixture
def address():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def join(address, before="", **env):
    """What another process prints that steps on this cluster, and what it raises."""
    code = (
        f"import ray, sys, fnrl; from ray_cases import *; from fnrl.topology import *; {before}\n"
        f"executor = on_ray(address={address!r})\n"
        "scheme = fnrl.Scheme(on_policy(), centralised(synchronous(gradients(collect), 1)), executor)\n"
        "state, _ = scheme.step(scheme.init(fnrl.key(0)))\n"
        "scheme.close(state)\n"
        "print(ray.get_runtime_context().gcs_address, state.version)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **env}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    return out.stdout.strip(), out.stderr


def test_a_cluster_is_found_and_one_of_another_version_is_refused(address):
    assert join("auto", RAY_ADDRESS=address)[0] == f"{address} 1"
    for before, said in (
        ("ray.__version__ = '0.0.1'", "Ray: 0.0.1"),
        ("ray._private.utils.compute_version_info = lambda: (ray.__version__, '3.10.1')", "Python: 3.10.1"),
    ):
        _, error = join(address, before)
        assert f"ExecutorError: the Ray cluster at {address} can't be joined" in error
        assert said in error
    assert ray.is_initialized()


def test_an_address_that_nobody_listens_at_is_told_before_ray_asks_there(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray asks for more than a minute"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        scheme = fnrl.Scheme(on_policy(), centralised(synchronous(gradients(collect), 1)), on_ray(address=address))
        with pytest.raises(fnrl.ExecutorError, match=f"the Ray cluster at {address} can't be joined: .*Is it running"):
            scheme.init(fnrl.key(0))


@pytest.mark.slow
def test_a_cluster_refuses_who_has_not_its_token(address):
    _, error = join(address, RAY_AUTH_TOKEN="0" * 64)
    assert f"ExecutorError: the Ray cluster at {address} can't be joined" in error
    assert "is its token in RAY_AUTH_TOKEN or ~/.ray/auth_token?" in error


def test_nothing_refers_to_a_cluster_that_was_shut_down():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    scheme = fnrl.Scheme(on_policy(), centralised(synchronous(gradients(collect), 1)), on_ray())
    state, _ = scheme.step(scheme.init(fnrl.key(0)))
    elsewhere = fnrl.Scheme(on_policy(), scheme.topology, on_ray(address="10.1.2.3:6379"))
    with pytest.raises(fnrl.ExecutorError, match=r"connected to the Ray cluster at .*not to the one at 10\.1\.2\.3"):
        elsewhere.init(fnrl.key(0))
    ray.shutdown()
    with pytest.raises(fnrl.StaleStateError, match="its Ray cluster was shut down"):
        scheme.step(state)
    assert not ray.is_initialized()  # asking did not start another one
    scheme.close(state)
    del state
    gc.collect()
    assert list(cluster._SESSIONS) == []


@pytest.mark.slow
def test_a_node_that_is_taken_away_changes_no_bit():
    example = HERE.parent / "examples" / "two_nodes.py"
    out = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr
    assert "'faults/node': 2.0}, leaves that differ: []" in out.stdout
