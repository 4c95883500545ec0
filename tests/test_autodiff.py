"""One gradient, by whichever of torch's ways is cheapest where it is asked for."""

import pytest
import torch

from fnrl.autodiff import value_and_grad


def cubes(x):
    return (x**3).sum(), {"largest": x.max()}


def test_alone_and_in_lanes():
    x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    (loss, aux), grads = value_and_grad(cubes)(x)
    assert (float(loss), float(aux["largest"])) == (-6.875, 1.0)
    assert grads.tolist() == [3.0, 12.0, 0.75]
    assert not any(y.requires_grad for y in (loss, aux["largest"], grads))
    lanes = torch.stack([x.detach(), 2.0 * x.detach()])
    (losses, _), both = torch.func.vmap(value_and_grad(cubes))(lanes)
    assert losses.tolist() == [-6.875, -55.0]
    assert both.tolist() == [[3.0, 12.0, 0.75], [12.0, 48.0, 3.0]]


@pytest.mark.parametrize("lanes", [False, True])
def test_a_gradient_of_a_gradient_is_the_second_derivative(lanes):
    """As a learner of hyper-parameters takes it, through an update."""

    def through(x):
        (_, _), grads = value_and_grad(cubes)(x)
        return grads.sum()

    second, x = torch.func.grad(through), torch.tensor([1.0, -2.0, 0.5])
    found = torch.func.vmap(second)(torch.stack([x, x]))[1] if lanes else second(x)
    assert found.tolist() == [6.0, -12.0, 3.0]
