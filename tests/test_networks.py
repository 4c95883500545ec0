"""Networks against torch's modules with the same weights, and NAPPO's defects of networks as regression tests."""

import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnrl
from fnrl import random, tree
from fnrl.networks import GRU, linear, orthogonal
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.types import Params

DISCRETE = EnvSpec("d", Box((5,)), Discrete(3))
BOX = EnvSpec("b", Box((5,)), Box((2,), -2.0, 2.0))


def test_mlp_is_a_stack_of_linear_layers():
    net = fnrl.MLP((7, 6), torch.relu)
    tensors = net.init(random.key(0), (5,))
    layers = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU())
    layers.load_state_dict({f"{2 * int(n[0])}{n[1:]}": v for n, v in tensors.items()})
    x = random.normal(random.key(1), (4, 3, 5))
    torch.testing.assert_close(net.apply(tensors, x), layers(x))
    assert net.width((5,)) == 6
    assert fnrl.MLP(()).width((5,)) == 5


def test_cnn_is_nature():
    net = fnrl.CNN(hidden=32)
    tensors = net.init(random.key(0), (36, 40, 4))
    conv = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
    layers = nn.Sequential(*conv, nn.Flatten(), nn.LazyLinear(32), nn.ReLU())
    image = random.uniform(random.key(1), (6, 36, 40, 4))
    layers(image.movedim(-1, 1))
    names = {"0": "0", "1": "2", "2": "4", "3": "7"}
    layers.load_state_dict({names[n[0]] + n[1:]: v for n, v in tensors.items()})
    out = net.apply(tensors, image.reshape(2, 3, 36, 40, 4))
    torch.testing.assert_close(out.reshape(6, 32), layers(image.movedim(-1, 1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(fnrl.CompositionError, match="too small for kernels"):
        net.init(random.key(0), (8, 8, 3))


def test_gru_is_torch_grucell():
    net = GRU(6)
    tensors = net.init(random.key(0), 5)
    cell = nn.GRUCell(5, 6)
    names = {"x.weight": "weight_ih", "h.weight": "weight_hh", "x.bias": "bias_ih", "h.bias": "bias_hh"}
    noisy = {n: v + 0.1 * random.normal(random.key(i), tuple(v.shape)) for i, (n, v) in enumerate(tensors.items())}
    cell.load_state_dict({names[n]: v for n, v in noisy.items()})
    x, memory = random.normal(random.key(8), (4, 5)), random.normal(random.key(9), (4, 6))
    torch.testing.assert_close(net.apply(noisy, x, memory), cell(x, memory), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (7, 4), (5, 5), (1, 3)])
def test_orthogonal(rows, columns):
    w = orthogonal(random.key(3), rows, columns, 2.0).double() / 2.0
    small = w @ w.T if rows <= columns else w.T @ w
    torch.testing.assert_close(small, torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-6)
    assert not torch.equal(w, orthogonal(random.key(4), rows, columns, 2.0).double() / 2.0)


def test_gains_are_those_declared():
    """NAPPO 4.1.7: weights were initialised twice, the second time without the gain."""
    params = fnrl.OnPolicyActorCritic(DISCRETE).init(random.key(0))
    gain = {
        "policy.0.weight": math.sqrt(2),
        "policy.1.weight": math.sqrt(2),
        "policy.head.weight": 0.01,
        "value.1.weight": math.sqrt(2),
        "value.head.weight": 1.0,
    }
    for name, expected in gain.items():
        values = torch.linalg.svdvals(params[name])
        torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-4, atol=0.0)
    assert not any(params[n].any() for n in params.layout.names if n.endswith("bias"))
    linear_gain = torch.linalg.svdvals(linear(random.key(1), 5, 3, 0.3)["weight"])
    torch.testing.assert_close(linear_gain, torch.full((3,), 0.3), rtol=1e-4, atol=0.0)


class Own(nn.Module):
    """A user's network."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, width), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_module_is_the_users_own_forward():
    net = fnrl.module(Own, width=9)
    tensors = net.init(random.key(0), (5,))
    own = Own(9)
    own.load_state_dict(tensors)
    x = random.normal(random.key(1), (2, 4, 5))
    assert torch.equal(net.apply(tensors, x), own(x))
    assert net.width((5,)) == 9
    assert net == fnrl.module(Own, width=9)
    again, other = net.init(random.key(0), (5,)), net.init(random.key(1), (5,))
    assert all(torch.equal(again[n], v) for n, v in tensors.items())
    assert not torch.equal(other["layers.1.weight"], tensors["layers.1.weight"])
    before = torch.random.get_rng_state()
    net.init(random.key(2), (5,))
    assert torch.equal(before, torch.random.get_rng_state())
    actor = fnrl.OnPolicyActorCritic(DISCRETE, policy=net, value=net)
    parameters = actor.init(random.key(0))
    lanes = torch.stack([actor.init(random.key(i)).vector for i in range(2)])
    logits = torch.func.vmap(lambda v: actor.act(Params(v, parameters.layout), x[0], actor.memory(4), None)[2])(lanes)
    assert logits.shape == (2, 4)


ACTIVATIONS = [
    torch.sigmoid,
    F.silu,
    F.softplus,
    F.mish,
    F.elu,
    F.celu,
    F.selu,
    F.gelu,
    F.leaky_relu,
    torch.tanh,
    F.relu,
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_an_activation_rounds_alike_wherever_a_lane_lies(activation):
    net = fnrl.MLP((37,), activation)
    x = 3.0 * random.normal(random.key(1), (5,))
    lanes = [net.init(random.key(i), (5,)) for i in range(8)]

    def output_and_gradient(tensors):
        grad, y = torch.func.grad_and_value(lambda t: net.apply(t, x).cos().sum())(tensors)
        return net.apply(tensors, x), y, grad["0.weight"], grad["0.bias"]

    def stacked(some):
        stack = {n: torch.stack([tensors[n] for tensors in some]) for n in some[0]}
        return torch.func.vmap(output_and_gradient)(stack)

    eight = stacked(lanes)
    for begin in (0, 1, 5):
        for found, expected in zip(stacked(lanes[begin : begin + 3]), eight, strict=True):
            assert torch.equal(found, expected[begin : begin + 3])
    torch.testing.assert_close(
        eight[0],
        torch.stack([activation(F.linear(x, t["0.weight"], t["0.bias"])) for t in lanes]),
        rtol=1e-5,
        atol=2e-6,
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.RReLU()


class Attentive(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 1, dropout=dropout, batch_first=True)

    def forward(self, x):
        x = x[..., None].expand(*x.shape, 4)
        return self.attend(x, x, x)[0].flatten(1)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(5, 5)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Normed, r"Normed.norm is a BatchNorm1d, which hides"),
        (Dropped, r"Dropped.drop is a Dropout, which hides"),
        (Random, r"Random.relu is a RReLU, which hides"),
        (Attentive, r"Attentive.attend is a MultiheadAttention, which hides"),
        (Functional, r"Functional draws random numbers as it is called"),
        (Recurrent, r"Recurrent.cell is a GRU"),
        (Buffered, r"Buffered has buffers"),
    ],
)
def test_hidden_state_and_hidden_randomness_are_refused(cls, message):
    with pytest.raises(fnrl.CompositionError, match=message):
        fnrl.OnPolicyActorCritic(DISCRETE, policy=fnrl.module(cls))


def test_modules_that_draw_nothing_are_taken_and_ship():
    actor = fnrl.OnPolicyActorCritic(DISCRETE, policy=fnrl.module(Attentive, dropout=0.0))
    there = pickle.loads(pickle.dumps(actor))
    assert there == actor
    assert there.policy.widths == actor.policy.widths  # found here: in a graph or a transform it can't be


def test_a_module_that_does_not_take_the_observation_is_refused():
    with pytest.raises(fnrl.CompositionError, match=r"Own does not take observations of shape \(3,\)"):
        fnrl.OnPolicyActorCritic(EnvSpec("x", Box((3,)), Discrete(2)), policy=fnrl.module(Own))


@pytest.mark.parametrize("spec", [DISCRETE, BOX])
@pytest.mark.parametrize("torso", [None, fnrl.MLP((8,))])
def test_recurrent_policies_recur_and_acting_agrees_with_evaluating(spec, torso):
    """NAPPO 4.1.3: the memory was always zero when acting, so old and new logp disagreed."""
    actor = fnrl.OnPolicyActorCritic(spec, fnrl.MLP((8,)), fnrl.MLP((8,)), torso, GRU(6))
    params = actor.init(random.key(0))
    params = Params(params.vector + 0.3 * random.normal(random.key(1), tuple(params.vector.shape)), params.layout)
    steps, n = 6, 3
    obs = random.normal(random.key(2), (steps, n, 5))
    done = random.uniform(random.key(3), (steps, n)) < 0.3
    assert done[:-1].any()
    noise, memory = actor.noise(random.key(4), steps, n), random.normal(random.key(5), (n, 6))
    first, actions, logps = memory, [], []
    for t in range(steps):
        action, _, logp, after = actor.act(params, obs[t], memory, tree.index(noise, t))
        assert not torch.equal(after, memory)
        memory = torch.where(done[t][:, None], 0.0, after)
        actions.append(action)
        logps.append(logp)
    starts = torch.cat([torch.zeros(1, n, dtype=torch.bool), done[:-1]])
    logp, _, _, memories = actor.evaluate(params, obs, first, starts, torch.stack(actions))
    torch.testing.assert_close(logp, torch.stack(logps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.where(done[-1][:, None], 0.0, memories[-1]), memory, rtol=1e-5, atol=1e-6)
    blank, _, _, _ = actor.evaluate(params, obs, torch.zeros_like(first), starts, torch.stack(actions))
    assert not torch.allclose(blank, logp)  # what was remembered matters


def test_a_density_that_is_ready_before_acting_is_that_of_the_action():
    actor = fnrl.OnPolicyActorCritic(BOX, log_std=-0.7)
    params, obs, memory = actor.init(random.key(0)), random.normal(random.key(2), (7, 5)), actor.memory(7)
    noise = tree.index(actor.noise(random.key(4), 2, 7), 1)
    action, sent, logp, _ = actor.act(params, obs, memory, noise)
    plain = actor.act(params, obs, memory, noise.z)
    assert tree.same_bits((action, sent), plain[:2])
    torch.testing.assert_close(logp, plain[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise.logp, torch.distributions.Normal(0.0, 1.0).log_prob(noise.z).sum(-1))
    learning = Params(params.vector.clone().requires_grad_(), params.layout)
    for _ in range(2):  # nothing is kept that a backward pass has freed
        actor.act(learning, obs, memory, noise)[0].sum().backward()


@pytest.mark.parametrize("algo", [fnrl.PPO(minibatches=1, entropy_coef=0.01), fnrl.A2C(entropy_coef=0.01)])
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_parameter_learns(algo, recurrent):
    """NAPPO 4.1.6: VPG optimised the policy's body and left the action head as it was born."""
    env = fnrl.envs.CartPole(num_envs=4)
    small = fnrl.MLP((8,))
    actor = fnrl.OnPolicyActorCritic(env.spec, small, small, small, GRU(6) if recurrent else None)
    parts = fnrl.Parts(env, actor, algo, fnrl.GAE(steps=16))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.key(0))
    after, _ = scheme.step(state, updates=2)
    old, new = state.weights.params, after.weights.params
    assert [n for n in old.layout.names if torch.equal(old[n], new[n])] == []


