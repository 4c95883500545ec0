import inspect
import math
import re

import hypothesis.strategies as st
import numpy as np
import optax
import pytest
import rlax
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fnrl.losses import (
    approx_kl,
    clip_fraction,
    clipped_value_loss,
    explained_variance,
    huber,
    normalise,
    policy_gradient,
    ppo_surrogate,
    value_loss,
)

laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)
numbers = st.floats(-3.0, 3.0)
clips = st.floats(0.05, 0.9)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def samples(seed: int = 0, shape: tuple[int, ...] = (4, 3), dtype=torch.float64, count: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=shape), dtype=dtype) for _ in range(count)]


# The policy's losses


@laws
@given(numbers, clips)
def test_huber_is_that_of_torch_and_optax(error, delta):
    expected = torch.nn.functional.huber_loss(tensor(error), tensor(0.0), delta=delta)
    close(huber(tensor(error), delta), expected[None])
    assert float(huber(tensor(error))) == pytest.approx(float(optax.huber_loss(np.float32(error))), rel=1e-5, abs=1e-9)
    x = tensor(error).requires_grad_()
    (grad,) = torch.autograd.grad(huber(x, delta).sum(), x)
    close(grad, [min(max(error, -delta), delta)])


@laws
@given(numbers, numbers, numbers, clips)
def test_ppo_surrogate_is_equation_7(logp, old_logp, advantage, clip):
    ratio = math.exp(logp - old_logp)
    expected = -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    close(ppo_surrogate(tensor(logp), tensor(old_logp), tensor(advantage), clip), [expected])


def test_ppo_surrogate_is_that_of_rlax():
    logp, old_logp, advantage = samples(0, (64,), torch.float32)
    ratio = np.exp(logp.numpy() - old_logp.numpy())
    expected = rlax.clipped_surrogate_pg_loss(ratio, advantage.numpy(), 0.2)
    close(ppo_surrogate(logp, old_logp, advantage, 0.2).mean(), float(expected), 1e-5)


def test_ppo_surrogate_by_hand_and_where_its_gradient_is_cut():
    # Columns: advantage +1 then -1, each at ratio 2, 1/2 and 1. The gradient in logp is -advantage * ratio, or nothing.
    logp = tensor(*2 * (math.log(2.0), math.log(0.5), 0.0)).requires_grad_()
    advantage = tensor(1.0, 1.0, 1.0, -1.0, -1.0, -1.0)
    loss = ppo_surrogate(logp, torch.zeros_like(logp), advantage, 0.2)
    close(loss, [-1.2, -0.5, -1.0, 2.0, 0.8, 1.0])
    close(torch.autograd.grad(loss.sum(), logp)[0], [0.0, -0.5, -1.0, 2.0, 0.0, 1.0])


def test_ppo_surrogate_at_equal_policies_has_the_gradient_of_the_policy_gradient():
    logp, _, advantage = samples()
    logp.requires_grad_()
    (ours,) = torch.autograd.grad(ppo_surrogate(logp, logp.detach(), advantage, 0.2).sum(), logp)
    (reinforce,) = torch.autograd.grad(policy_gradient(logp, advantage).sum(), logp)
    close(ours, reinforce)


def test_policy_gradient_by_hand_and_as_in_rlax():
    close(policy_gradient(tensor(-2.0, -0.5), tensor(3.0, -4.0)), [6.0, -2.0])
    (logits,) = samples(0, (5, 3), torch.float32, 1)
    action, advantage = torch.tensor([0, 2, 1, 1, 0]), torch.arange(5.0) - 2.0
    expected = rlax.policy_gradient_loss(logits.numpy(), action.numpy(), advantage.numpy(), np.ones(5, np.float32))
    close(policy_gradient(Categorical(logits=logits).log_prob(action), advantage).mean(), float(expected), 1e-5)


# The value's losses


def test_value_loss_is_half_the_square():
    close(value_loss(tensor(1.0, 5.0, 2.0), tensor(3.0, 2.0, 2.0)), [2.0, 4.5, 0.0])
    value, target, _ = samples(dtype=torch.float32)
    close(value_loss(value, target), np.array(optax.l2_loss(value.numpy(), target.numpy())), 1e-6)


