"""Checkpoints: what is saved comes back bit for bit, fits or is refused, and the right ones are kept."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from checkpoint_cases import Pair, Single, a_state, facts, forge, laws, nodes, step, write_run
from hypothesis import example, given, settings

import fnrl
from fnrl import checkpoint, manifest, tree
from fnrl.checkpoint import ANY, Checkpoints, CheckpointWarning, best, diff, load, newest
from fnrl.component import Linear, printed
from fnrl.errors import CheckpointError
from fnrl.record import RECORDS, name_of, plain, record
from fnrl.token import Owner
from fnrl.topology import RootState
from fnrl.types import Layout, Moments, Params

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Path:
    return write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


# -- round trips ----------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(list(manifest._DTYPES.values()))
shapes = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype, shape = draw(dtypes), draw(shapes)
    raw = draw(st.binary(min_size=24, max_size=24))
    count = int(np.prod(shape, dtype=int))
    width = torch.empty((), dtype=dtype).element_size()
    x = torch.frombuffer(bytearray((raw * (count * width // 24 + 1))[: max(count, 1) * width]), dtype=torch.uint8)
    x = x % 2 == 1 if dtype is torch.bool else x.view(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        x = torch.where(torch.isfinite(x), x, torch.tensor(-0.0, dtype=dtype))
    return x[:count].reshape(shape)


@st.composite
def views(draw: Any) -> torch.Tensor:
    """Not contiguous, expanded, of another's memory, negated: views that a writer of raw memory gets wrong."""
    x = draw(tensors())
    how = draw(st.sampled_from(["same", "transposed", "expanded", "strided", "offset", "negated"]))
    if how == "transposed":
        return x.permute(tuple(reversed(range(x.dim()))))
    if how == "expanded":
        return x.unsqueeze(0).expand(3, *x.shape)
    if how == "strided" and x.dim():
        return x[::2]
    if how == "offset" and x.dim():
        return x[1:]
    if how == "negated" and x.dtype is torch.float32:
        return torch.complex(torch.zeros_like(x), x).conj().imag
    return x


arrays = st.builds(
    lambda x, transposed: x.numpy().T if transposed else x.numpy(),
    tensors().filter(lambda x: x.dtype is not torch.bfloat16),
    st.booleans(),
)
numbers = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(codec="utf-8"))
values = st.recursive(
    numbers | st.builds(Layout, st.tuples(st.text(max_size=3)), st.tuples(st.tuples(st.integers(0, 9)))),
    lambda v: st.lists(v, max_size=2) | st.lists(v, max_size=2).map(tuple) | st.dictionaries(st.text(max_size=2), v),
    max_leaves=4,
)
keys = st.sampled_from(["a", "b", "a.b", "b.a", "", ".", "__metadata__", "leaf", "0", 0, "fields", "é'"])
leaves = views() | arrays | st.just(np.float64(0.1))
trees = st.recursive(
    leaves | st.just(()),
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(keys, t, max_size=3)
        | st.builds(Pair, t, t, values, values)
        | st.builds(Single, t)
        | t.map(lambda x: (x, {"shared": x}))
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path_factory.mktemp("store"), keep=1) as made:
        yield made


@laws
@given(trees)
@example({"__metadata__": torch.ones(2), "__metadata__'": torch.zeros(1)})
@example({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "a.b'": torch.ones(3)})
@example(torch.tensor(1.5))
@example((torch.tensor([1 + 2j]).conj(), torch.tensor(1 + 2j).conj().imag))
@example(())
@example(Pair(torch.ones(6)[::2], (), -0.0, (float("inf"), float("nan"), 2**80, True, 1, 1.0, None, "é\n")))
def test_what_is_saved_comes_back_bit_for_bit(store: Checkpoints, state: Any) -> None:
    path = store.save(state, step=1)
    got = load(path).state
    assert facts(got) == facts(state)
    found = [x for x in tree.leaves(got) if isinstance(x, torch.Tensor)]
    assert all(x.is_contiguous() for x in found)
    owned = [x.untyped_storage().data_ptr() for x in found if x.numel()]
    assert len(owned) == len(set(owned)), "two leaves share memory"


