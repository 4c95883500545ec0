import math
import re
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import rlax
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fnrl.collect import _running
from fnrl.returns import discounted_returns, forward_scan, gae, reverse_scan, vtrace

Rollout = dict[str, Tensor]

laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds, unit, clips = st.integers(0, 2**32 - 1), st.floats(0.0, 1.0), st.floats(0.1, 3.0)
ends = st.sampled_from([0.0, 0.25, 0.6, 1.0])


def make_rollout(seed=0, steps=7, envs=3, terminated=0.2, truncated=0.2, dtype=torch.float64) -> Rollout:
    """Random arrays; next_value is value[t + 1] inside an episode, its own number where the episode or rollout ends."""
    rng = np.random.default_rng(seed)
    names = ("reward", "value", "next_value", "logp", "behaviour_logp")
    arrays = {k: torch.tensor(rng.normal(size=(steps, envs))) for k in names}
    flags = {
        k: torch.tensor(rng.random((steps, envs)) < p)
        for k, p in (("terminated", terminated), ("truncated", truncated))
    }
    inside = torch.cat([~(flags["terminated"] | flags["truncated"])[:-1], torch.zeros(1, envs, dtype=torch.bool)])
    arrays["next_value"] = torch.where(inside, arrays["value"].roll(-1, 0), arrays["next_value"])
    return {k: v.to(dtype) for k, v in arrays.items()} | flags


rollouts = st.builds(make_rollout, seeds, st.integers(1, 17), st.integers(1, 3), ends, ends)


def plain(rollout: Rollout, *without: str) -> Rollout:
    """The arguments of gae."""
    return {k: v for k, v in rollout.items() if k not in ("logp", "behaviour_logp", *without)}


def estimates(rollout: Rollout, gamma: Any, lam: Any, **clipping: Any) -> list[Tensor]:
    """Every estimate: the advantages of gae and vtrace, then the three targets."""
    advantage, target = gae(**plain(rollout), gamma=gamma, lam=lam)
    pg_advantage, vs = vtrace(**rollout, gamma=gamma, lam=lam, **clipping)
    return [advantage, pg_advantage, target, vs, discounted_returns(**plain(rollout, "value"), gamma=gamma)]


