"""Spaces there and back from gymnasium, how components print, and what the laws once found in lifted methods."""

import functools
import math
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given

import fnrl
from fnrl import MLP, random, testing, tree
from fnrl.executor import Inline
from fnrl.lift import Run
from fnrl.networks import CNN, GRU
from fnrl.spaces import Box, Discrete, EnvSpec, from_gymnasium


def to_gymnasium(space):
    if isinstance(space, Discrete):
        return gymnasium.spaces.Discrete(space.n, start=space.start)
    low, high = (np.broadcast_to(np.reshape(b, -1), (space.size,)) for b in (space.low, space.high))
    ends = (b.reshape(space.shape).astype(space.dtype) for b in (low, high))
    return gymnasium.spaces.Box(*ends, space.shape, np.dtype(space.dtype))


@given(testing.spaces())
def test_spaces_are_those_of_gymnasium(space):
    theirs = to_gymnasium(space)
    found = from_gymnasium(theirs, "it")
    assert (found.shape, found.stored) == (space.shape, space.stored)
    assert found.shape == tuple(theirs.shape)
    if isinstance(space, Box):
        for ours, bound in zip(found.bounds(), (theirs.low, theirs.high), strict=True):
            np.testing.assert_array_equal(ours.numpy(), bound.astype(np.float32))
        assert found.bounded == bool(np.isfinite(theirs.low).all() and np.isfinite(theirs.high).all())
        assert found.size == math.prod(space.shape)
    else:
        assert found == space


def test_other_spaces_are_refused_by_name():
    spaces = gymnasium.spaces
    for space, message in (
        (spaces.MultiDiscrete([2, 3]), "the action is a MultiDiscrete space"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "the action is a Dict space"),
        (spaces.Box(0.0, 1.0, (0, 2)), r"the action is an empty Box of shape \(0, 2\)"),
    ):
        with pytest.raises(fnrl.CompositionError, match=message):
            from_gymnasium(space, "the action")