def test_a_run_goes_on_exactly_mid_plan_and_between_plans(tmp_path: Path) -> None:
    env = fnrl.envs.CartPole(num_envs=2)
    algo = fnrl.PPO(epochs=1, minibatches=2, lr=Linear(1e-2, 1e-3, 100))
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), algo, fnrl.GAE(steps=8))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.synchronous(fnrl.gradients(fnrl.collect), workers=2)))
    state = scheme.init(fnrl.key(0))
    end, _ = scheme.step(state, 6)
    with Checkpoints(tmp_path) as runs:
        for version in range(1, 5):
            state, _ = scheme.step(state)
            pure = scheme.gather(state)
            like = fnrl.SchemeState(RootState(scheme.gather(end).node.algo, ANY))
            got = load(runs.save(pure, step=version, config=scheme, metrics={"loss": torch.tensor(0.5)}), like)
            assert facts(got.state) == facts(pure)
            assert (got.step, got.metrics, got.config) == (version, {"loss": 0.5}, printed(scheme))
            if version >= 3:
                resumed, _ = scheme.step(scheme.restore(got.state), 6 - version)
                assert scheme.same(resumed, end)


def test_what_can_not_be_saved_is_named(tmp_path: Path) -> None:
    token = Owner().token()

    def a_record(name: str, **fields: Any) -> Any:
        return record(type(name, (), {"__module__": __name__, "__annotations__": fields}))

    unknown, former, present = a_record("Unknown", x=Any), a_record("Known", x=Any), a_record("Known", y=Any)
    del RECORDS[name_of(unknown)]
    loop: list[Any] = []
    loop.append(loop)
    with Checkpoints(tmp_path) as runs:
        for bad, words in (
            ({"a": Pair((), (), (), token)}, ["a.count", "Token", "gather"]),
            (Single(unknown(())), ["inside", "Unknown"]),
            (Single(former(())), ["inside", "Known", "no longer"]),
            ({"a": [object()]}, ["a.0", "object"]),
            ({"a": torch.zeros(3).to_sparse()}, ["a", "sparse"]),
            ({"a": torch.zeros(3, device="meta")}, ["a", "meta"]),
            ({"a": np.array(["x"])}, ["a", "<U1"]),
            ({("a", 1): ()}, ["the state itself", "str or int keys"]),
            ({"\ud800": torch.zeros(1)}, ["surrogates"]),
            ({"a": 10**5000}, ["digits"]),
            (loop, ["recursion"]),
        ):
            with pytest.raises(CheckpointError) as caught:
                runs.save(bad, step=0)
            assert all(w in str(caught.value) for w in words), str(caught.value)
        assert runs.paths() == []
        assert isinstance(load(runs.save(present(()), step=0)).state, present)
        for step in (-1, True, 1.0):
            with pytest.raises(ValueError, match="step"):
                runs.save((), step=step)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="closed"):
        runs.save((), step=0)
    for keep in (0, True, 1.5):
        with pytest.raises(ValueError, match="keep"):
            Checkpoints(tmp_path, keep=keep)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frozen dataclass"):
        plain(Owner)


def test_too_much_structure_is_refused_when_it_is_saved(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "LIMIT", 4000)
    with Checkpoints(tmp_path) as runs:
        runs.save({"a": torch.zeros(5000)}, step=0)  # many bytes of tensors are no matter
        with pytest.raises(CheckpointError, match="4000"):
            runs.save({str(i): torch.zeros(1) for i in range(50)}, step=1)
    (runs.paths()[0] / "manifest.json").write_bytes(b" " * 4001)
    with pytest.raises(CheckpointError, match=r"manifest.json has 4001 bytes, expected at most 4000"):
        load(runs.paths()[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, np.float32]
)
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, wrong: float, dtype: Any) -> None:
    full = torch.full if isinstance(dtype, torch.dtype) else np.full
    with Checkpoints(tmp_path, keep=1) as runs:
        kept = runs.save(a_state(), step=1)
        with pytest.raises(CheckpointError, match=r"step 2.*: a\.inside$"):
            runs.save({"a": Single(full((2,), wrong, dtype=dtype)), "b": torch.ones(2)}, step=2)
        assert runs.paths() == [kept]
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock.owner", kept.name]


# -- what fits ------------------------------------------------------------------------------------------------------


