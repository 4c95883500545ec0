"""Whatever is wrong with a checkpoint is found and said, the one before is used, and nothing in a file is run."""

import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from checkpoint_cases import a_state, facts, forge, laws, nodes, refused, step, write_run
from hypothesis import example, given, settings

from fnrl import manifest
from fnrl.checkpoint import Checkpoints, CheckpointWarning, load, newest
from fnrl.errors import CheckpointError
from fnrl.record import host, record

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Path:
    return write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def falls_back(directory: Path, says: str = "step-000000000002") -> None:
    """The newest is found damaged, loudly, and the one before is used."""
    with pytest.raises(CheckpointError, match=says):
        load(step(directory, 2))
    with pytest.warns(CheckpointWarning, match=says) as caught:
        found = newest(directory)
    assert "step-000000000002" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert found.step == 1
    assert facts(found.state) == facts(a_state(1))


def test_the_newest_good_one_is_by_step(written: Path) -> None:
    assert newest(written).step == 2
    assert facts(newest(written).state) == facts(a_state(2))
    os.utime(step(written, 1))
    assert newest(written).step == 2


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


files = st.sampled_from(["manifest.json", "state.safetensors"])


@settings(laws, max_examples=150)
@given(files, st.integers(0, 2**32), st.integers(0, 7))
@example("manifest.json", 0, 0)
@example("manifest.json", 12, 5)
def test_any_flipped_bit_is_found(written: Path, name: str, at: int, bit: int) -> None:
    data = bytearray((step(written, 2) / name).read_bytes())
    data[at % len(data)] ^= 1 << bit
    with replaced(step(written, 2) / name, bytes(data)):
        falls_back(written, "SHA-256")
    assert newest(written).step == 2


@laws
@given(files, st.integers(0, 2**32), st.binary(max_size=2))
@example("manifest.json", 0, b"")
@example("state.safetensors", 0, b"")
@example("manifest.json", -2, b"")
def test_files_cut_short_or_grown_are_found(written: Path, name: str, at: int, more: bytes) -> None:
    data = (step(written, 2) / name).read_bytes()
    cut = data[: at % len(data)] if not more else data + more
    with replaced(step(written, 2) / name, cut):
        falls_back(written, r"SHA-256|bytes")


def test_missing_swapped_and_foreign_files(run_dir: Path) -> None:
    one, two = step(run_dir, 1), step(run_dir, 2)
    for name in ("manifest.json", "state.safetensors"):
        data = (two / name).read_bytes()
        (two / name).unlink()
        falls_back(run_dir, "No such file")
        (two / name).mkdir()
        falls_back(run_dir, "not a plain file|directory")
        (two / name).rmdir()
        os.mkfifo(two / name)
        falls_back(run_dir, "not a plain file")
        (two / name).unlink()
        (two / name).symlink_to(one / name)
        falls_back(run_dir, "symbolic link")
        (two / name).unlink()
        (two / name).write_bytes(data)
    with replaced(two / "state.safetensors", (one / "state.safetensors").read_bytes()):
        falls_back(run_dir, "SHA-256")
    (two / "notes.txt").write_text("mine")
    with pytest.warns(CheckpointWarning, match=r"ignored: \['notes.txt'\]"):
        assert load(two).step == 2
    shutil.rmtree(two)
    two.write_text("a file")
    falls_back(run_dir, "Not a directory")
    two.unlink()
    two.symlink_to(one)
    with pytest.warns(CheckpointWarning, match="symbolic link"):
        assert newest(run_dir).step == 1
    two.unlink()
    shutil.copytree(one, two)  # a whole checkpoint under another's name
    with pytest.warns(CheckpointWarning, match="holds step 1"):
        assert newest(run_dir).step == 1
    shutil.rmtree(two)
    two.mkdir()
    falls_back(run_dir, "No such file")


def test_when_none_is_good_each_is_named(run_dir: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        (step(run_dir, n) / "state.safetensors").write_bytes(b"")
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError) as caught:
        newest(run_dir)
    assert str(caught.value).count("has 0 bytes") == 2
    assert all(f"step-{n:012d}" in str(caught.value) for n in (1, 2))
    with Checkpoints(tmp_path / "empty") as runs, pytest.raises(CheckpointError, match="no good checkpoint"):
        runs.newest()
    with pytest.raises(CheckpointError, match="nowhere"):
        newest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FNRL_TEST_BOMB"],)


def test_no_pickle_is_run(run_dir: Path, monkeypatch: Any) -> None:
    target = run_dir / "bomb"
    monkeypatch.setenv("FNRL_TEST_BOMB", str(target))
    monkeypatch.setattr(pickle, "loads", None)
    plain_pickle = pickle.dumps([Bomb(), b" " * 1000])
    torch.save({"x": Bomb()}, run_dir / "torch.pt")
    for data in (plain_pickle, (run_dir / "torch.pt").read_bytes()):
        with replaced(step(run_dir, 2) / "manifest.json", data):
            falls_back(run_dir)
        forge(step(run_dir, 2), data)
        falls_back(run_dir)
    assert not target.exists()
    monkeypatch.undo()
    monkeypatch.setenv("FNRL_TEST_BOMB", str(target))
    pickle.loads(plain_pickle)
    assert target.exists(), "the bomb is a dud: this test proves nothing"


