"""Records, trees, tokens, flat parameters and moments: what everything else stands on."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as torch_pytree

import fnrl
from fnrl import check, random, tree
from fnrl.merge import merge_infos
from fnrl.record import HOST_ONLY, replace
from fnrl.token import Owner
from fnrl.types import Info, Layout, Moments, Normaliser, Params


@fnrl.record
class Pair:
    a: torch.Tensor
    b: object
    name: str = fnrl.static(default="pair")
    count: int = fnrl.host(default=0)


@fnrl.record
class Other:
    a: torch.Tensor
    b: object


def pair(seed: int = 0, **changes) -> Pair:
    x, y = random.normal(random.key(seed), (2, 3)), random.normal(random.key(seed + 1), (4,))
    return dataclasses.replace(Pair(x, {"y": y, "z": (y, [x]), "nothing": ()}), **changes)


def test_flatten_and_unflatten_are_inverse():
    leaves, structure = tree.flatten(pair(count=3))
    assert [tuple(x.shape) for x in leaves] == [(2, 3), (4,), (4,), (2, 3)]
    pair_again = tree.unflatten(structure, leaves)
    assert all(x is y for x, y in zip(leaves, tree.leaves(pair_again), strict=True))
    assert (pair_again.count, pair_again.name) == (3, "pair")
    assert [p for p, _ in tree.paths(pair())] == ["a", "b.y", "b.z.0", "b.z.1.0"]


def test_a_builder_is_unflatten_for_one_structure():
    for each in (pair(count=3, b=((), [torch.zeros(1)], {1: torch.ones(2)})), (), torch.ones(3), [pair(), (pair(1),)]):
        leaves, structure = tree.flatten(each)
        again = tree.builder(structure)(leaves)
        assert tree.flatten(again)[1] == structure
        assert all(x is y for x, y in zip(leaves, tree.leaves(again), strict=True))


def test_replace_is_that_of_dataclasses_but_for_what_was_computed():
    params = Params(torch.arange(3.0), Layout(("a.x",), ((3,),)))
    assert params.groups["a"]["x"].tolist() == [0.0, 1.0, 2.0]
    changed = replace(params, vector=torch.ones(3))
    assert changed.groups["a"]["x"].tolist() == [1.0, 1.0, 1.0]
    assert params.groups["a"]["x"].tolist() == [0.0, 1.0, 2.0]
    assert tree.same_bits(replace(pair(), count=7, a=torch.zeros(1)), pair(count=7, a=torch.zeros(1)))
    with pytest.raises(TypeError, match=r"Pair has no field.*counts"):
        replace(pair(), counts=1)


def test_a_component_hashes_as_its_equals_here_and_in_another_process():
    algo = fnrl.PPO(lr=1e-3)
    assert hash(algo) == hash(fnrl.PPO(lr=1e-3)) != hash(fnrl.PPO(lr=2e-3))
    script = "import sys, pickle, fnrl; x = pickle.load(sys.stdin.buffer); assert hash(x) == hash(fnrl.PPO(lr=1e-3))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(algo), env=environment, check=True, timeout=120)


def test_host_fields_do_not_enter_lifted_methods():
    _, structure = tree.flatten(pair(count=3), host=False)
    inside = tree.unflatten(structure, tree.leaves(pair()))
    assert inside.count is HOST_ONLY
    with pytest.raises(TypeError, match="not available inside a lifted method"):
        inside.count + 1
    assert tree.flatten(pair(count=3), host=False)[1] == tree.flatten(pair(count=4), host=False)[1]
    assert tree.flatten(pair(count=3))[1] != tree.flatten(pair(count=4))[1]
    assert tree.flatten(pair(name="x"), host=False)[1] != tree.flatten(pair(), host=False)[1]


def test_records_are_immutable_torch_pytrees():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair().a = torch.zeros(1)
    doubled = torch_pytree.tree_map(lambda x: 2 * x, pair())
    assert torch.equal(doubled.b["z"][1][0], 2 * pair().a)
    assert "f32[2, 3]" in repr(pair())


@pytest.mark.parametrize("bad", [None, 3, "x", {1, 2}])
def test_what_is_no_tree_is_named_by_its_path(bad):
    for look in (tree.flatten, lambda x: tree.map(torch.neg, x)):
        with pytest.raises(TypeError, match=r"b\.0: expected a tensor"):
            look(pair(b=(bad,)))


def test_map_refuses_other_structures():
    assert torch.equal(tree.map(torch.add, pair(), pair()).a, 2 * pair().a)
    with pytest.raises(ValueError, match="differ in structure"):
        tree.map(torch.add, pair(), pair(b=()))
    with pytest.raises(ValueError, match=r"zip|argument"):
        tree.stack([pair(), pair(b=())])


def test_stack_index_concatenate_where():
    stacked = tree.stack([pair(0), pair(5)])
    assert tree.same_bits(tree.index(stacked, 1), pair(5))
    joined = tree.concatenate([pair(0), pair(5)], 0)
    assert torch.equal(joined.b["y"], torch.cat([pair(0).b["y"], pair(5).b["y"]]))
    mask = torch.tensor([True, False])
    picked = tree.where(mask, stacked, tree.map(torch.zeros_like, stacked))
    assert tree.same_bits(tree.index(picked, 0), pair(0))
    assert not any(x.any() for x in tree.leaves(tree.index(picked, 1)))
    assert tree.stack([pair(), pair()], 1).a.shape == (2, 2, 3)


def test_same_bits_sees_what_equality_does_not():
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert tree.same_bits(nan, nan.clone())
    assert not tree.same_bits(zero, -zero)
    assert not tree.same_bits(zero, zero.double())
    assert tree.different_bits(pair(), pair(b={"y": pair().b["y"], "z": (nan, [pair().a]), "nothing": ()})) == ["b.z.0"]
    assert tree.non_finite(pair(a=nan)) == ["a"]


def test_numpy_and_back():
    arrays = tree.to_numpy(pair())
    assert isinstance(arrays.a, np.ndarray)
    arrays.a.setflags(write=False)
    back = tree.to_torch(arrays)
    assert tree.same_bits(back, pair())
    back.a.add_(1.0)  # its own memory
    assert tree.same_bits(tree.to_torch(arrays), pair())


def test_tokens_are_single_use_and_stay_in_their_process():
    owner = Owner()
    first = owner.token()
    assert first.take() is owner
    second = owner.advance()
    with pytest.raises(fnrl.StaleStateError, match="generation 0 of its Owner, which is at 1"):
        first.take()
    assert second.take() is owner
    with pytest.raises(TypeError, match="gather the state first"):
        pickle.dumps(second)
    owner.close()
    with pytest.raises(fnrl.StaleStateError, match="closed"):
        second.take()


def test_params_are_one_vector_with_names():
    tensors = {"p.w": torch.arange(6.0).reshape(2, 3), "p.b": torch.tensor([7.0]), "v.w": torch.tensor(9.0)}
    params = Params.of(tensors)
    assert params.vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
    assert all(torch.equal(params[n], v) for n, v in tensors.items())
    assert all(torch.equal(params.tree()[n], v) for n, v in tensors.items())
    assert torch.equal(params.groups["p"]["w"], tensors["p.w"])
    layout = params.layout
    assert (layout.groups, layout.group_sizes, layout.sizes) == (("p", "v"), (7, 1), (6, 1, 1))
    assert layout.spread(torch.tensor([1.0, 2.0])).tolist() == [1.0] * 7 + [2.0]
    assert layout.spread(torch.tensor(3.0)).dim() == 0
    lanes = Params(torch.stack([params.vector, 2 * params.vector]), layout)
    assert torch.equal(lanes["p.w"][1], 2 * tensors["p.w"])
    with pytest.raises(KeyError, match=r"no parameter 'p\.x'; there are: p\.w"):
        params["p.x"]
    with pytest.raises(ValueError, match="contiguous"):
        Params.of({"a.x": torch.zeros(1), "b.x": torch.zeros(1), "a.y": torch.zeros(1)})
    assert layout == Layout(("p.w", "p.b", "v.w"), ((2, 3), (1,), ()))


@given(seed=st.integers(0, 1000), cut=st.integers(0, 20), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_moments_merge_as_if_counted_together(seed, cut, scale):
    x = scale * (random.normal(random.key(seed), (20, 3)) + 5.0)
    whole = Moments.of(x, 1)
    np.testing.assert_allclose(whole.mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose((whole.m2 / whole.count).numpy(), x.double().numpy().var(0), rtol=1e-9)
    parts = Moments.zeros((3,))
    for piece in (x[:cut], x[cut:]):
        if len(piece):
            parts = parts.merge(Moments.of(piece, 1))
    assert float(parts.count) == 20
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(parts.m2, whole.m2, rtol=1e-9, atol=0.0)
    empty = Moments.zeros((3,)).merge(Moments.zeros((3,)))
    assert tree.same_bits(empty, Moments.zeros((3,)))


def test_normaliser():
    x = 3.0 * random.normal(random.key(0), (400, 2)) + torch.tensor([5.0, -7.0])
    seen = Normaliser(Moments.of(x, 1), 2.0)(x)
    np.testing.assert_allclose(seen.numpy(), np.clip((x - x.mean(0)) / x.std(0, correction=0), -2, 2), atol=1e-4)
    assert seen.dtype == torch.float32
    assert torch.equal(Normaliser(Moments.zeros((2,)), 2.0)(x), x)  # the identity until something was counted
    constant = Normaliser(Moments.of(torch.ones(5, 2), 1), 10.0)(torch.ones(5, 2))
    assert torch.equal(constant, torch.zeros(5, 2))


def test_checks_are_on_in_tests_and_say_what_is_wrong():
    assert check.ACTIVE
    check.shape(torch.zeros(2, 3), None, 3)
    check.same_shape(torch.zeros(2), torch.zeros(2))
    check.dtype(torch.zeros(2), torch.float32)
    check.finite(torch.zeros(2), "x")
    for wrong in (
        lambda: check.shape(torch.zeros(2, 3), 2, 4),
        lambda: check.same_shape(torch.zeros(2), torch.zeros(3)),
        lambda: check.dtype(torch.zeros(2), torch.float64),
        lambda: check.finite(torch.tensor([float("inf")]), "x"),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_infos_merge_to_means_whoever_makes_them_and_differing_metrics_are_refused():
    def told(loss: float, **more: float) -> Info:
        metrics = {n: torch.tensor(x) for n, x in {"loss": loss, **more}.items()}
        return Info(metrics, (), {"seconds": 1.0}, {"lag": (int(loss),)})

    merged = merge_infos(told(x) if x else Info({}, ()) for x in (1.0, 0.0, 2.0, 6.0))
    assert merged.metrics["loss"] == 3.0
    assert (merged.report, merged.lags) == ({"seconds": 3.0}, {"lag": (1, 2, 6)})
    for first, then in ((told(1.0), told(1.0, kl=0.1)), (told(1.0, kl=0.1), told(1.0))):
        with pytest.raises(ValueError, match="infos differ in metrics"):
            merge_infos([first, then])


def test_what_a_record_was_signed_as_stays_with_it_alone():
    """A graph is chosen by it: records alike have one, a changed or copied one is looked at anew."""
    first, leaves = Pair(torch.zeros(2), torch.ones(3)), []
    kind = tree.sign(first, leaves)
    assert [x is y for x, y in zip(leaves, (first.a, first.b), strict=True)] == [True, True]
    again: list = []
    assert tree.sign(first, again) == kind
    assert [id(x) for x in again] == [id(x) for x in leaves]
    assert tree.sign(Pair(torch.ones(2), torch.ones(3), count=7), []) == kind
    for other in (
        replace(first, a=torch.zeros(4)),
        replace(first, a=torch.zeros(2, dtype=torch.float64)),
        replace(first, b=()),
        replace(first, name="another"),
        Other(first.a, first.b),
    ):
        assert tree.sign(other, []) != kind
    for other in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first), tree.map(lambda x: x + 1.0, first)):
        mine: list = []
        assert tree.sign(other, mine) == kind
        assert mine[0] is other.a
    assert tree.sign([first, {"x": first}], []) == tree.sign([first, {"x": first}], []) != tree.sign([first, first], [])
