"""fnrl.random against jax.random and Random123, in every mode of torch, and against the distributions it claims."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from scipy import stats
from torch.func import grad, vmap

import fnrl.random as random

WORD = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
WORDS = st.tuples(WORD, WORD)
SHAPES = [(), (4,), (5,), (3, 7), (2, 0, 3)]
EVERY = {
    "split": lambda k: random.split(k, 3),
    "split_none": lambda k: random.split(k, 0),
    "fold_in": lambda k: random.fold_in(k, 4_000_000_000),
    "fold_in_tensor": lambda k: random.fold_in(k, torch.tensor(2**33 + 2**31 + 3)),
    "bits": lambda k: random.bits(k, (3, 5)),
    "bits_scalar": lambda k: random.bits(k),
    "uniform": lambda k: random.uniform(k, (6, 3)),
    "uniform_bounds": lambda k: random.uniform(k, (6, 3), -0.3, 2.7),
    "normal": lambda k: random.normal(k, (6, 3)),
    "normal_none": lambda k: random.normal(k, (3, 0)),
    "gumbel": lambda k: random.gumbel(k, (6, 3)),
    "categorical": lambda k: random.categorical(k, torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]])),
    "categorical_axis": lambda k: random.categorical(k, torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]]), axis=0),
    "randint": lambda k: random.randint(k, (7,), -3, 12),
    "permutation": lambda k: random.permutation(k, 11),
}


def ours(words):
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def theirs(words):
    return jax.random.wrap_key_data(np.array(words, np.uint32))


def unsigned(x):
    return x.numpy().view(np.uint32)


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(a.view(torch.int32), b.view(torch.int32)) if a.dtype == torch.float32 else torch.equal(a, b)


def ulps(x, y):
    return np.abs(np.float64(x) - y) / np.spacing(np.abs(y))


def lanes(n=5):
    return random.split(random.key(2**40 + 17), n)


# The generator.

KNOWN = [  # Random123, kat_vectors: threefry2x32, 20 rounds: counter, key, result
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "words", "expected"), KNOWN)
@pytest.mark.parametrize("copies", [1, 9])  # Python's integers, and numpy
def test_known_answers(counter, words, expected, copies):
    high, low = counter
    keys, counts = np.array([words], np.uint32), np.full((1, copies), low, np.uint32)
    x0, x1 = random._words(keys, high, counts)
    assert (x0 == expected[0]).all()
    assert (x1 == expected[1]).all()
    start = (high << 32) + low
    assert unsigned(random._torch_bits(ours(words), start, start + 1)) == expected[0] ^ expected[1]


@given(WORDS, st.integers(0, 2**63))
def test_the_counter_is_64_bits_wide(words, start):
    start = min(start, (start | random._SEGMENT - 1) - 5)
    count = np.array([[(start + i) >> 32, (start + i) & 0xFFFFFFFF] for i in range(5)], np.uint32)
    expected = [np.bitwise_xor.reduce(np.asarray(threefry_2x32(np.array(words, np.uint32), c))) for c in count]
    assert unsigned(random._torch_bits(ours(words), start, start + 5)).tolist() == expected
    x0, x1 = random._words(np.array([words], np.uint32), start >> 32, count[None, :, 1])
    assert (x0 ^ x1).tolist() == [expected]


@pytest.mark.parametrize("what", ["bits", "unit", "normal", "gumbel"])
@pytest.mark.parametrize("size", [0, 1, 4, 5, 16, 17, 100])
def test_blocks_do_not_show(monkeypatch, what, size):
    keys = lanes()
    whole = torch.stack([random._torch_draw(k, what, size) for k in keys])
    for name, n in (("_SEGMENT", 16), ("_CHUNK", 16), ("_CHUNK", 64), ("_FEW", 50)):
        with monkeypatch.context() as patch:
            patch.setattr(random, name, n)
            assert_same_bits(random._numpy_draw(keys, what, size), whole)
            assert_same_bits(torch.stack([random._torch_draw(k, what, size) for k in keys]), whole)


# jax as the oracle.


@given(WORDS)
def test_key_is_the_two_words_of_its_seed(words):
    assert unsigned(random.key((words[0] << 32) + words[1])).tolist() == list(words)
    assert np.array_equal(unsigned(random.key(np.uint64(words[1]))), jax.random.key_data(jax.random.key(words[1])))


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_equal_jax(shape):
    @jax.jit
    def oracle(k):
        r, bounded = jax.random, jax.random.uniform(k, shape, minval=-0.3, maxval=2.7)
        return r.bits(k, shape), r.uniform(k, shape), bounded, r.normal(k, shape), r.gumbel(k, shape)

    @given(WORDS)
    def check(words):
        k, (bits, uniform, bounded, normal, gumbel) = ours(words), map(np.asarray, oracle(theirs(words)))
        assert np.array_equal(unsigned(random.bits(k, shape)), bits)
        assert np.array_equal(random.uniform(k, shape).numpy(), uniform)
        # jax rounds twice on a processor without fused multiply-add
        assert np.allclose(random.uniform(k, shape, -0.3, 2.7).numpy(), bounded, rtol=0, atol=2.4e-7)
        assert (ulps(random.normal(k, shape).numpy(), normal) <= 4).all()
        assert np.allclose(random.gumbel(k, shape).numpy(), gumbel, rtol=4e-7, atol=4e-7)

    check()


def test_bounded_uniform_is_rounded_once():
    low, high = np.float32(0.1), np.float32(0.3)
    unit = random.uniform(random.key(5), (1000,)).tolist()
    span = np.float64(high - low)
    expected = [np.float32(np.longdouble(u) * np.longdouble(span) + np.longdouble(low)) for u in unit]
    assert random.uniform(random.key(5), (1000,), 0.1, 0.3).tolist() == [float(x) for x in expected]


def test_floats_equal_jax_in_their_tails():
    ends = np.concatenate([np.arange(2000), 2**23 - 1 - np.arange(2000), 2**22 + np.arange(-500, 500)])
    b = (ends.astype(np.uint32) << 9).view(np.int32)
    u = np.float32(2) * (ends / 2**23).astype(np.float32) - np.float32(1 - 2**-24)
    assert (ulps(random._normal(random._NUMPY, b), np.asarray(np.sqrt(np.float32(2)) * jax.lax.erf_inv(u))) <= 4).all()
    exact = -np.log(-np.log(np.maximum(ends / 2**23, 2.0**-126)))
    assert np.allclose(random._gumbel(random._NUMPY, b), exact, rtol=4e-7, atol=4e-7)


@given(WORDS, WORD)
def test_keys_equal_jax(words, data):
    k, j = ours(words), theirs(words)
    assert np.array_equal(unsigned(random.split(k, 5)), jax.random.key_data(jax.random.split(j, 5)))
    assert np.array_equal(unsigned(random.split(k)), jax.random.key_data(jax.random.split(j)))
    expected = jax.random.key_data(jax.random.fold_in(j, np.uint32(data)))
    assert np.array_equal(unsigned(random.fold_in(k, data)), expected)
    assert np.array_equal(unsigned(random.fold_in(k, np.uint32(data))), expected)
    assert np.array_equal(unsigned(random.fold_in(k, torch.tensor(data))), expected)
    assert np.array_equal(unsigned(random.fold_in(k, torch.tensor(data - 2**32))), expected)  # modulo 2**32


BOUND = st.integers(-(2**31), 2**31 - 1)
randint_oracle = jax.jit(lambda k, low, high: jax.random.randint(k, (9,), low, high))


@given(WORDS, st.tuples(BOUND, BOUND) | st.tuples(st.just(-1), st.integers(0, 70_000)))
def test_randint_equals_jax(words, bounds):
    low, high = sorted(bounds)
    if low < high:
        x = random.randint(ours(words), (9,), low, high)
        assert x.dtype == torch.int64
        assert np.array_equal(x.numpy(), randint_oracle(theirs(words), np.int32(low), np.int32(high)))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_categorical_equals_jax(axis):
    logits = np.random.default_rng(0).normal(size=(20, 3, 30)).astype(np.float32)
    logits[:, :, 4] = -np.inf
    x = random.categorical(random.key(1), torch.from_numpy(logits), axis)
    assert x.dtype == torch.int64
    assert np.array_equal(x.numpy(), jax.random.categorical(jax.random.key(1), logits, axis))


# One set of bits in every mode.


@pytest.mark.parametrize("name", EVERY)
def test_a_lane_draws_what_its_key_draws_alone(name):
    f, keys = EVERY[name], lanes(6)
    solo = torch.stack([f(k) for k in keys])
    assert_same_bits(vmap(f)(keys), solo)
    assert_same_bits(vmap(f)(keys[:2]), solo[:2])  # whatever the number of lanes
    assert_same_bits(vmap(f, in_dims=1)(keys.t().contiguous()), solo)
    assert_same_bits(vmap(vmap(f))(keys.reshape(2, 3, 2)).flatten(0, 1), solo)
    assert_same_bits(vmap(vmap(f, in_dims=1), in_dims=1)(keys.reshape(2, 3, 2).permute(2, 0, 1)).flatten(0, 1), solo)


@pytest.mark.parametrize("name", EVERY)
def test_draws_inside_a_gradient(name):
    f, keys, x = EVERY[name], lanes(3), torch.tensor(2.0)

    def loss(x, k):
        return (f(k).double() * x**2).sum()

    expected = torch.stack([4 * f(k).double().sum() for k in keys])
    torch.testing.assert_close(grad(loss)(x, keys[0]), expected[0].float())
    torch.testing.assert_close(vmap(grad(loss), in_dims=(None, 0))(x, keys), expected.float())


def test_data_folded_in_by_lane():
    keys, data = lanes(3), torch.tensor([0, 2**31, 2**32 - 1])
    each = torch.stack([torch.stack([random.fold_in(k, d) for d in data.tolist()]) for k in keys])
    assert_same_bits(vmap(random.fold_in, in_dims=(None, 0))(keys[0], data), each[0])
    assert_same_bits(vmap(random.fold_in)(keys, data), each.diagonal().t())
    assert_same_bits(vmap(vmap(random.fold_in, (None, 0)), (0, None))(keys, data), each)
    assert_same_bits(vmap(vmap(random.fold_in, (0, None)), (None, 0))(keys, data).transpose(0, 1), each)


@pytest.mark.parametrize("what", ["bits", "unit", "normal", "gumbel"])
def test_torch_and_numpy_agree(what):
    keys = lanes(3)
    for size in (0, 3, 20_000):
        expected = random._numpy_draw(keys, what, size)
        assert_same_bits(vmap(lambda k, n=size: random._torch_draw(k, what, n))(keys), expected)
    counts = torch.arange(-5, 5, dtype=torch.int32)
    assert_same_bits(vmap(random._torch_keys, (0, None))(keys, counts), vmap(random._keys, (0, None))(keys, counts))


def everything(k):
    return {name: f(k) for name, f in EVERY.items()}


def test_traced_whole_it_gives_the_same_bits():
    names = ["split", "fold_in_tensor", "categorical", "randint", "permutation"]
    k = random.key(11)
    traced = torch.compile(lambda k: [EVERY[name](k) for name in names], backend="eager", fullgraph=True)(k)
    for name, value in zip(names, traced, strict=True):
        assert_same_bits(value, EVERY[name](k))


def test_traced_with_other_arguments():
    def f(k, i, low, n):
        return random.uniform(random.fold_in(k, i), (n, 2), low, 3.0), random.key(i)

    traced, k = torch.compile(f, backend="eager", fullgraph=True), random.key(1)
    for arguments in ((1, 0.5, 3), (2**32 - 1, -1.0, 7)):
        for x, y in zip(traced(k, *arguments), f(k, *arguments), strict=True):
            assert_same_bits(x, y)


def test_compiled_it_gives_the_same_bits():
    def draw(k):
        return random.normal(k, (4001,))

    assert_same_bits(torch.compile(vmap(draw), fullgraph=True)(lanes(3)), vmap(draw)(lanes(3)))


def test_a_key_elsewhere_keeps_its_device():
    k = random.key(0).to("meta")
    assert random.split(k).is_meta
    assert random.normal(k, (2, 3)).is_meta
    assert random.fold_in(k, torch.tensor(1)).is_meta


def test_operators_are_well_formed():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(random._random_draw, (lanes(3), "normal", 7), test_utils=tests)
    torch.library.opcheck(random._random_draw, (lanes(3), "bits", 0), test_utils=tests)
    torch.library.opcheck(random._random_keys, (lanes(1)[0], torch.arange(7, dtype=torch.int32)), test_utils=tests)


def test_a_draw_changes_nothing_else():
    k, before = random.key(9), torch.get_rng_state()
    first = everything(k)
    assert torch.equal(k, random.key(9))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in everything(k).items():
        assert_same_bits(value, first[name])


# Laws of keys.


@given(WORDS, st.integers(0, 40), st.integers(0, 40))
def test_split_is_fold_in_whatever_the_number(words, m, n):
    k, m, n = ours(words), *sorted((m, n))
    keys = random.split(k, n)
    assert_same_bits(random.split(k, m), keys[:m])
    assert_same_bits(vmap(random.fold_in, (None, 0))(k, torch.arange(n)) if n else keys, keys)


def test_keys_do_not_collide():
    roots = random.split(random.key(0), 64)
    children = vmap(lambda k: random.split(k, 64))(roots).reshape(-1, 2)
    grandchildren = vmap(lambda k: random.split(k, 4))(children).reshape(-1, 2)
    seeds = torch.stack([random.key(seed) for seed in range(1000)])
    keys = torch.cat([roots, children, grandchildren, seeds])
    assert len(keys.unique(dim=0)) == len(keys) == 64 + 4096 + 16384 + 1000


@given(WORDS)
def test_seed_of_is_31_bits(words):
    assert random.seed_of(ours(words)) == int(unsigned(random.bits(ours(words)))) % 2**31


# Distributions.

N = 200_000


def test_each_bit_is_fair():
    b = unsigned(random.bits(random.key(0), (N,)))
    ones = np.array([(b >> i & 1).sum() for i in range(32)])
    assert (np.abs(ones - N / 2) < 5 * (N / 4) ** 0.5).all()


@pytest.mark.parametrize(
    ("draw", "law"),
    [
        (random.uniform, stats.uniform),
        (lambda k, n: random.uniform(k, n, -3.0, 5.0), stats.uniform(-3, 8)),
        (random.normal, stats.norm),
        (random.gumbel, stats.gumbel_r),
    ],
)
def test_floats_follow_their_law(draw, law):
    assert stats.kstest(draw(random.key(1), (N,)).numpy(), law.cdf).pvalue > 1e-3


def test_uniform_is_a_multiple_below_one():
    u = random.uniform(random.key(1), (N,)) * 2**23
    assert torch.equal(u, u.round().clamp(0, 2**23 - 1))


def test_categorical_has_its_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.5, -float("inf")])
    counts = random.categorical(random.key(5), logits.expand(N, 5)).bincount(minlength=5).numpy()
    assert counts[4] == 0
    assert stats.chisquare(counts[:4], N * logits[:4].double().softmax(0).numpy()).pvalue > 1e-3


def test_randint_is_uniform():
    counts = (random.randint(random.key(6), (N,), -5, 8) + 5).bincount(minlength=13)
    assert stats.chisquare(counts).pvalue > 1e-3


@given(WORDS, st.integers(0, 60))
def test_permutation_is_a_permutation(words, n):
    assert random.permutation(ours(words), n).sort().values.tolist() == list(range(n))


def test_permutation_is_uniform():
    p = vmap(lambda k: random.permutation(k, 4))(random.split(random.key(7), 24_000))
    codes = (p * torch.tensor([64, 16, 4, 1])).sum(-1).unique(return_counts=True)[1].numpy()
    assert len(codes) == 24
    assert stats.chisquare(codes).pvalue > 1e-3


def test_equal_bits_stay_in_order(monkeypatch):
    ties = torch.tensor([3, -1, 3, -1, 3] * 40, dtype=torch.int32)
    monkeypatch.setattr(random, "bits", lambda key, shape: ties)
    low, high = [i for i in range(200) if ties[i] < 0], [i for i in range(200) if ties[i] > 0]
    assert random.permutation(random.key(0), 200).tolist() == low + high


# What is refused.

K = random.key(0)
LOGITS = torch.zeros(2, 3)
REFUSED = [
    (lambda: random.key(-1), ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    (lambda: random.key(2**64), ValueError, "got 18446744073709551616"),
    (lambda: random.fold_in(K, torch.tensor(True)), TypeError, r"got torch.bool \[\]"),
    (lambda: random.normal(torch.zeros(3, dtype=torch.int32), ()), ValueError, r"shape \[2\], got \[3\]"),
    (lambda: random.normal(torch.zeros(2, dtype=torch.int64), ()), TypeError, r"got torch.int64 \[2\]"),
    (lambda: random.key(True), TypeError, "seed must be an integer, got bool True"),
    (lambda: random.key(1.0), TypeError, "got float 1.0"),
    (lambda: random.key(torch.tensor(1)), TypeError, r"got torch.int64 \[\]"),
    (lambda: random.bits(0), TypeError, "a key is an int32 tensor .* got int 0"),
    (lambda: random.fold_in(K.numpy(), 1), TypeError, "got ndarray"),
    (lambda: random.normal(random.split(K, 3)), ValueError, r"shape \[2\], got \[3, 2\]; use torch.func.vmap"),
    (lambda: random.split(K, -1), ValueError, "must not be negative"),
    (lambda: random.fold_in(K, -1), ValueError, r"data must be in \[0, 2\*\*32\), got -1"),
    (lambda: random.fold_in(K, 2**32), ValueError, "got 4294967296"),
    (lambda: random.fold_in(K, False), TypeError, "data must be an integer, got bool False"),
    (lambda: random.fold_in(K, torch.tensor(1.0)), TypeError, r"got torch.float32 \[\]"),
    (lambda: random.fold_in(K, torch.arange(3)), TypeError, r"got torch.int64 \[3\]; use vmap"),
    (lambda: random.normal(K, 5), TypeError, r"got 5; write \(5,\)"),
    (lambda: random.normal(K, (2.0,)), TypeError, "a dimension must be an integer, got float 2.0"),
    (lambda: random.uniform(K, (), 1.0, 0.0), ValueError, "minval=1.0, maxval=0.0"),
    (lambda: random.uniform(K, (), float("nan"), 1.0), ValueError, "minval=nan"),
    (lambda: random.uniform(K, (), -3e38, 3e38), ValueError, "finite float32"),
    (lambda: random.randint(K, (), 3, 3), ValueError, "minval=3, maxval=3"),
    (lambda: random.randint(K, (), -(2**31) - 1, 0), ValueError, "minval=-2147483649"),
    (lambda: random.randint(K, (), 0.0, 5), TypeError, "minval must be an integer, got float 0.0"),
    (lambda: random.categorical(K, LOGITS.long()), TypeError, r"got torch.int64 \[2, 3\]"),
    (lambda: random.categorical(K, [0.0, 1.0]), TypeError, "logits must be a floating-point tensor, got list"),
    (lambda: random.categorical(K, LOGITS, 2), ValueError, r"axis 2 is out of range for logits \[2, 3\]"),
    (lambda: random.categorical(K, torch.zeros(2, 0)), ValueError, "no class along axis -1"),
    (lambda: random.permutation(K, -1), ValueError, "must not be negative"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