def test_a_misfit_is_told_path_by_path_and_nothing_older_is_taken(written: Path) -> None:
    state = a_state(7)
    w = state.leaf["params"]
    other = Params(w.vector, Layout(("policy.w", "value.b"), w.layout.shapes))

    def holding(params: Params) -> Pair:
        return Pair({**state.leaf, "params": params}, ANY, 0.5)

    for like, words in (
        (holding(Params(w.vector.double(), w.layout)), ["leaf.params.vector: expected f64[10]"]),
        (holding(Params(w.vector.expand(4, -1), w.layout)), ["expected f32[4, 10]"]),
        (holding(Params(w.vector.numpy(), w.layout)), ["expected an array float32[10]"]),
        (holding(other), ["params.layout.names[1]: 'value.w' -> 'value.b'"]),
        (Pair({**state.leaf, "more": ()}, ANY, 0.5), ["leaf.more: missing, expected ()"]),
        (Pair({"params": w}, ANY, 0.5), ["leaf.flags: extra, the checkpoint has bool[2]"]),
        (Pair({"flags": ANY, "params": ANY}, ANY, 0.5), ["leaf: expected the order ['flags', 'params']"]),
        (Pair(ANY, (ANY, Moments.zeros(())), 0.5), ["record.1: expected a Moments, the checkpoint has ()"]),
        (Pair(ANY, ((), ()), 0.5), ["record.0: expected (), the checkpoint has a Moments"]),
        (Pair(ANY, [ANY, ()], 0.5), ["record: expected a list"]),
        (Pair(ANY, (ANY,), 0.5), ["record.1: extra"]),
        (Pair(ANY, ANY, 0.75), ["label: 0.5 -> 0.75"]),
        (Single(ANY), ["the state itself: expected a Single, the checkpoint has a Pair"]),
        (Pair({"params": ANY}, (ANY, ANY, ANY), 1.0), ["leaf.flags", "record.2", "label"]),
    ):
        with pytest.raises(CheckpointError) as caught:
            newest(written, like)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "step-000000000002" in str(caught.value)
        assert str(caught.value).count("\n") == len(words)
    assert newest(written, state).step == 2
    assert newest(written, tree.map(lambda x: x.to("meta"), state)).step == 2


def test_other_versions_load_with_a_warning_and_newer_formats_do_not(run_dir: Path, monkeypatch: Any) -> None:
    here = checkpoint._versions()
    for name, value in (("torch", "9.9"), ("numpy", "9.9"), ("fnrl", "9.9"), ("threads", 99), ("cpu", "abacus")):
        monkeypatch.setattr(checkpoint, "_versions", (here | {name: value}).copy)
        with pytest.warns(CheckpointWarning, match=f"bit-exact: {name} .* -> {value}$") as caught:
            assert facts(newest(run_dir).state) == facts(a_state(2))
        assert [w.filename for w in caught] == [__file__]
    monkeypatch.setattr(checkpoint, "_versions", lambda: here | {"python": "9.9"})
    assert newest(run_dir).step == 2
    forge(step(run_dir, 2), format=checkpoint.FORMAT + 1)
    for read in (lambda: newest(run_dir), lambda: load(step(run_dir, 2))):
        with pytest.raises(CheckpointError, match="format 3, the newest read here is 2"):
            read()


def test_the_thread_count_is_part_of_the_versions(run_dir: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(CheckpointWarning, match=f"threads {threads} -> {threads + 1}"):
            newest(run_dir)
    finally:
        torch.set_num_threads(threads)


# -- rotation -------------------------------------------------------------------------------------------------------


@settings(laws, max_examples=30)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 1)), max_size=7))
@example(1, [(3, True, 0), (5, False, 0), (6, False, 0)])
@example(1, [(3, True, 0), (3, False, 1), (6, False, 0)])
def test_the_newest_the_best_and_the_last_saved_are_kept(
    tmp_path_factory: Any, keep: int, saves: list[tuple[int, bool, int]]
) -> None:
    kept: dict[int, tuple[bool, int]] = {}
    with Checkpoints(tmp_path_factory.mktemp("rotation"), keep) as runs, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n, is_best, content in saves:
            late = any(k > n for k in kept)
            same = n in kept and kept[n][1] == content and kept[n][0] >= is_best
            told.clear()
            path = runs.save(torch.tensor(content), step=n, best=is_best)
            assert [str(w.message).partition(" is later")[1] for w in told] == [" is later"] * (late and not same)
            if not same:
                kept[n] = (is_best or kept.get(n, (False, 0))[0], content)
                stay = {*sorted(kept)[-keep:], n, *sorted(k for k, (b, _) in kept.items() if b)[-1:]}
                kept = {k: v for k, v in kept.items() if k in stay}
            assert [(load(p).step, int(load(p).state)) for p in runs.paths()] == [(k, kept[k][1]) for k in sorted(kept)]
            assert load(path).step == n
            assert runs.newest().step == max(kept)
            bests = [k for k, (b, _) in kept.items() if b]
            if bests:
                assert best(runs.directory).step == runs.best().step == max(bests)
            assert not list(runs.directory.glob(".tmp-*"))