def test_box_actions_are_scaled_to_their_bounds():
    for space, action, expected in (
        (Box((2,), -2.0, 2.0), [[0.5, -3.0]], [[1.0, -2.0]]),
        (Box((2,), (0.0, -1.0), (10.0, 1.0)), [[0.0, 2.0]], [[5.0, 1.0]]),
        (Box((2,), -1.0, 1.0), [[0.3, 1.5]], [[0.3, 1.0]]),
        (Box((2,)), [[7.0, -9.0]], [[7.0, -9.0]]),
        (Box((3,), 0.0, 10.0, "int64"), [[0.39, 0.41, 0.99]], [[7.0, 7.0, 10.0]]),
        (Box((2,), -math.inf, math.inf, "int32"), [[1.6, -1.6]], [[2.0, -2.0]]),
    ):
        actor = fnrl.OnPolicyActorCritic(dataclasses.replace(BOX, action=space))
        torch.testing.assert_close(actor.env_action(torch.tensor(action)), torch.tensor(expected))
    matrix = fnrl.OnPolicyActorCritic(dataclasses.replace(BOX, action=Box((2, 3), -1.0, 1.0)))
    assert matrix.env_action(torch.zeros(4, 6)).shape == (4, 2, 3)
    scalar = fnrl.OnPolicyActorCritic(dataclasses.replace(BOX, action=Box((), -1.0, 1.0)))
    assert scalar.env_action(torch.zeros(4, 1)).shape == (4,)
    free = fnrl.OnPolicyActorCritic(dataclasses.replace(BOX, action=Box((2, 3))))
    assert free.env_action(torch.zeros(4, 6)).shape == (4, 2, 3)
    shifted = fnrl.OnPolicyActorCritic(dataclasses.replace(BOX, action=Discrete(3, 5)))
    assert shifted.env_action(torch.tensor([0, 2])).tolist() == [5, 7]


