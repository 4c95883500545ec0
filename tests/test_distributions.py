import dataclasses
import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch import distributions as td

from fnrl.distributions import Categorical, Normal, TanhNormal

laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
INF = math.inf


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(seed: int, *shape: int) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(size=shape))


def close(actual: Tensor, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


@st.composite
def masked_logits(draw) -> tuple[Tensor, Tensor]:
    """Logits [4, n] with some choices forbidden, one at least allowed in each row; and which are allowed."""
    rng, n = np.random.default_rng(draw(seeds)), draw(st.integers(1, 6))
    allowed = rng.random((4, n)) < 0.6
    allowed[np.arange(4), rng.integers(n, size=4)] = True
    return tensor(np.where(allowed, rng.normal(scale=3.0, size=(4, n)), -INF)), torch.tensor(allowed)


# Categorical


@laws
@given(seeds, seeds, st.integers(1, 6))
def test_categorical_is_that_of_torch(seed, other_seed, n):
    logits, other = 3.0 * random(seed, 4, 2, n), random(other_seed, 4, 2, n)
    action = torch.tensor(np.random.default_rng(seed).integers(n, size=(4, 2)))
    ours, theirs = Categorical(logits), td.Categorical(logits=logits)
    close(ours.log_prob(action), theirs.log_prob(action))
    close(ours.entropy(), theirs.entropy())
    close(ours.log_probs.exp(), theirs.probs)
    close(ours.kl(Categorical(other)), td.kl_divergence(theirs, td.Categorical(logits=other)))
    assert torch.equal(ours.mode(), theirs.mode)


def test_categorical_by_hand():
    p = Categorical(tensor([[1.0, 2.0, 1.0]]).log() + 7.0)
    close(p.log_prob(torch.tensor([1])), [-math.log(2.0)])
    close(p.log_prob(torch.tensor([2])), [-math.log(4.0)])
    close(p.entropy(), [1.5 * math.log(2.0)])
    close(p.kl(Categorical(torch.zeros(1, 3).double())), [math.log(3.0) - 1.5 * math.log(2.0)])
    assert p.mode().tolist() == [1]
    assert p.mode().dtype == torch.int64
    assert Categorical(tensor([2.0, 5.0, 5.0])).mode().item() == 1


def test_categorical_sample_adds_the_noise_to_the_logits():
    logits = tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    noise = tensor([[0.0, 0.0, 0.0], [0.0, 1.5, 0.0], [2.5, 0.0, 0.0]])
    action = Categorical(logits).sample(noise)
    assert action.tolist() == [2, 1, 0]
    assert action.dtype == torch.int64


def test_categorical_samples_have_their_probabilities():
    rng, count = np.random.default_rng(0), 20_000
    logits = tensor([0.0, 1.0, -1.0, -INF])
    drawn = Categorical(logits.expand(count, 4)).sample(tensor(rng.gumbel(size=(count, 4))))
    frequency = torch.bincount(drawn, minlength=4).double() / count
    close(frequency, torch.softmax(logits, 0), 0.015)
    assert frequency[3] == 0.0


@laws
@given(masked_logits())
def test_forbidden_choices_leave_the_distribution_over_the_rest(drawn):
    logits, allowed = drawn
    whole = Categorical(logits)
    for i, row in enumerate(allowed):
        rest = Categorical(logits[i, row])
        close(whole.entropy()[i], rest.entropy())
        close(whole.log_probs[i, row], rest.log_probs)
    assert (whole.log_probs[~allowed] == -INF).all()
    assert allowed.gather(1, whole.mode().unsqueeze(1)).all()
    wild = torch.where(allowed, -100.0, 100.0)
    assert allowed.gather(1, whole.sample(wild).unsqueeze(1)).all()


@laws
@given(masked_logits())
def test_gradients_with_forbidden_choices_are_finite_and_those_of_the_rest(drawn):
    logits, allowed = drawn
    other = torch.where(allowed, logits.flip(0).nan_to_num(neginf=0.0), -INF)

    def total(x: Tensor, y: Tensor) -> Tensor:
        p = Categorical(x)
        return (p.entropy() + p.kl(Categorical(y)) + 0.3 * p.log_prob(p.mode())).sum()

    whole = torch.func.grad(total, (0, 1))(logits, other)
    for i, row in enumerate(allowed):
        for all_choices, rest in zip(whole, torch.func.grad(total, (0, 1))(logits[i, row], other[i, row]), strict=True):
            close(all_choices[i, row], rest)
            assert (all_choices[i, ~row] == 0.0).all()


def test_kl_is_infinite_where_only_the_other_forbids_and_finite_where_only_this_does():
    free, forbids = Categorical(tensor([0.0, 0.0])), Categorical(tensor([0.0, -INF]))
    assert free.kl(forbids).item() == INF
    close(forbids.kl(free), math.log(2.0))
    close(forbids.kl(forbids), 0.0)
    # A probability that underflows to zero adds nothing, as in torch.
    close(Categorical(tensor([0.0, -1000.0])).kl(forbids), 0.0)


def test_categorical_in_float32_with_large_logits_is_finite():
    p = Categorical(torch.tensor([1e4, 0.0, -1e4]))
    assert p.entropy().item() == 0.0
    assert p.log_prob(torch.tensor(1)).item() == -1e4


# Normal


@laws
@given(seeds, seeds, st.integers(1, 4))
def test_normal_is_that_of_torch(seed, other_seed, size):
    mean, log_std, action, noise = random(seed, 4, 3, 2, size).unbind(0)
    other_mean, other_log_std = random(other_seed, 2, 3, 2, size).unbind(0)
    ours, theirs = Normal(mean, log_std), td.Independent(td.Normal(mean, log_std.exp()), 1)
    other = td.Independent(td.Normal(other_mean, other_log_std.exp()), 1)
    close(ours.log_prob(action), theirs.log_prob(action))
    close(ours.entropy(), theirs.entropy())
    close(ours.kl(Normal(other_mean, other_log_std)), td.kl_divergence(theirs, other), 1e-9)
    close(ours.sample(noise), mean + log_std.exp() * noise)
    assert torch.equal(ours.mode(), mean)


def test_normal_by_hand():
    p = Normal(tensor([[1.0, 0.0]]), tensor([[0.0, math.log(2.0)]]))
    close(p.log_prob(tensor([[1.0, 0.0]])), [-math.log(2 * math.pi) - math.log(2.0)])
    close(p.log_prob(tensor([[2.0, 4.0]])), [-math.log(2 * math.pi) - math.log(2.0) - 0.5 - 2.0])
    close(p.entropy(), [math.log(2 * math.pi) + 1.0 + math.log(2.0)])
    close(p.kl(Normal(tensor([[3.0, 0.0]]), tensor([[0.0, math.log(2.0)]]))), [2.0])
    close(p.sample(tensor([[1.0, -1.0]])), [[2.0, -2.0]])


@laws
@given(seeds)
def test_a_log_std_without_batch_axes_holds_for_every_mean(seed):
    mean, other, action, noise = random(seed, 4, 5, 3).unbind(0)
    (log_std,) = random(seed, 1, 3).unbind(0)
    short, full = Normal(mean, log_std), Normal(mean, log_std.expand(5, 3))
    assert torch.equal(short.log_prob(action), full.log_prob(action))
    assert torch.equal(short.entropy(), full.entropy())
    assert short.entropy().shape == (5,)
    assert torch.equal(short.sample(noise), full.sample(noise))
    assert torch.equal(short.kl(Normal(other, log_std)), full.kl(Normal(other, log_std.expand(5, 3))))


@laws
@given(seeds, st.floats(-1e-4, 1e-4))
def test_normal_kl_is_never_negative_in_float32(seed, step):
    mean, log_std = random(seed, 2, 4).float().unbind(0)
    assert Normal(mean, log_std).kl(Normal(mean, log_std + step)).item() >= 0.0
    assert Normal(mean, log_std).kl(Normal(mean, log_std)).item() == 0.0


# Transforms: every method, everywhere it must run


# TanhNormal


@laws
@given(seeds, st.integers(1, 5))
def test_tanh_normal_is_that_of_torch(seed, size):
    mean, log_std, noise = random(seed, 4, size), random(seed + 1, 4, size).clamp(-2, 1), random(seed + 2, 4, size)
    ours = TanhNormal(mean, log_std)
    theirs = td.TransformedDistribution(td.Normal(mean, log_std.exp()), td.TanhTransform(cache_size=1))
    action, logp = ours.sample_and_log_prob(noise)
    close(action, torch.tanh(mean + log_std.exp() * noise))
    close(ours.sample(noise), action)
    close(ours.mode(), torch.tanh(mean))
    inner = mean + log_std.exp() * noise
    close(logp, (td.Normal(mean, log_std.exp()).log_prob(inner) - torch.log1p(-action.square())).sum(-1), 1e-5)
    close(logp, theirs.log_prob(theirs.transforms[0](inner)).sum(-1), 1e-8)


def test_tanh_normal_density_integrates_to_one():
    u = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    p = TanhNormal(tensor([0.3]).expand_as(u), tensor([-0.2]))
    a, logp = p.sample_and_log_prob((u - 0.3) / math.exp(-0.2))
    close(torch.trapezoid(logp.exp(), a[:, 0]), 1.0, 1e-4)


def test_tanh_normal_is_finite_at_the_edge_in_float32():
    mean = torch.tensor([[40.0], [-40.0], [12.0]], requires_grad=True)
    action, logp = TanhNormal(mean, torch.zeros(3, 1)).sample_and_log_prob(torch.zeros(3, 1))
    assert action.flatten().tolist() == [1.0, -1.0, 1.0]
    assert bool(torch.isfinite(logp).all())
    (grad,) = torch.autograd.grad(logp.sum(), mean)
    torch.testing.assert_close(grad, torch.tensor([[2.0], [-2.0], [2.0]]), rtol=1e-4, atol=0.0)


def categorical(logits: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    p, q = Categorical(logits), Categorical(noise)
    return p.log_prob(action), p.entropy(), p.kl(q), p.mode(), p.sample(noise)


def normal(mean: Tensor, log_std: Tensor, action: Tensor) -> tuple[Tensor, ...]:
    p, q = Normal(mean, log_std), Normal(action, mean)
    return p.log_prob(action), p.entropy(), p.kl(q), p.mode(), p.sample(action)


def tanh_normal(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    p = TanhNormal(mean, log_std)
    return p.mode(), p.sample(noise), *p.sample_and_log_prob(noise)


CASES = {
    tanh_normal: lambda *lanes: tuple(random(i, *lanes, 6, 3) for i in range(3)),
    categorical: lambda *lanes: (
        random(0, *lanes, 6, 3),
        torch.arange(6).expand(*lanes, 6) % 3,
        random(1, *lanes, 6, 3),
    ),
    normal: lambda *lanes: tuple(random(i, *lanes, 6, 3) for i in range(3)),
}
case = pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)


@case
def test_lanes_equal_solo_runs_and_do_not_depend_on_their_number(function):
    arrays = CASES[function](5)
    five, two = torch.func.vmap(function)(*arrays), torch.func.vmap(function)(*(x[:2] for x in arrays))
    assert all(torch.equal(a[:2], b) for a, b in zip(five, two, strict=True))
    for i in range(5):
        for a, b in zip(five, function(*(x[i] for x in arrays)), strict=True):
            torch.testing.assert_close(a[i], b)


@case
def test_compiled_equals_eager(function):
    torch.compiler.reset()
    arrays = CASES[function]()
    for a, b in zip(
        torch.compile(function, backend="aot_eager", fullgraph=True)(*arrays), function(*arrays), strict=True
    ):
        torch.testing.assert_close(a, b)


@case
def test_runs_on_the_meta_device(function):
    # No value is read (no .item(), no shape that depends on data), and nothing is made on another device.
    assert all(x.is_meta and x.shape[0] == 6 for x in function(*(x.to("meta") for x in CASES[function]())))


@case
def test_keeps_the_dtype_and_leaves_the_inputs_alone(function):
    for dtype in (torch.float32, torch.float64):
        arrays = [x.to(dtype) if x.is_floating_point() else x for x in CASES[function]()]
        copies = [x.clone() for x in arrays]
        assert {x.dtype for x in function(*arrays)} <= {dtype, torch.int64}
        assert all(torch.equal(a, b) for a, b in zip(arrays, copies, strict=True))


@case
def test_gradients_are_right(function):
    arrays = [x.requires_grad_() if x.is_floating_point() else x for x in CASES[function]()]
    assert torch.autograd.gradcheck(lambda *a: [y for y in function(*a) if y.requires_grad], arrays)


def test_distributions_are_immutable():
    for value in (Categorical(torch.zeros(2)), Normal(torch.zeros(2), torch.zeros(2))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, torch.ones(2))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # gather and broadcasting would let all of these pass
        (
            lambda: Categorical(torch.zeros(5, 3)).log_prob(torch.zeros(4).long()),
            r"action has shape (4,), expected (5,)",
        ),
        (lambda: Categorical(torch.zeros(5, 3)).sample(torch.zeros(3)), r"noise has shape (3,), expected (5, 3)"),
        (
            lambda: Normal(torch.zeros(5, 1), torch.zeros(1)).log_prob(torch.zeros(5)),
            r"action has shape (5,), expected (5, 1)",
        ),
        (
            lambda: Normal(torch.zeros(5, 1), torch.zeros(1)).sample(torch.zeros(5)),
            r"noise has shape (5,), expected (5, 1)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