def test_components_print_alike_in_every_process():
    actor = fnrl.OnPolicyActorCritic(fnrl.envs.CartPole().spec, policy=MLP((4,), torch.relu))
    code = (
        "import torch, fnrl;"
        "print(fnrl.OnPolicyActorCritic(fnrl.envs.CartPole().spec, policy=fnrl.MLP((4,), torch.relu)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert there.stdout.strip() == repr(actor)
    assert "activation=relu" in repr(actor)
    assert repr(fnrl.module(torch.nn.Identity)) == "Module(cls=Identity, kwargs=())"


def lanes_of(method, *each):
    """The results of three lanes and of two."""
    return [Run(None, Inline(), lanes=n).lift(method)(*(torch.stack(x[:n]) for x in each)) for n in (3, 2)]


def test_lanes_of_odd_widths_do_not_depend_on_their_number():
    # torch.sigmoid rounds the last elements of an array differently, oneDNN a grouped convolution by its groups
    key, image = fnrl.key, random.uniform(fnrl.key(9), (3, 2, 9, 9, 2))
    for size in (3, 5, 7):
        net = GRU(size)
        x, h = (3.0 * random.normal(key(i), (3, 33, size)) for i in range(2))
        weights = [net.init(key(i), size) for i in range(3)]
        step = functools.partial(_gru, net, tuple(weights[0]))
        three, two = lanes_of(step, x.unbind(), h.unbind(), *(tuple(w[n] for w in weights) for n in weights[0]))
        assert torch.equal(three[:2], two)
    for filters in ((4, 5), (3, 8), (16, 4)):
        net = CNN(filters, kernels=(4, 2), strides=(2, 1), hidden=6)
        weights = [net.init(key(i), (9, 9, 2)) for i in range(3)]
        step = functools.partial(_cnn, net, tuple(weights[0]))
        three, two = lanes_of(step, image.unbind(), *(tuple(w[n] for w in weights) for n in weights[0]))
        assert torch.equal(three[:2], two)
        torch.testing.assert_close(two[1], net.apply(weights[1], image[1]), rtol=1e-5, atol=1e-5)


def _gru(net, names, x, h, *tensors):
    return net.apply(dict(zip(names, tensors, strict=True)), x, h)


def _cnn(net, names, x, *tensors):
    return net.apply(dict(zip(names, tensors, strict=True)), x)


def test_one_process_may_compile_any_number_of_graphs(monkeypatch):
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    for lanes in (None, 2):
        graph = Run(None, Inline(), lanes=lanes, compile=True).graph(_times)
        assert [float(graph(i, torch.ones(2, 3)).sum()) for i in range(10)] == [6.0 * i for i in range(10)]


def _times(factor, x):
    return x * factor


INF = math.inf


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        ((-5.0, 20.0), (5.0, 30.0), (20.0, 30.0)),
        ((-INF, 20.0), (INF, 30.0), (20.0, 30.0)),  # an element without bounds takes nothing from the other
        ((-5.0, 20.0), (5.0, INF), (20.0, 23.0)),  # counted from the bound, where 0 lies beyond it
        ((-5.0, -INF), (5.0, -7.0), (-10.0, -7.0)),
        ((-5.0, -INF), (5.0, 2.0), (-3.0, 2.0)),
        ((-5.0, -3e38), (5.0, 3e38), (-3.0, 3.0)),  # float32 doesn't hold their distance
    ],
)
def test_every_element_of_an_action_is_explored_within_its_bounds(low, high, found):
    spec = EnvSpec("x", Box((3,)), Box((2,), low, high))
    actor = fnrl.OnPolicyActorCritic(spec)
    noise = tree.index(actor.noise(fnrl.key(1), 1, 20_000), 0)
    _, sent, _, _ = actor.act(actor.init(fnrl.key(0)), torch.randn(20_000, 3), actor.memory(20_000), noise)
    least, most = sent[:, 1].quantile(0.01), sent[:, 1].quantile(0.99)
    assert least <= found[0] + 0.8
    assert most >= found[1] - 0.8
    assert sent[:, 1].isfinite().all()
    assert sent[:, 1].unique().numel() > 1000
    assert bool((sent >= torch.tensor(low)).all() & (sent <= torch.tensor(high)).all())


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float64),
        gymnasium.spaces.Box(0, 2**31 - 1, (2,), np.int32),
        gymnasium.spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64),
        gymnasium.spaces.Box(0, 2**64 - 1, (2,), np.uint64),
        gymnasium.spaces.Box(np.array([0, -3]), np.array([200, 5]), dtype=np.int16),
        gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float16),
    ],
)
def test_actions_are_in_their_space_whatever_float32_makes_of_its_bounds(space):
    ours = from_gymnasium(space, "it")
    for end in (-1e30, 1e30, 0.0, *(x.flatten()[i].item() for x in ours.bounds() for i in range(2))):
        sent = ours.cast(np.full((1, 2), end, np.float32))[0]
        assert space.contains(sent), (end, sent)
    ends = [ours.cast(np.full((1, 2), x, np.float32))[0] for x in (-1e30, 1e30)]
    np.testing.assert_allclose(ends, [space.low, space.high], rtol=1e-9)


def test_small_numbers_are_not_taken_for_dark_images():
    flags = fnrl.OnPolicyActorCritic(EnvSpec("x", Box((4,), 0.0, 1.0, "uint8"), Discrete(2)))
    image = fnrl.OnPolicyActorCritic(EnvSpec("x", Box((4,), 0.0, 255.0, "uint8"), Discrete(2)))
    some = fnrl.OnPolicyActorCritic(EnvSpec("x", Box((2,), (0.0, 10.0), (4.0, 10.0), "uint8"), Discrete(2)))
    seen = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
    assert flags._features({}, seen).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert image._features({}, seen * 255).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert some._features({}, torch.tensor([[3, 10]], dtype=torch.uint8)).tolist() == [[0.75, 0.0]]