def close(actual: Tensor, expected: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# Scans


@laws
@given(seeds, st.integers(0, 40), st.integers(1, 3))
def test_scans_are_the_sequential_recurrences(seed, steps, envs):
    rng = np.random.default_rng(seed)
    x, decay = rng.normal(size=(steps, envs)), rng.uniform(-1.2, 1.2, size=(steps, envs))
    decay = np.where(rng.random(decay.shape) < 0.2, 0.0, decay)
    backwards, forwards, y, z = np.zeros_like(x), np.zeros_like(x), np.zeros(envs), np.zeros(envs)
    for t in range(steps):
        y = backwards[steps - 1 - t] = x[steps - 1 - t] + decay[steps - 1 - t] * y
        z = forwards[t] = x[t] + decay[t] * z
    close(reverse_scan(torch.tensor(x), torch.tensor(decay)), backwards, 1e-10)
    close(forward_scan(torch.tensor(x), torch.tensor(decay)), forwards, 1e-10)


def test_scans_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    close(reverse_scan(x, 0.1), [1.23, 2.3, 3.0], 1e-15)
    close(forward_scan(x, 0.1), [1.0, 2.1, 3.21], 1e-15)


@pytest.mark.parametrize("scan", [reverse_scan, forward_scan])
def test_decay_broadcasts_to_x_and_x_never_to_decay(scan):
    x, full = torch.randn(6, 2, 3, dtype=torch.float64), torch.rand(6, 2, 3, dtype=torch.float64)
    for decay in (0.9, torch.tensor(0.9, dtype=torch.float64), full[:, :1, :1], full[0]):
        assert torch.equal(scan(x, decay), scan(x, torch.ones_like(x) * decay))
    with pytest.raises(RuntimeError, match="expand"):
        scan(x[:, :, 0], full)


def test_float32_stays_within_rounding_over_a_long_rollout():
    rng = np.random.default_rng(0)
    x, decay = torch.tensor(rng.normal(size=(2049, 4))).float(), torch.tensor(rng.uniform(0.9, 1.0, (2049, 4))).float()
    exact = reverse_scan(x.double(), decay.double())
    torch.testing.assert_close(reverse_scan(x, decay).double(), exact, rtol=1e-5, atol=1e-5)


def test_operations_grow_with_the_logarithm_of_the_steps():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(steps: int) -> int:
        with Count() as count:
            reverse_scan(torch.zeros(steps, 1), 0.5)
        return count.calls

    assert calls(1024) - calls(512) == calls(64) - calls(32) > 0
    assert calls(1024) == calls(1023)


# Oracles: the papers' sums, term by term in plain Python (no recursion, no arrays), and rlax


def oracle(rollout: Rollout, gamma: float, lam: float, clip_rho: float, clip_c: float) -> list[np.ndarray]:
    """What `estimates` should be. Equation 16 of arXiv 1506.02438; equation 1 and section 4.2 of arXiv 1802.01561."""
    steps, envs = rollout["reward"].shape
    advantage, pg_advantage, target, vs, returns = (np.zeros((steps, envs)) for _ in range(5))
    for n in range(envs):
        c = {k: v[:, n].tolist() for k, v in rollout.items()}
        alive = [not x for x in c["terminated"]]
        delta = [c["reward"][t] + gamma * alive[t] * c["next_value"][t] - c["value"][t] for t in range(steps)]
        ratio = [math.exp(p - q) for p, q in zip(c["logp"], c["behaviour_logp"], strict=True)]
        rho, trace = [min(clip_rho, r) for r in ratio], [lam * min(clip_c, r) for r in ratio]
        stops = [t for t in range(steps) if c["terminated"][t] or c["truncated"][t] or t == steps - 1]
        for t in reversed(range(steps)):
            stop = next(u for u in stops if u >= t)
            rest = range(t, stop + 1)
            advantage[t, n] = sum((gamma * lam) ** (u - t) * delta[u] for u in rest)
            target[t, n] = advantage[t, n] + c["value"][t]
            returns[t, n] = sum(gamma ** (u - t) * c["reward"][u] for u in rest)
            returns[t, n] += gamma ** (stop + 1 - t) * alive[stop] * c["next_value"][stop]
            vs[t, n] = c["value"][t]
            vs[t, n] += sum(gamma ** (u - t) * math.prod(trace[t:u]) * rho[u] * delta[u] for u in rest)
            follow = c["next_value"][t] if t == stop else lam * vs[t + 1, n] + (1 - lam) * c["value"][t + 1]
            pg_advantage[t, n] = rho[t] * (c["reward"][t] + gamma * alive[t] * follow - c["value"][t])
    return [advantage, pg_advantage, target, vs, returns]


@laws
@given(rollouts, unit, unit, clips, clips)
def test_estimates_are_their_papers_sums(rollout, gamma, lam, clip_rho, clip_c):
    c = {"gamma": gamma, "lam": lam, "clip_rho": clip_rho, "clip_c": clip_c}
    for actual, expected in zip(estimates(rollout, **c), oracle(rollout, **c), strict=True):
        close(actual, expected)


def test_estimates_are_those_of_rlax():
    # rlax takes one episode at a time: twelve environments of three episodes each, all four steps long.
    gamma, lam, clip = 0.97, 0.9, 1.3
    rollout = make_rollout(0, 12, 12, 0.0, 0.0, torch.float32)
    ended = torch.zeros(12, 12, dtype=torch.bool).index_fill(0, torch.tensor([3, 7, 11]), True)
    rng = np.random.default_rng(0)
    rollout |= {k: ended & torch.tensor(rng.random((12, 12)) < 0.6) for k in ("terminated", "truncated")}
    rollout["truncated"] = rollout["truncated"] | (ended & ~rollout["terminated"])
    rollout["next_value"] = torch.where(ended, rollout["next_value"].flip(1) + 1.0, rollout["next_value"])

    def of_rlax(s: dict[str, Any]) -> list[Any]:
        discount, ratio = gamma * (1.0 - s["terminated"]), jax.numpy.exp(s["logp"] - s["behaviour_logp"])
        values = jax.numpy.append(s["value"], s["next_value"][-1])
        advantage = rlax.truncated_generalized_advantage_estimation(s["reward"], discount, lam, values)
        arrays = (s["value"], s["next_value"], s["reward"], discount, ratio)
        out = rlax.vtrace_td_error_and_advantage(*arrays, lam, clip, clip)
        target, returns = (rlax.lambda_returns(s["reward"], discount, s["next_value"], x) for x in (lam, 1.0))
        return [advantage, out.pg_advantage, target, out.errors + s["value"], returns]

    episodes = {k: v.reshape(3, 4, 12).numpy() for k, v in rollout.items()}
    theirs = jax.jit(jax.vmap(jax.vmap(of_rlax, 1, 1)))(episodes)
    for actual, expected in zip(estimates(rollout, gamma, lam, clip_rho=clip, clip_c=1.0), theirs, strict=True):
        close(actual, np.array(expected).reshape(12, 12), 1e-5)


# Laws


@laws
@given(rollouts, unit)
def test_gae_with_lambda_one_is_the_return_minus_the_value(rollout, gamma):
    advantage, _, target, _, returns = estimates(rollout, gamma, 1.0)
    close(advantage, returns - rollout["value"])
    close(target, returns)


@laws
@given(rollouts, unit)
def test_gae_with_lambda_zero_is_the_td_error(rollout, gamma):
    one_step = rollout["reward"] + torch.where(rollout["terminated"], 0.0, gamma * rollout["next_value"])
    advantage, _, target, _, _ = estimates(rollout, gamma, 0.0)
    close(advantage, one_step - rollout["value"])
    close(target, one_step)


@laws
@given(rollouts, unit, unit, st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_vtrace_on_policy_is_gae(rollout, gamma, lam, clip_rho, clip_c):
    on_policy = rollout | {"behaviour_logp": rollout["logp"]}
    advantage, pg_advantage, target, vs, _ = estimates(on_policy, gamma, lam, clip_rho=clip_rho, clip_c=clip_c)
    close(pg_advantage, advantage)
    close(vs, target)


@laws
@given(rollouts, unit, unit, st.floats(-5.0, 5.0))
def test_a_constant_moved_from_rewards_to_values_changes_no_advantage(rollout, gamma, lam, c):
    # V + c everywhere and r - (1 - gamma) c (r - c where nothing follows) against it: no TD error changes.
    moved = rollout | {k: rollout[k] + c for k in ("reward", "value", "next_value")}
    moved["reward"] = moved["reward"] - gamma * c * (~rollout["terminated"]).double()
    for i, (before, after) in enumerate(zip(estimates(rollout, gamma, lam), estimates(moved, gamma, lam), strict=True)):
        if i < 4:  # returns know no value but the last
            close(after, before if i < 2 else before + c, 1e-9)


@laws
@given(rollouts, unit, unit, st.floats(0.1, 10.0))
def test_rewards_and_values_in_other_units_scale_every_estimate(rollout, gamma, lam, c):
    scaled = rollout | {k: c * rollout[k] for k in ("reward", "value", "next_value")}
    for before, after in zip(estimates(rollout, gamma, lam), estimates(scaled, gamma, lam), strict=True):
        close(after, c * before, 1e-9)


@laws
@given(rollouts, rollouts, unit, unit, st.sampled_from(["terminated", "truncated"]))
def test_splitting_a_rollout_at_an_episodes_end_changes_nothing(first, second, gamma, lam, flag):
    envs = min(first["reward"].shape[1], second["reward"].shape[1])
    first, second = ({k: v[:, :envs] for k, v in r.items()} for r in (first, second))
    first[flag] = torch.cat([first[flag][:-1], torch.ones(1, envs, dtype=torch.bool)])
    whole = {k: torch.cat([first[k], second[k]]) for k in first}
    for joined, a, b in zip(*(estimates(r, gamma, lam) for r in (whole, first, second)), strict=True):
        close(joined, torch.cat([a, b]))


def test_vtrace_clips_at_one_by_default():
    rollout = make_rollout(3, 9, 4)
    explicit = vtrace(**rollout, gamma=0.9, lam=1.0, clip_rho=1.0, clip_c=1.0)
    assert all(torch.equal(a, b) for a, b in zip(vtrace(**rollout, gamma=0.9), explicit, strict=True))


def test_a_step_that_ends_both_ways_is_terminal():
    rollout = make_rollout(0, terminated=1.0, truncated=1.0) | {"behaviour_logp": make_rollout(0)["logp"]}
    for target in estimates(rollout, 0.9, 0.9)[2:]:
        close(target, rollout["reward"])


# Defects of NAPPO 0.0.44


def test_nappo_1_the_end_of_a_rollout_bootstraps_its_last_step_and_not_slot_zero():
    # r = 0, gamma = lam = 1, V(s_T) = 7: every return is 7. NAPPO wrote the 7 over V(s_0), and took 0 for the end.
    value = torch.tensor([[2.0, -1.0], [0.5, 3.0], [4.0, 1.0]])
    zeros, no = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    rollout = {"reward": zeros, "value": value, "next_value": torch.cat([value[1:], torch.full((1, 2), 7.0)])}
    rollout |= {"terminated": no, "truncated": no, "logp": zeros, "behaviour_logp": zeros}
    for target in estimates(rollout, 1.0, 1.0)[2:]:
        assert torch.equal(target, torch.full((3, 2), 7.0))


def test_nappo_9_a_time_limit_is_no_termination():
    # The same steps in two environments; at step 0 one terminates, the other is cut by its time limit. V(s_1) = 10.
    ones, value, next_value = torch.ones(2, 2), torch.full((2, 2), 100.0), torch.tensor([[10.0, 10.0], [0.0, 0.0]])
    terminated, truncated = torch.tensor([[True, False], [True, True]]), torch.tensor([[False, True], [False, False]])
    rollout = {"reward": ones, "value": value, "next_value": next_value, "terminated": terminated}
    rollout |= {"truncated": truncated, "logp": ones, "behaviour_logp": ones}
    for target in estimates(rollout, 0.5, 0.9)[2:]:
        close(target, [[1.0, 6.0], [1.0, 1.0]], 1e-6)


@laws
@given(rollouts, unit, unit, st.sampled_from(["terminated", "truncated"]))
def test_nappo_9_nothing_of_the_next_episode_reaches_this_one(rollout, gamma, lam, flag):
    after = torch.arange(len(rollout["reward"])).unsqueeze(1) > 0
    rollout = rollout | {flag: rollout[flag] | ~after}
    other = rollout | {k: torch.where(after, rollout[k] + 3.0, rollout[k]) for k in ("reward", "value", "next_value")}
    for a, b in zip(estimates(rollout, gamma, lam), estimates(other, gamma, lam), strict=True):
        assert torch.equal(a[0], b[0])


def test_the_value_of_a_terminal_successor_is_never_read():
    rollout = make_rollout(terminated=1.0) | {"next_value": torch.full((7, 3), math.nan, dtype=torch.float64)}
    assert all(x.isfinite().all() for x in estimates(rollout, 0.9, 0.9))


# Transforms: every function, everywhere it must run

COEFFICIENTS = {"gamma": 0.95, "lam": 0.9, "clip_rho": 1.2, "clip_c": 0.8}
CASES = {
    "reverse_scan": lambda r, c: (reverse_scan(r["reward"], c["gamma"]),),
    "forward_scan": lambda r, c: (forward_scan(r["reward"], c["gamma"]),),
    "estimates": lambda r, c: estimates(r, **c),
}
case = pytest.mark.parametrize("function", CASES.values(), ids=CASES.keys())


@case
def test_lanes_equal_solo_runs_and_do_not_depend_on_their_number(function):
    each = [make_rollout(i, dtype=torch.float32) for i in range(5)]
    arrays = {k: torch.stack([r[k] for r in each]) for k in each[0]}
    coefficients = {k: v * (1.0 - 0.05 * torch.arange(5)) for k, v in COEFFICIENTS.items()}
    lanes = torch.func.vmap(function)
    five, two = lanes(arrays, coefficients), lanes(*({k: v[:2] for k, v in x.items()} for x in (arrays, coefficients)))
    assert all(torch.equal(a[:2], b) for a, b in zip(five, two, strict=True))
    for i, rollout in enumerate(each):
        for a, b in zip(five, function(rollout, {k: v[i] for k, v in coefficients.items()}), strict=True):
            torch.testing.assert_close(a[i], b)


@case
def test_trailing_axes_are_more_environments(function):
    rollout = make_rollout()
    flat = function({k: torch.cat([v, v.flip(1)], 1) for k, v in rollout.items()}, COEFFICIENTS)
    deep = function({k: torch.stack([v, v.flip(1)], 2) for k, v in rollout.items()}, COEFFICIENTS)
    for a, b in zip(flat, deep, strict=True):
        assert torch.equal(a, torch.cat(b.unbind(2), 1))


def test_compiled_equals_eager():
    def everything(r: Rollout, c: dict[str, Any]) -> list[Tensor]:
        return [result for function in CASES.values() for result in function(r, c)]

    torch.compiler.reset()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    rollout = make_rollout(dtype=torch.float32)
    for coefficients in (COEFFICIENTS, {k: torch.tensor(v) for k, v in COEFFICIENTS.items()}):
        for a, b in zip(compiled(rollout, coefficients), everything(rollout, coefficients), strict=True):
            torch.testing.assert_close(a, b)


@case
def test_runs_on_the_meta_device(function):
    # No value is read (no .item(), no shape that depends on data), and nothing is made on another device.
    for result in function({k: v.to("meta") for k, v in make_rollout().items()}, COEFFICIENTS):
        assert result.is_meta
        assert result.shape == (7, 3)


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_and_leaves_the_inputs_alone(function, dtype):
    rollout, copy = make_rollout(dtype=dtype), make_rollout(dtype=dtype)
    for coefficients in (COEFFICIENTS, {k: torch.tensor(v).double() for k, v in COEFFICIENTS.items()}):
        assert {x.dtype for x in function(rollout, coefficients)} == {dtype}
    assert all(torch.equal(rollout[k], copy[k]) for k in copy)


@case
def test_gradients_are_right(function):
    rollout = make_rollout(1)
    floats = [k for k, v in rollout.items() if v.is_floating_point()]
    coefficients = [torch.tensor(v, dtype=torch.float64) for v in COEFFICIENTS.values()]

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = rollout | dict(zip(floats, inputs, strict=False))
        return tuple(function(arrays, dict(zip(COEFFICIENTS, inputs[len(floats) :], strict=True))))

    assert torch.autograd.gradcheck(flat, [x.requires_grad_() for x in (*(rollout[k] for k in floats), *coefficients)])


# Errors

ORDER = {
    "gae": (gae, ("reward", "value", "next_value", "terminated", "truncated")),
    "discounted_returns": (discounted_returns, ("reward", "next_value", "terminated", "truncated")),
    "vtrace": (vtrace, ("logp", "behaviour_logp", "reward", "value", "next_value", "terminated", "truncated")),
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, (_, order) in ORDER.items() for wrong in order])
def test_shapes_that_would_broadcast_are_refused_by_name(name, wrong):
    function, order = ORDER[name]
    rollout = make_rollout(0, 3, 3)
    arrays = {k: rollout[k].unsqueeze(-1) if k == wrong else rollout[k] for k in order}
    coefficients = {"gamma": 0.9} | ({"lam": 0.9} if name == "gae" else {})
    message = f"{wrong} has shape (3, 3, 1), expected (3, 3), the shape of {order[0]}"
    if wrong == order[0]:
        message = f"{order[1]} has shape (3, 3), expected (3, 3, 1), the shape of {order[0]}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**arrays, **coefficients)


@laws
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_running_return_does_not_depend_on_where_rollouts_end(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    steps = sum(cuts)
    reward, carried = (torch.randn(n, 3, generator=generator) for n in (steps, 1))
    done = torch.rand(steps, 3, generator=generator) < 0.3
    whole, left = _running(reward, done, carried[0], 0.9)
    expected, g = [], carried[0].clone()
    for t in range(steps):
        g = reward[t] + 0.9 * g
        expected.append(g)
        g = torch.where(done[t], 0.0, g)
    torch.testing.assert_close(whole, torch.stack(expected))
    torch.testing.assert_close(left, g)
    parts, now = [], carried[0]
    for r, d in zip(reward.split(cuts), done.split(cuts), strict=True):
        part, now = _running(r, d, now, 0.9)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(now, left)
