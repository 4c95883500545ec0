"""Compiled graphs compute what eager methods do, whatever they are given, and no compiler is no disaster."""

import math
import warnings

import pytest
import torch

import fnrl
from fnrl import graphs, tree
from fnrl.spaces import Box, EnvSpec
from fnrl.testing import probes
from fnrl.types import OffPolicyBatch, Params, Weights


def made(f, *xs):
    graph = graphs.compiled(f, xs)
    assert graph is not None
    return graph


def test_a_graph_leaves_alone_what_it_does_not_compute():
    def f(a, b, unused):
        c = a @ b
        return b, c, c, a

    a, b, unused = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(2)
    out = made(f, a, b, unused)([a, b, unused])
    assert out[0] is b
    assert out[3] is a
    for c in out[1:3]:
        torch.testing.assert_close(c, a @ b)


def test_inputs_of_other_strides_are_no_other_inputs():
    a, b = torch.randn(6, 4), torch.randn(4, 5)
    graph = made(lambda a, b: (torch.tanh(a) @ b,), a, b)
    (out,) = graph([a.T.contiguous().T, b.T.contiguous().T])
    torch.testing.assert_close(out, torch.tanh(a) @ b)


def test_inputs_that_were_the_same_tensor_need_not_stay_so():
    a, b = torch.randn(3), torch.randn(3)
    (out,) = made(lambda a, b: (a - 2.0 * b,), a, a)([a, b])
    torch.testing.assert_close(out, a - 2.0 * b)


def test_a_compiled_target_is_followed_and_is_not_the_parameters():
    env, net = probes.ActionReward(num_envs=4, continuous=True), fnrl.MLP((8,))
    parts = fnrl.Parts(
        env, fnrl.OffPolicyActorCritic(env.spec, net, net), fnrl.SAC(batch=8, lr=0.01), fnrl.Replay(64, warmup=8)
    )
    topology = fnrl.centralised(fnrl.gradients(fnrl.collect))
    eager, compiled = (fnrl.Scheme(parts, topology, compile=x) for x in (False, True))
    a, _ = eager.step(eager.init(fnrl.key(0)), 12)
    b, _ = compiled.step(compiled.init(fnrl.key(0)), 12)
    for x, y in ((a.weights.params, b.weights.params), (a.weights.target, b.weights.target)):
        torch.testing.assert_close(x.vector, y.vector, rtol=1e-4, atol=1e-5)


def test_products_of_few_columns():
    pairs = [
        (torch.randn(*lanes, 64, 32), torch.randn(*lanes, 32, columns))
        for lanes in [(), (3,)]
        for columns in [1, 2, 15, 16, 64]
    ]
    flat = [x for pair in pairs for x in pair]
    out = made(lambda *xs: tuple(a @ b for a, b in zip(xs[::2], xs[1::2], strict=True)), *flat)(flat)
    for product, (a, b) in zip(out, pairs, strict=True):
        torch.testing.assert_close(product, a @ b)