@pytest.mark.parametrize("obs", [Discrete(4), Box((36, 36, 3), 0.0, 255.0, "uint8"), Box(()), Box((2, 3))])
def test_observations_of_every_kind(obs):
    image = isinstance(obs, Box) and len(obs.shape) == 3
    net = fnrl.CNN(hidden=16) if image else fnrl.MLP((8,))
    for policy, value in ((net, net), (net, fnrl.MLP((8,)))):
        actor = fnrl.OnPolicyActorCritic(EnvSpec("x", obs, Discrete(2)), policy, value)
        params = actor.init(random.key(0))
        if isinstance(obs, Discrete):
            x = torch.tensor([0, 3, 1])
        else:
            x = (255 * random.uniform(random.key(1), (3, *obs.shape))).to(obs.stored)
        action, _, logp, _ = actor.act(params, x, actor.memory(3), tree.index(actor.noise(random.key(2), 1, 3), 0))
        assert action.shape == logp.shape == (3,)
        v, _ = actor.values(params, x[None], actor.memory(3), torch.zeros(1, 3, dtype=torch.bool))
        assert v.shape == (1, 3)


def test_a_scaled_action_never_steps_over_its_bounds():
    bounds = 50.0 * random.normal(random.key(0), (500, 2))
    low, high = bounds.amin(1), bounds.amax(1)
    space = Box((500,), tuple(low.tolist()), tuple(high.tolist()))
    actor = fnrl.OnPolicyActorCritic(EnvSpec("bounds", Box((5,)), space))
    for a in (-1.0, 1.0, 3.0):
        action = actor.env_action(torch.full((1, 500), a))[0]
        assert bool(((action >= low) & (action <= high)).all())
