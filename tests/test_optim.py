"""Optimisers step for step against torch.optim and optax; masks, groups and clipping by law."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrl import graphs, tree
from fnrl.optim import SGD, Adam, RMSProp, clip_by_global_norm, clip_by_group_norm, polyak
from fnrl.types import Layout, Params

SHAPES = {"policy.weight": (3, 2), "policy.bias": (3,), "value.weight": (1, 2), "value.bias": (1,)}
GROUPS = (9, 3)
LR = torch.tensor(0.01)


def params_of(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return Params.of({n: torch.randn(s, generator=generator) for n, s in SHAPES.items()})


def grads_of(seed: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    scale = 10.0 ** torch.randint(-3, 3, (steps, 1), generator=generator)
    return list(torch.randn(steps, 12, generator=generator) * scale)


def ours(optimiser, params, grads, lr, mask=()):
    state = optimiser.init(params)
    for g in grads:
        params, state = optimiser.update(g, state, params, lr, mask)
    return params, state


class InALane:
    """An optimiser as lanes and graphs have it: by its formula, where one seed of Adam's takes torch's kernel."""

    def __init__(self, optimiser):
        self.optimiser, self.init = optimiser, optimiser.init

    def update(self, grads, state, params, lr, mask=()):
        two = [tree.stack([x, x]) for x in (grads, state, params)]
        made = torch.func.vmap(lambda g, s, p: self.optimiser.update(g, s, p, lr, mask))(*two)
        return tree.index(made, 1)


both_ways = pytest.mark.parametrize("way", [lambda x: x, InALane], ids=["alone", "lane"])


def theirs(make, params, grads):
    leaf = torch.nn.Parameter(params.vector.clone())
    optimiser = make([leaf])
    for g in grads:
        leaf.grad = g.clone()
        optimiser.step()
    return leaf.detach()


PAIRS = {
    "adam": (Adam(), lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-5)),
    "adam-other": (Adam(b1=0.5, b2=0.9, eps=1e-2), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-2)),
    "adam-no-mean": (Adam(b1=0.0), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999), eps=1e-5)),
    "adamw": (Adam(decay=0.3), lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-5, weight_decay=0.3)),
    "adamw-whole": (Adam(decay=1.0), lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-5, weight_decay=1.0)),
    "rmsprop": (RMSProp(), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-5)),
    "rmsprop-other": (RMSProp(decay=0.7, eps=1e-2), lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.7, eps=1e-2)),
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, lr=0.01)),
    "momentum": (SGD(momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8)),
}


@both_ways
@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 20))
def test_steps_are_those_of_torch_optim(way, name, seed, steps):
    optimiser, make = PAIRS[name]
    params, grads = params_of(seed), grads_of(seed, steps)
    mine, _ = ours(way(optimiser), params, grads, torch.tensor(0.01))
    torch.testing.assert_close(mine.vector, theirs(make, params, grads), rtol=2e-5, atol=1e-6)


def test_adam_rounds_alike_in_every_lane_at_every_age():
    """torch.pow does not: at some counts its value depends on where an element lies."""
    params, optimiser = params_of(0), Adam()
    state = optimiser.init(params)
    grads = grads_of(0, 1)[0]
    for count in range(0, 3000, 7):
        old = dataclasses.replace(state, count=torch.full((2,), float(count)))
        lanes, _ = torch.func.vmap(lambda g, c: optimiser.update(g, dataclasses.replace(state, count=c), params, LR))(
            grads.expand(9, 12), old.count.expand(9, 2)
        )
        assert bool((lanes.vector == lanes.vector[0]).all()), count


@both_ways
def test_adams_first_steps_keep_their_digits(way):
    """In float32 1 - 0.999^1 has five digits; the step of length lr must have all of them."""
    params = Params.of({"a.b": torch.zeros(3)})
    after, _ = way(Adam(eps=0.0)).update(
        torch.tensor([1e-3, 1.0, -7.0]), Adam().init(params), params, torch.tensor(0.01)
    )
    torch.testing.assert_close(after.vector, torch.tensor([-0.01, -0.01, 0.01]), rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("grads", [torch.tensor(2.0).expand(12), torch.randn(24)[::2]], ids=["expanded", "strided"])
@pytest.mark.parametrize("optimiser", [Adam(), RMSProp(), SGD()])
def test_a_gradient_may_lie_anyhow_in_memory(optimiser, grads):
    params = params_of(0)
    moved, _ = optimiser.update(grads, optimiser.init(params), params, LR)
    expected, _ = optimiser.update(
        grads.clone(memory_format=torch.contiguous_format), optimiser.init(params), params, LR
    )
    assert tree.same_bits(moved, expected)


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (5, 1, 16, 3), (16, 32, 16)])
def test_a_number_for_each_group_is_spread_alike_in_a_graph_and_outside(sizes):
    layout = Layout(tuple(f"g{i}.w" for i in range(len(sizes))), tuple((n,) for n in sizes))
    x, vector = torch.arange(1.0, 1.0 + len(sizes)), torch.randn(sum(sizes))
    expected = torch.repeat_interleave(x, torch.tensor(sizes))
    graph = graphs.compiled(lambda x, v: (layout.spread(x) + 0.0, layout.scale_(v * 1.0, x)), (x, vector))
    assert graph is not None
    for spread, scaled in (graph([x, vector]), (layout.spread(x), layout.scale_(vector.clone(), x))):
        assert spread.tolist() == expected.tolist()
        assert scaled.tolist() == (vector * expected).tolist()


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_of_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"Adam.{name} = 1.0 is out of range.*\[0, 1\)"):
        Adam(**{name: 1.0})


@both_ways
def test_adam_is_optax_adam(way):
    params, grads = params_of(0), grads_of(0, 12)
    mine, _ = ours(way(Adam()), params, grads, torch.tensor(0.01))
    optimiser, x = optax.adam(0.01, eps=1e-5), jnp.asarray(params.vector.numpy())
    state = optimiser.init(x)
    for g in grads:
        update, state = optimiser.update(jnp.asarray(g.numpy()), state)
        x = optax.apply_updates(x, update)
    np.testing.assert_allclose(mine.vector.numpy(), np.asarray(x), rtol=2e-5, atol=1e-6)


@both_ways
@pytest.mark.parametrize("optimiser", [Adam(decay=0.1), RMSProp(), SGD(momentum=0.9)])
def test_a_masked_group_does_not_move_and_neither_does_its_memory(way, optimiser):
    optimiser = way(optimiser)
    params, grads = params_of(1), grads_of(1, 6)
    lr = torch.tensor(0.01)
    halfway, state = ours(optimiser, params, grads[:3], lr)
    moved, after = optimiser.update(grads[3], state, halfway, lr, torch.tensor([False, True]))
    free, unmasked = optimiser.update(grads[3], state, halfway, lr)
    assert tree.same_bits(moved.vector[:9].clone(), halfway.vector[:9].clone())
    assert tree.same_bits(moved.vector[9:].clone(), free.vector[9:].clone())
    for name in type(state).__fields__.data:
        old, new, full = (getattr(s, name) for s in (state, after, unmasked))
        cut = 9 if old.shape == params.vector.shape else 1
        assert torch.equal(new[:cut], old[:cut]), name
        assert torch.equal(new[cut:], full[cut:]), name
        assert not torch.equal(new[cut:], old[cut:]), name
    still, same = optimiser.update(grads[3], state, halfway, lr, torch.tensor(False))
    assert tree.same_bits((still, same), (halfway, state))
    all_, every = optimiser.update(grads[3], state, halfway, lr, torch.tensor(True))
    assert tree.same_bits((all_, every), (free, unmasked))


@both_ways
@pytest.mark.parametrize("optimiser", [Adam(decay=0.1), RMSProp(), SGD(momentum=0.9)])
def test_a_rate_per_group_is_that_rate_alone(way, optimiser):
    optimiser = way(optimiser)
    params, grads = params_of(2), grads_of(2, 5)
    both, _ = ours(optimiser, params, grads, torch.tensor([0.01, 0.5]))
    slow, _ = ours(optimiser, params, grads, torch.tensor(0.01))
    fast, _ = ours(optimiser, params, grads, torch.tensor(0.5))
    torch.testing.assert_close(both.vector, torch.cat([slow.vector[:9], fast.vector[9:]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimiser", [Adam(), RMSProp(), SGD(momentum=0.9)])
def test_lanes_are_solo_runs_and_inputs_stay(optimiser):
    lanes = [params_of(i) for i in range(3)]
    grads = torch.stack([grads_of(i, 1)[0] for i in range(3)])
    states = [optimiser.init(p) for p in lanes]
    stacked, state = tree.stack(lanes), tree.stack(states)
    before = [x.clone() for x in tree.leaves((stacked, state, grads))]
    lr = torch.tensor([0.1, 0.2, 0.3])
    moved, after = torch.func.vmap(optimiser.update)(grads, state, stacked, lr)
    assert tree.same_bits(before, tree.leaves((stacked, state, grads)))
    for i in range(3):
        alone, memory = optimiser.update(grads[i], states[i], lanes[i], lr[i])
        torch.testing.assert_close(moved.vector[i], alone.vector, rtol=1e-6, atol=1e-7)
        for a, b in zip(tree.leaves(tree.index(after, i)), tree.leaves(memory), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10_000), limit=st.floats(1e-3, 1e3))
def test_clip_by_global_norm(seed, limit):
    g = grads_of(seed, 1)[0]
    clipped, norm = clip_by_global_norm(g, torch.tensor(limit))
    leaf = torch.nn.Parameter(g.clone())
    leaf.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_([leaf], limit)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(clipped, leaf.grad, rtol=1e-5, atol=1e-9)
    assert float(clipped.norm()) <= limit * (1 + 1e-5)
    if float(norm) < limit * (1 - 1e-4):
        assert torch.equal(clipped, g)


def test_clip_of_a_zero_gradient_is_finite():
    clipped, norm = clip_by_global_norm(torch.zeros(12), torch.tensor(0.5))
    assert torch.equal(clipped, torch.zeros(12))
    assert float(norm) == 0.0


@given(seed=st.integers(0, 10_000))
def test_clip_by_group_norm_is_global_norm_of_each_group(seed):
    g, layout = grads_of(seed, 1)[0], params_of(0).layout
    limits = torch.tensor([0.1, 2.0])
    clipped, norms = clip_by_group_norm(g, layout, limits)
    for part, limit, norm, out in zip(g.split(GROUPS), limits, norms, clipped.split(GROUPS), strict=True):
        expected, expected_norm = clip_by_global_norm(part, limit)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(norm, expected_norm)
    one, _ = clip_by_group_norm(g, layout, torch.tensor(0.3))
    same, _ = clip_by_group_norm(g, layout, torch.tensor([0.3, 0.3]))
    assert torch.equal(one, same)


@given(seed=st.integers(0, 10_000), tau=st.floats(0.0, 1.0))
def test_polyak(seed, tau):
    target, online = grads_of(seed, 2)
    torch.testing.assert_close(polyak(target, online, torch.tensor(tau)), (1 - tau) * target + tau * online)
    assert torch.equal(polyak(target, online, torch.tensor(1.0)), online)
    assert torch.equal(polyak(target, online, torch.tensor(0.0)), target)


def test_defaults_and_ranges():
    assert (Adam().b1, Adam().b2, Adam().eps, Adam().decay) == (0.9, 0.999, 1e-5, 0.0)
    assert (RMSProp().decay, RMSProp().eps, SGD().momentum) == (0.99, 1e-5, 0.0)
    for make, bad in (
        (Adam, {"b1": 1.1}),
        (Adam, {"b2": -0.1}),
        (Adam, {"eps": -1e-9}),
        (Adam, {"decay": -1.0}),
        (Adam, {"b1": -0.1}),
        (Adam, {"b2": 1.1}),
        (RMSProp, {"decay": 1.1}),
        (RMSProp, {"decay": -0.1}),
        (RMSProp, {"eps": -1.0}),
        (SGD, {"momentum": 1.1}),
        (SGD, {"momentum": -0.1}),
    ):
        with pytest.raises(ValueError, match="out of range"):
            make(**bad)
    Adam(b1=0.0, b2=0.999999, eps=0.0, decay=0.0)
    Adam(b1=0.999999, b2=0.0)
    RMSProp(decay=0.0, eps=0.0)
    RMSProp(decay=1.0)
    SGD(momentum=1.0)


def test_clipping_a_gradient_as_small_as_its_guard():
    """`limit / (norm + 1e-6)`, as torch's: at a norm of 1e-6 the guard halves."""
    grads, limit = torch.full((12,), 1e-6) / torch.tensor([9.0] * 9 + [3.0] * 3).sqrt(), torch.tensor(1e-6)
    by_group, _ = clip_by_group_norm(grads, params_of(0).layout, limit)
    for start, stop in ((0, 9), (9, 12)):
        leaf = torch.nn.Parameter(torch.zeros(stop - start))
        leaf.grad = grads[start:stop].clone()
        torch.nn.utils.clip_grad_norm_([leaf], 1e-6)
        torch.testing.assert_close(by_group[start:stop], leaf.grad, rtol=1e-4, atol=0.0)
    whole, _ = clip_by_global_norm(grads[:9], limit)
    torch.testing.assert_close(whole, 0.5 * grads[:9], rtol=1e-4, atol=0.0)