@pytest.mark.parametrize("rows", [63, 64, 256])
def test_columns_and_single_rows(rows):
    """By products of their own, in each lane as in any number of lanes: nothing of the loops that jump is left."""

    def f(x, row):
        return x.sum(-2), x.sum(-2, keepdim=True), row @ x, x.sum(-1), x.sum(0)

    x, row = torch.randn(7, rows, 96), torch.randn(7, 1, rows)
    for lanes in (7, 2, None):
        xs = (x[0], row[0]) if lanes is None else (x[:lanes], row[:lanes])
        out = made(f, *xs)(list(xs))
        for a, b, exact in zip(out, f(*xs), f(*(y.double() for y in xs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(a, exact.float(), rtol=1e-5, atol=1e-4)
        if lanes == 7:
            all_of = out
        elif lanes == 2:
            assert tree.different_bits([a[:2] for a in all_of[:4]], list(out[:4])) == []


def test_sums_that_are_none_of_columns():
    x = torch.randn(3, 64, 64)
    holed = x.clone()
    holed[0, 5, 7], holed[1, 2, 3] = math.nan, math.inf

    def f(x, whole, holed):
        sums = x.sum(-2, dtype=torch.float64), x.double().sum(1), whole.sum(-2), x.mT.sum(-2), x.sum((0, 1)), x.sum(1)
        return *sums, x.sum(1).view(-1), holed.sum(-2)

    xs = x, (x * 10).long(), holed
    for a, b in zip(made(f, *xs)(list(xs)), f(*xs), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_graph_of_views_alone_and_one_whose_outputs_share_memory():
    x = torch.randn(3, 4)
    (same,) = made(lambda x: (x.view(3, 4),), x)([x])
    assert torch.equal(same, x)

    def f(x):
        y = x * 2.0
        return x[0], y, y[0], y.view(-1)

    for a, b in zip(made(f, x)([x]), f(x), strict=True):
        assert torch.equal(a, b)


def test_a_graph_is_found_again_on_the_disk(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(5)
    for found in (0, 1):
        counters["inductor"].clear()
        assert torch.equal(made(lambda x: (x * 3.0,), x)([x])[0], x * 3.0)
        assert counters["inductor"]["fxgraph_cache_hit"] == found


def test_a_product_for_columns_and_rows_leaves_inductor_no_loop():
    x, row = torch.randn(3, 64, 64), torch.randn(3, 1, 64)
    traced, *_ = graphs._trace(lambda x, row: (x.sum(-2), row @ x), (x, row))
    nodes = list(traced.graph.nodes)
    assert not [n for n in nodes if n.target == torch.ops.aten.sum.dim_IntList]
    assert [n.args[0].meta["val"].shape for n in nodes if n.target == torch.ops.aten.bmm.default] == [(3, 2, 64)] * 2


def test_a_product_that_no_rule_takes_goes_as_inductor_has_it():
    a, b = torch.randn(3, 1, 8), torch.randn(3, 8, 1)
    traced, *_ = graphs._trace(lambda a, b: (a @ b,), (a, b))
    assert not [n for n in traced.graph.nodes if n.target == torch.ops.aten.bmm.default]
    torch.testing.assert_close(made(lambda a, b: (a @ b,), a, b)([a, b])[0], a @ b)


def test_what_a_method_writes_in_place_its_graph_computes_and_leaves_inputs_alone():
    def f(x):
        y = x * 2.0
        first = y[0]
        y[1:].mul_(3.0)
        first.add_(y[2])
        return y, first + 1.0

    x = torch.randn(4, 5)
    before = x.clone()
    traced, *_ = graphs._trace(f, (x,))
    assert not [n for n in traced.graph.nodes if str(n.target).split(".")[-2:-1] in (["mul_"], ["add_"])]
    for a, b in zip(made(f, x)([x]), f(x), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(x, before)


def test_a_gradient_is_put_together_once():
    """One vector of all parameters: each further one is written, read and added, with zeros for the rest."""
    env = probes.ActionReward(num_envs=1, continuous=True)
    actor = fnrl.OffPolicyActorCritic(env.spec)
    algo = fnrl.SAC(batch=8)
    params, target, _ = algo.init(actor, actor.init(fnrl.key(0)))
    hyper = {"gamma": torch.tensor(0.99), "tau": torch.tensor(0.1)}
    obs, one = torch.randn(8, *env.spec.obs.shape), torch.ones(8)
    batch = OffPolicyBatch(obs, torch.rand(8, actor.actions), one, obs, one, one)
    noise = algo.noise(actor, fnrl.key(1), 1, 8)[0]

    def f(vector, behind):
        weights = Weights(Params(vector, params.layout), Params(behind, params.layout), hyper, (), 0, 0)
        return (algo.grad(actor, weights, batch, noise)[0],)

    traced, *_ = graphs._trace(f, (params.vector, target.vector))
    whole = [n.target for n in traced.graph.nodes if getattr(n.meta.get("val"), "shape", ()) == params.vector.shape]
    assert whole.count(torch.ops.aten.cat.default) == 1
    assert torch.ops.aten.add.Tensor not in whole


def test_tanh_is_exact_to_a_few_ulp_everywhere():
    x = torch.cat([torch.linspace(-12, 12, 4001), 10.0 ** torch.linspace(-30, 1, 500), torch.tensor([0.0, -0.0])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    (out,) = made(lambda x: (torch.tanh(x),), x)([x])
    exact = torch.tanh(x.double())
    assert bool(out[-1].isnan())
    assert out[-3:-1].tolist() == [1.0, -1.0]
    error = (out.double() - exact).abs()[:-3] / exact.abs()[:-3].clamp(min=1e-30)
    assert float(error.max()) < 5e-7
    assert float(out[:-3].abs().max()) <= 1.0


def test_a_library_that_a_killed_process_left_half_written_is_made_anew(tmp_path, monkeypatch):
    from torch._inductor import compile_fx
    from torch._inductor.exc import InductorError

    library, inductor = tmp_path / "cxojmi.main.so", compile_fx.compile_fx_inner
    library.write_bytes(b"")

    def compile_(*args, **options):
        if library.exists():
            raise InductorError(ImportError(f"{library}: invalid ELF header"), None)
        return inductor(*args, **options)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_)
    assert float(made(lambda x: (x + 1,), torch.zeros(()))([torch.zeros(())])[0]) == 1.0
    assert not library.exists()


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), ((-2.0, 0.0), (2.0, 1.0)), (-math.inf, 1.0)])
def test_a_graph_of_an_action_asks_no_tensor_about_its_bounds(bounds):
    space = Box((2,), *bounds)
    actor = fnrl.OnPolicyActorCritic(EnvSpec("fresh", Box((3,)), space))  # nobody has asked it before
    action = torch.randn(5, 2)
    traced, *_ = graphs._trace(lambda x: (actor.env_action(x),), (action,))
    torch.testing.assert_close(traced(action)[0], actor.env_action(action))


@pytest.mark.slow
def test_compiled_lanes_are_bit_equal_for_any_count_and_near_eager_ones():
    env = fnrl.envs.CartPole(num_envs=2, time_limit=5)
    actor = fnrl.OnPolicyActorCritic(env.spec, policy=fnrl.MLP((12, 12)), value=fnrl.MLP((12,)))
    algo, storage = fnrl.PPO(epochs=2, minibatches=2, max_grad_norm=0.5), fnrl.GAE(steps=9)
    parts = fnrl.Parts(env, actor, algo, storage, fnrl.NormaliseObs(), fnrl.ScaleReward())
    topology = fnrl.centralised(fnrl.gradients(fnrl.collect))
    scheme, eager = fnrl.Scheme(parts, topology, compile=True), fnrl.Scheme(parts, topology)
    keys = torch.stack([fnrl.key(seed) for seed in range(7)])
    runs = {}
    for lanes in (2, 7):
        state, info = scheme.step(scheme.init(keys[:lanes]))
        assert info.report["time/compile"] > 0.0
        made = graphs.SPENT.graphs
        runs[lanes], later = scheme.step(state, 16)  # four plans: episodes end, and rewards are scaled
        assert graphs.SPENT.graphs == made
        assert "time/compile" not in later.report
    assert bool(later.episodes[0].end.any())
    firsts = tree.map(lambda x: x[:2], runs[7])
    assert tree.different_bits(tree.leaves(firsts), tree.leaves(runs[2])) == []
    one, many = scheme.step(scheme.init(keys[:2]), 5)[0], eager.step(eager.init(keys[:2]), 5)[0]
    torch.testing.assert_close(one.weights.params.vector, many.weights.params.vector, rtol=1e-4, atol=1e-6)
    singly = scheme.init(keys[:2])
    for _ in range(5):
        singly, _ = scheme.step(singly)
    assert scheme.same(singly, one)
    assert not one.settled  # inside a plan
    resumed = scheme.restore(tree.map(torch.clone, scheme.gather(one)))
    assert scheme.same(scheme.step(resumed, 7)[0], scheme.step(singly, 7)[0])


def test_without_a_compiler_a_run_is_eager_and_says_so_once():
    from torch._inductor import config

    env = fnrl.envs.CartPole(num_envs=2, time_limit=11)
    parts = fnrl.Parts(env, fnrl.OnPolicyActorCritic(env.spec), fnrl.PPO(minibatches=2), fnrl.GAE(steps=8))
    topology = fnrl.centralised(fnrl.gradients(fnrl.collect))
    scheme, eager = fnrl.Scheme(parts, topology, compile=True), fnrl.Scheme(parts, topology)
    graphs._compiler.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.warns(fnrl.CompilerWarning, match="needs a C"):
            state, _ = scheme.step(scheme.init(fnrl.key(0)), 9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheme.step(state)
    graphs._compiler.cache_clear()
    assert eager.same(state, eager.step(eager.init(fnrl.key(0)), 9)[0])