@pytest.mark.parametrize("name", ["../step-000000000001/state.safetensors", "/etc/passwd", "a/b", "..", "", "x.pkl"])
def test_names_that_lead_elsewhere_are_refused(run_dir: Path, name: str) -> None:
    said = json.loads((step(run_dir, 2) / "manifest.json").read_bytes())["files"]
    for forged in ({name: said["state.safetensors"]}, said | {name: said["state.safetensors"]}):
        forge(step(run_dir, 2), files=forged)
        falls_back(run_dir, "names the files")


def test_a_size_that_the_structure_does_not_need_is_not_read(run_dir: Path) -> None:
    huge = 2**40  # a sparse file: reading it would take all memory
    os.truncate(step(run_dir, 2) / "state.safetensors", huge)
    forge(step(run_dir, 2), files={"state.safetensors": {"size": huge, "sha256": "0" * 64}})
    falls_back(run_dir, "can't have 1099511627776 bytes")


junk = st.sampled_from(
    [
        *(None, True, -1, 2**70, 0.5, "", "x", "os.system", "fnrl.types.Params", [], {}, [[]]),
        *({"tuple": 1}, {"leaf": "x"}, {"float": "x"}, {"dict": [[[], 1]]}, {"x": 1}, {"record": [], "fields": []}),
        {"record": "os.system", "fields": []},
        {"plain": "fnrl.types.Params", "fields": []},
        {"record": "fnrl.types.Layout", "fields": [["a"]]},
    ]
)


@settings(laws, max_examples=300)
@given(st.integers(0, 2**32), junk)
def test_a_forged_manifest_is_an_error_or_a_state_never_a_crash(written: Path, at: int, value: Any) -> None:
    path = step(written, 2) / "manifest.json"
    said = manifest.unseal(path.read_bytes())
    del said["sha256"]
    places = nodes(said)
    inside, key = places[at % len(places)]
    inside[key] = value
    with replaced(path, manifest.seal(said)), warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        assert "step-000000000002" in str(refused(lambda: newest(written)) or "step-000000000002")


@laws
@given(st.integers(0, 400), st.integers(0, 7))
def test_forged_tensors_are_an_error_or_a_state_never_a_crash(written: Path, at: int, bit: int) -> None:
    path = step(written, 2)
    data = bytearray((path / "state.safetensors").read_bytes())
    data[at % len(data)] ^= 1 << bit
    with (
        replaced(path / "manifest.json", (path / "manifest.json").read_bytes()),
        replaced(path / "state.safetensors", b""),
    ):
        forge(path, bytes(data))
        assert path.name in str(refused(lambda: load(path)) or path)


@record
class Picky:
    x: Any
    n: int = host()

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"n = {self.n}")


def test_tensors_and_manifest_must_agree(run_dir: Path) -> None:
    path = step(run_dir, 2)
    structure = manifest.unseal((path / "manifest.json").read_bytes())["structure"]
    leaf = next(c[k] for c, k in nodes(structure) if isinstance(c[k], dict) and "params.vector" in c[k].get("leaf", ""))
    for wrong in ({"dtype": "int32"}, {"shape": [5, 2]}, {"shape": [-10]}):
        right = dict(leaf)
        leaf.update(wrong)
        forge(path, structure=structure)
        falls_back(run_dir, r"leaf.params.vector is f32\[10\], its manifest says|can't have")
        leaf.update(right)
    forge(path, structure=structure)
    assert newest(run_dir).step == 2
    tensors = safetensors.torch.load((path / "state.safetensors").read_bytes())
    forge(path, safetensors.torch.save({**tensors, "more": torch.zeros(1)}))
    falls_back(run_dir, r"doesn't name: \['more'\]")
    forge(path, safetensors.torch.save({k: v for k, v in tensors.items() if k != "leaf.flags"}))
    falls_back(run_dir, r"malformed: KeyError: 'leaf.flags'")


def test_classes_that_are_not_here_or_have_changed(run_dir: Path) -> None:
    def holding(kind: str, name: str, **fields: Any) -> None:
        forge(step(run_dir, 2), structure={kind: name, "fields": [[k, v] for k, v in fields.items()]})
        with pytest.raises(CheckpointError) as caught:
            newest(run_dir)  # not damage: nothing older is taken instead
        says.append(str(caught.value))

    says: list[str] = []
    before = set(sys.modules)
    holding("record", "subprocess.Popen", args="true")
    holding("record", "antigravity.Anything", x=1)
    holding("plain", "fnrl.types.Params", vector=1)
    holding("record", "checkpoint_cases.Single", outside=())
    holding("record", f"{__name__}.Picky", x=(), n=-1)
    assert set(sys.modules) == before
    assert ["import the module" in s for s in says] == [True, True, True, False, False]
    assert "['outside']" in says[3]
    assert "['inside']" in says[3]
    assert says[4].endswith("refused by the class here: n = -1")