def test_the_same_again_is_left_alone_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as runs:
        path = runs.save(a_state(), step=5, metrics={"a": 1})
        born = (path / "manifest.json").stat().st_mtime_ns
        assert runs.save(a_state(), step=5, metrics={"a": 1}) == path
        assert (path / "manifest.json").stat().st_mtime_ns == born
        (path / "state.safetensors").write_bytes(b"")
        again = runs.save(a_state(), step=5, metrics={"a": 1})
        assert runs.paths() == [again]
        assert facts(runs.newest().state) == facts(a_state())
        assert runs.save(a_state(), step=5, metrics={"a": 2}) != again
        assert runs.newest().metrics == {"a": 2}
        assert len(runs.paths()) == 1


def test_order_is_by_number_and_foreign_names_are_left_alone(tmp_path: Path) -> None:
    foreign = ["step-7", "step-000000000009x", "step-0000000000001", "step-000000000001.0", ".tmp-mine", "best"]
    for name in foreign:
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path, keep=1) as runs:
        assert [runs.save(torch.zeros(1), step=1)] == runs.paths()
        runs.save(torch.zeros(1), step=999_999_999_999)
        runs.save(torch.ones(1), step=1_000_000_000_000)
        assert [p.name for p in runs.paths()] == ["step-1000000000000"]
        assert runs.newest().step == 10**12
    assert set(foreign) < set(os.listdir(tmp_path))


def test_a_reader_follows_a_run_that_rotates(tmp_path: Path, monkeypatch: Any) -> None:
    with Checkpoints(tmp_path, keep=1) as runs:
        runs.save(torch.tensor(1), step=1)
        listed = checkpoint._list(tmp_path)
        runs.save(torch.tensor(2), step=2)
        lists = iter([listed])
        whole = checkpoint._list
        monkeypatch.setattr(checkpoint, "_list", lambda d: next(lists, None) or whole(d))
        assert newest(tmp_path).step == 2


# -- configurations -------------------------------------------------------------------------------------------------


def test_diff_says_where_configurations_disagree() -> None:
    a = printed(fnrl.PPO(lr=3e-4))
    assert diff({"algo": a}, {"algo": printed(fnrl.PPO(lr=1e-3))}) == ["algo.lr: 0.0003 -> 0.001"]
    lines = diff({"algo": a}, {"algo": printed(fnrl.PPO(lr=Linear(1e-3, 0.0)))})
    assert [s.partition(":")[0] for s in lines] == ["algo.lr"]
    assert diff({"": "A", "x": [1, 2]}, {"": "B", "x": [1, 3, 4]}) == [
        "the configuration: 'A' -> 'B'",
        "x[1]: 2 -> 3",
        "x[2]: (absent) -> 4",
    ]
    assert diff({"p": {"": "A", "k": None}}, {"p": {"": "B"}}) == ["p: 'A' -> 'B'", "p.k: None -> (absent)"]
    assert diff({"x": 1}, {"x": True}) == ["x: 1 -> True"]
    assert diff({"x": 1}, {"x": 1.0}) == []
    assert diff([1], {"0": 1}) == ["the configuration: [1] -> {'0': 1}"]


@laws
@given(values.map(printed), st.integers(0, 2**32))
def test_diff_finds_the_one_change(config: Any, at: int) -> None:
    assert diff(config, config) == []
    assert printed(config) == config
    changed = json.loads(json.dumps({"all": config}))
    places = [(c, k) for c, k in nodes(changed) if not isinstance(c[k], dict | list)]
    if places:
        inside, key = places[at % len(places)]
        old, inside[key] = inside[key], "something else"
        lines = diff({"all": config}, changed)
        assert len(lines) == 1
        assert lines[0].endswith(f": {old!r} -> 'something else'")