@laws
@given(numbers, numbers, numbers, clips)
def test_clipped_value_loss_is_the_larger_of_the_two(value, old, target, clip):
    clipped = old + min(max(value - old, -clip), clip)
    expected = 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    close(clipped_value_loss(tensor(value), tensor(old), tensor(target), clip), [expected])


def test_clipped_value_loss_by_hand():
    # A move of +3 or -3 clipped to 1: the clipped value decides where it is further from the target.
    value, old = tensor(3.0, 3.0, -3.0, -3.0, 0.5), tensor(0.0, 0.0, 0.0, 0.0, 0.0)
    target = tensor(5.0, -1.0, -5.0, 1.0, 2.5)
    close(clipped_value_loss(value, old, target, 1.0), [8.0, 8.0, 8.0, 8.0, 2.0])


# Diagnostics


@laws
@given(st.lists(numbers, min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_approx_kl_is_unbiased(logits, seed):
    # The estimate's expectation under the old policy, summed over every action, is the divergence itself.
    old, new = Categorical(logits=tensor(*logits)), Categorical(logits=samples(seed, (len(logits),))[0])
    expectation = (old.probs * approx_kl(new.logits, old.logits)).sum()
    close(expectation, kl_divergence(old, new), 1e-9)


@laws
@given(st.floats(-80.0, 80.0, width=32))
def test_approx_kl_is_never_negative_in_float32(log_ratio):
    kl = approx_kl(torch.tensor([log_ratio]), torch.zeros(1)).item()
    assert kl > 0.0 if abs(log_ratio) > 1e-3 else kl >= 0.0


def test_approx_kl_by_hand_also_near_zero_in_float32():
    close(approx_kl(tensor(math.log(3.0), -1.0), tensor(0.0, -1.0)), [2.0 - math.log(3.0), 0.0])
    torch.testing.assert_close(
        approx_kl(torch.tensor([1e-3]), torch.zeros(1)), torch.tensor([5.00167e-7]), rtol=1e-3, atol=0
    )


def test_clip_fraction_counts_ratios_strictly_outside():
    logp = tensor(*(math.log(r) for r in (0.79, 0.81, 1.0, 1.19, 1.21)))
    old = torch.zeros(5, dtype=torch.float64)
    assert clip_fraction(logp, old, 0.2).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert clip_fraction(logp, old, 0.0).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert clip_fraction(old, logp, 0.2).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


@laws
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), numbers, st.floats(0.1, 10.0))
def test_normalise_gives_zero_mean_and_unit_biased_deviation_in_any_units(seed, size, shift, scale):
    (x,) = samples(seed, (size,), count=1)
    y = normalise(x)
    close(y, (x.numpy() - x.numpy().mean()) / x.numpy().std(), 1e-6)
    close(y.mean(), 0.0)
    close(y.std(correction=0), 1.0, 1e-6)
    close(normalise(scale * x + shift), y, 1e-6)


def test_normalise_takes_all_elements_together():
    (x,) = samples(0, (4, 3), count=1)
    close(normalise(x), normalise(x.flatten()).reshape(4, 3))
    assert abs(normalise(x)[0].mean()) > 0.1


def test_eps_is_a_deviation_added_in_quadrature():
    close(normalise(tensor(-3.0, 3.0), eps=4.0), [-0.6, 0.6])
    close(normalise(tensor(-3e-8, 3e-8), eps=4e-8), [-0.6, 0.6])
    close(normalise(tensor(-1e-8, 1e-8)), [-math.sqrt(0.5), math.sqrt(0.5)])
    assert inspect.signature(normalise).parameters["eps"].default == 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [[3.0], [0.5] * 8, [0.0, 0.0], [[-2.0], [-2.0]]])
def test_normalise_maps_equal_elements_to_zero_with_finite_gradients(x, dtype):
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    y = normalise(x)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).sum(), x)[0].isfinite().all()


def test_explained_variance_by_hand():
    target = tensor(1.0, 2.0, 3.0, 6.0)
    close(explained_variance(target, target), 1.0)
    close(explained_variance(target + 5.0, target), 1.0)
    close(explained_variance(torch.full_like(target, 2.0), target), 0.0)
    close(explained_variance(-target, target), -3.0)
    close(explained_variance(tensor(0.0, 1.0), tensor(0.0, 2.0)), 0.75)
    close(explained_variance(tensor(0.0, 2.0).reshape(2, 1), tensor(0.0, 1.0).reshape(2, 1)), 0.0)
    assert explained_variance(target, target).shape == ()


@pytest.mark.parametrize("target", [[3.0], [0.1] * 7, [0.0, 0.0]])
def test_explained_variance_of_constant_targets_is_zero_with_finite_gradients(target):
    target = torch.tensor(target)
    value = torch.arange(float(len(target)), requires_grad=True)
    result = explained_variance(value, target)
    assert result.item() == 0.0
    assert torch.autograd.grad(result, value)[0].isfinite().all()


# Defects of NAPPO 0.0.44


def test_nappo_16_normalised_advantages_count_every_sample_once_and_no_other():
    # NAPPO's mean and deviation took in the corrupted slot 0, and rows left over from the rollout before.
    buffer = tensor(100.0, 1.0, 2.0, 3.0, 4.0, -999.0)
    collected = buffer[1:5]
    close(normalise(collected), tensor(-3.0, -1.0, 1.0, 3.0) / math.sqrt(5.0), 1e-9)
    for shift in range(4):  # slot 0 is a sample as any other
        close(normalise(collected.roll(shift)), normalise(collected).roll(shift))


# Transforms: every function, everywhere it must run


def every_function(clip: float | Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return (
        ppo_surrogate(x, y, z, clip),
        policy_gradient(x, y),
        value_loss(x, y),
        clipped_value_loss(x, y, z, clip),
        approx_kl(x, y),
        clip_fraction(x, y, clip),
        normalise(x),
        huber(3.0 * x),
        explained_variance(x, y),
    )


def test_lanes_equal_solo_runs_and_do_not_depend_on_their_number():
    arrays, clip = samples(0, (5, 37, 3), torch.float32), torch.linspace(0.1, 0.5, 5)
    lanes = torch.func.vmap(every_function)
    five, two = lanes(clip, *arrays), lanes(clip[:2], *(x[:2] for x in arrays))
    assert all(torch.equal(a[:2], b) for a, b in zip(five, two, strict=True))
    for i in range(5):
        for a, b in zip(five, every_function(clip[i], *(x[i] for x in arrays)), strict=True):
            torch.testing.assert_close(a[i], b)


def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(every_function, backend="aot_eager", fullgraph=True)
    arrays = samples(dtype=torch.float32)
    for clip in (0.2, torch.tensor(0.2)):
        for a, b in zip(compiled(clip, *arrays), every_function(clip, *arrays), strict=True):
            torch.testing.assert_close(a, b)


def test_runs_on_the_meta_device():
    # No value is read (no .item(), no shape that depends on data), and nothing is made on another device.
    results = every_function(0.2, *(x.to("meta") for x in samples()))
    assert all(x.is_meta for x in results)
    assert [tuple(x.shape) for x in results] == [(4, 3)] * 8 + [()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_and_leaves_the_inputs_alone(dtype):
    arrays, copies = samples(dtype=dtype), samples(dtype=dtype)
    for clip in (0.2, torch.tensor(0.2, dtype=torch.float64)):
        assert {x.dtype for x in every_function(clip, *arrays)} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(arrays, copies, strict=True))


def test_gradients_are_right():
    inputs = [x.requires_grad_() for x in (torch.tensor(0.2, dtype=torch.float64), *samples())]
    assert torch.autograd.gradcheck(lambda *a: [y for y in every_function(*a) if y.requires_grad], inputs)


# Errors

ORDER = {
    ppo_surrogate: ("logp", "old_logp", "advantage"),
    policy_gradient: ("logp", "advantage"),
    value_loss: ("value", "target"),
    clipped_value_loss: ("value", "old_value", "target"),
    approx_kl: ("logp", "old_logp"),
    clip_fraction: ("logp", "old_logp"),
    explained_variance: ("value", "target"),
}


@pytest.mark.parametrize(("function", "wrong"), [(f, wrong) for f, order in ORDER.items() for wrong in order])
def test_shapes_that_would_broadcast_are_refused_by_name(function, wrong):
    order = ORDER[function]
    arrays = {k: torch.zeros(3, 1) if k == wrong else torch.zeros(3) for k in order}
    message = f"{wrong} has shape (3, 1), expected (3,), the shape of {order[0]}"
    if wrong == order[0]:
        message = f"{order[1]} has shape (3,), expected (3, 1), the shape of {order[0]}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**arrays, **({"clip": 0.2} if "clip" in inspect.signature(function).parameters else {}))
