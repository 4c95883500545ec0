"""Explicit randomness: pure functions of a key, with the bits of `jax.random`.

A key is an int32 tensor [2]: the bits of two uint32 words, high then low. It is data: saved, batched, sent and
compared like any other, and never changed by use. Element i of a draw is Threefry-2x32 (20 rounds) of the counter (i
>> 32, i & 0xffffffff), its two words xor-ed, which is what `jax.random` does by default
(`jax_threefry_partitionable`).

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (doi:10.1145/2063384.2063405)

Why not torch's generators: a generator is hidden, mutable state. What it draws depends on all that was drawn before,
on the device and on who runs first; it cannot be split among workers, nor be a leaf of a record; and under
`vmap(randomness="different")` lane i draws other numbers when the number of lanes changes. Here lane i draws what key
i draws alone.

Keys, integers and uniforms equal jax's to the bit, normals to a few ulp, Gumbels to a few 1e-7 (a uniform on bounds
other than 0 and 1 is rounded once, as jax's is on a processor with fused multiply-add). All are the same bits eager,
under `torch.func` transforms and under `torch.compile`. For the floats' sake exactly rounded operations alone make
them: `torch.log`, `torch.sqrt` and `torch.erfinv` differ in the last place between eager and compiled. (A compiler
for a GPU may fuse a product with a sum; a normal or a Gumbel may then differ from eager in its last places.)

Use a key once: draw from it, split it, or fold into it. `split(key, n)[i]` is `fold_in(key, i)`, and `bits(key)` is
made of the words of `fold_in(key, 0)`. Every function takes one key; `torch.func.vmap` takes many.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# fmt: off
__all__ = [
    "bits", "categorical", "fold_in", "gumbel", "key", "normal",
    "permutation", "randint", "seed_of", "split", "uniform",
]
# fmt: on


def key(seed: int) -> Tensor:
    """The key [2] of a seed in [0, 2**64): its high and low 32 bits."""
    seed = _integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return torch.tensor([_signed(seed >> 32), _signed(seed & _WORD)], dtype=torch.int32)


def split(key: Tensor, num: int = 2) -> Tensor:
    """`num` independent keys [num, 2]; the i-th is `fold_in(key, i)`, whatever `num`."""
    (num,) = _shape((num,))
    return _keys(_checked(key), torch.arange(num, dtype=torch.int32, device=key.device))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """The key [2] of `data` under `key`: the two words of threefry(key, (0, data)).

    `data` is an integer in [0, 2**32), or an integer tensor [] (taken modulo 2**32).
    """
    _checked(key)
    if isinstance(data, Tensor):
        if data.shape != () or data.dtype == torch.bool or data.is_floating_point() or data.is_complex():
            raise TypeError(f"data must be an integer tensor [], got {_describe(data)}; use vmap for many")
        counts = data.to(key.device, torch.int32).reshape(1)
    else:
        data = _integer("data", data)
        if not 0 <= data < 2**32:
            raise ValueError(f"data must be in [0, 2**32), got {data}")
        counts = torch.full((1,), _signed(data), dtype=torch.int32, device=key.device)
    return _keys(key, counts)[0]


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """32 random bits an element: int32, to be read as uint32."""
    return _draw(key, shape, "bits")


def uniform(key: Tensor, shape: Sequence[int] = (), minval: float = 0.0, maxval: float = 1.0) -> Tensor:
    """Uniform on [minval, maxval), float32: minval + (maxval - minval) u, with u a multiple of 2**-23 in [0, 1).

    Rounding may give maxval itself, unless the bounds are 0 and 1. ValueError where minval > maxval, or where float32
    cannot hold the bounds or their distance.
    """
    if not (-_FLOAT_MAX <= minval <= maxval <= _FLOAT_MAX and maxval - minval <= _FLOAT_MAX):
        raise ValueError(f"bounds must be finite float32 with minval <= maxval, got minval={minval}, maxval={maxval}")
    unit = _draw(key, shape, "unit")
    if minval == 0.0 and maxval == 1.0:
        return unit
    low = torch.full((), minval, dtype=torch.float32, device=key.device)
    span = torch.full((), maxval, dtype=torch.float32, device=key.device) - low
    # In float64 the product is exact, so fused with the sum or not it gives the same.
    return (unit.double() * span.double() + low.double()).float()


def normal(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal, float32: sqrt(2) erfinv(u), u uniform on (-1, 1).

    erfinv is Giles 2010, "Approximating the erfinv function" (single precision); |x| < 5.42.
    """
    return _draw(key, shape, "normal")


def gumbel(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard Gumbel, float32: -log(-log(u)), u uniform on (0, 1)."""
    return _draw(key, shape, "gumbel")


def categorical(key: Tensor, logits: Tensor, axis: int = -1) -> Tensor:
    """A class drawn with probability softmax(logits, axis): argmax(logits + gumbel), int64, `logits.shape` less `axis`.

    Maddison et al. 2014 (arXiv:1411.0030). Probabilities below about 1e-7 are not met: u has 23 bits.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {_describe(logits)}")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"axis {axis} is out of range for logits {list(logits.shape)}")
    if logits.shape[axis] == 0:
        raise ValueError(f"logits {list(logits.shape)} have no class along axis {axis}")
    return torch.argmax(gumbel(key, logits.shape) + logits, dim=axis)


def randint(key: Tensor, shape: Sequence[int], minval: int, maxval: int) -> Tensor:
    """Integers in [minval, maxval), int64 with the values of int32 `jax.random.randint`.

    64 bits modulo the span, or 32 where it exceeds 2**16 (the bias is then up to span / 2**32). ValueError unless
    -2**31 <= minval < maxval <= 2**31.
    """
    minval, maxval = _integer("minval", minval), _integer("maxval", maxval)
    if not -(2**31) <= minval < maxval <= 2**31:
        raise ValueError(f"randint needs -2**31 <= minval < maxval <= 2**31, got minval={minval}, maxval={maxval}")
    span = maxval - minval
    first, second = split(key).unbind()
    x = bits(second, shape).long() & _WORD
    if span <= 2**16:  # beyond, the 32-bit arithmetic of jax loses the other word
        x = x + (bits(first, shape).long() & _WORD) % span * (2**32 % span)
    return minval + x % span


def permutation(key: Tensor, n: int) -> Tensor:
    """A permutation of 0..n-1, int64 [n]: the stable argsort of `bits(key, (n,))`; equal bits stay in order.

    Not jax's. A tie has probability n (n - 1) / 2**33, and bounds the distance from a uniform permutation.
    """
    return torch.argsort(bits(key, (n,)), stable=True)


def seed_of(key: Tensor) -> int:
    """A seed in [0, 2**31) for a foreign simulator: `bits(key)` less its top bit, as a Python int."""
    return int(bits(key)) & 0x7FFFFFFF


# Arguments.

_WORD = 0xFFFFFFFF
_FLOAT_MAX = torch.finfo(torch.float32).max


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}")
    return int(value)


def _signed(word: int) -> int:
    """The int32 of the same bits as a uint32."""
    return (word ^ 0x80000000) - 0x80000000


def _checked(key: Tensor) -> Tensor:
    if not isinstance(key, Tensor) or key.dtype != torch.int32:
        raise TypeError(f"a key is an int32 tensor [2], as key(seed) makes, got {_describe(key)}")
    if key.shape != (2,):
        raise ValueError(f"a key has shape [2], got {list(key.shape)}; use torch.func.vmap for many keys")
    return key


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (int, np.integer)):
        raise TypeError(f"shape must be a tuple of integers, got {shape}; write ({shape},)")
    dims = tuple(_integer("a dimension", d) for d in shape)
    if any(d < 0 for d in dims):
        raise ValueError(f"dimensions must not be negative, got {dims}")
    return dims


# Threefry and the floats made of it: one text, for the arithmetics of numpy, of torch and of Python's integers.


class _Arithmetic(NamedTuple):
    add: Callable[[Any, Any], Any]  # of uint32, wrapping
    mix: Callable[[Any, int, Any], Any]  # of uint32: x rotated left by r bits, xor y
    ints: Callable[[Any], Any]  # the bits as int32
    floats: Callable[[Any], Any]  # the bits as float32
    where: Callable[[Any, Any, Any], Any]
    sqrt: Callable[[Any], Any]  # of float32, correctly rounded
    square: Callable[[Any], Any]  # of float32, correctly rounded, never fused with a sum


def _threefry(a: _Arithmetic, k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Threefry-2x32, 20 rounds: the words (x0, x1) of a counter under the words (k0, k1) of a key."""
    k = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = a.add(x0, k0), a.add(x1, k1)
    for i in range(5):
        for r in (17, 29, 16, 24) if i % 2 else (13, 15, 26, 6):
            x0 = a.add(x0, x1)
            x1 = a.mix(x1, r, x0)
        x0 = a.add(x0, k[(i + 1) % 3])
        x1 = a.add(x1, a.add(k[(i + 2) % 3], i + 1))
    return x0, x1


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    p = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        p = p * x + c
    return p


# fmt: off
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)
_ERFINV_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)
_ERFINV_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)
# fmt: on


def _log(a: _Arithmetic, x: Any) -> Any:
    """log of a normal positive float32, as in Cephes (Moshier 1992): x = 2**e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)."""
    i = a.ints(x) - 0x3F3504F3
    e = a.floats((i >> 23) + 0x4B400000) - 12582912.0  # an integer to float, by way of the mantissa of 1.5 * 2**23
    f = a.floats((i & 0x7FFFFF) + 0x3F3504F3) - 1.0
    z = f * f
    return (f + (_horner(f, _LOG) * f * z + e * -2.12194440e-4 - z * 0.5)) + e * 0.693359375


def _unit(a: _Arithmetic, b: Any) -> Any:
    return a.floats(((b >> 9) & 0x7FFFFF) | 0x3F800000) - 1.0


def _normal(a: _Arithmetic, b: Any) -> Any:
    u = _unit(a, b) * 2.0 - (1.0 - 2.0**-24)
    w = -_log(a, 1.0 - a.square(u))
    p = a.where(w < 5.0, _horner(w - 2.5, _ERFINV_CENTRE), _horner(a.sqrt(w) - 3.0, _ERFINV_TAIL))
    return p * u * math.sqrt(2.0)


def _gumbel(a: _Arithmetic, b: Any) -> Any:
    u = _unit(a, b)
    return -_log(a, -_log(a, a.where(u > 0.0, u, 2.0**-126)))


_TRANSFORMS = {"bits": lambda a, b: b, "unit": _unit, "normal": _normal, "gumbel": _gumbel}

# The torch implementation: compiled, or on a device.


def _torch_mix(x: Tensor, r: int, y: Tensor) -> Tensor:
    z = ((x << r) | ((x >> (32 - r)) & ((1 << r) - 1))) ^ y
    # An identity at which inductor names the value; else it copies the expression into every use, 3.4**rounds times.
    return z.as_strided(z.shape, z.stride())


_TORCH = _Arithmetic(
    add=operator.add,
    mix=_torch_mix,
    ints=lambda x: x.view(torch.int32),
    floats=lambda x: x.view(torch.float32),
    where=torch.where,
    sqrt=lambda x: x.double().sqrt().float(),  # a vector library's float32 sqrt is not correctly rounded
    square=lambda x: (x.double() * x.double()).float(),  # fused, 1 - u * u would move the tails of the normal by 1e-5
)
_SEGMENT = 2**31  # counters that one int32 arange can hold


def _torch_keys(key: Tensor, counts: Tensor) -> Tensor:
    return torch.stack(_threefry(_TORCH, key[0], key[1], torch.zeros_like(counts), counts), dim=-1)


def _torch_bits(key: Tensor, start: int, stop: int) -> Tensor:
    """Elements start..stop-1 of a draw, within one segment."""
    first = _signed(start & _WORD)
    counts = torch.arange(first, first + stop - start, dtype=torch.int32, device=key.device)
    x0, x1 = _threefry(_TORCH, key[0], key[1], _signed(start >> 32), counts)
    return x0 ^ x1


def _torch_draw(key: Tensor, what: str, size: int) -> Tensor:
    starts = range(0, size, _SEGMENT) if size > _SEGMENT else (0,)
    parts = [_TRANSFORMS[what](_TORCH, _torch_bits(key, i, min(i + _SEGMENT, size))) for i in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# The numpy implementation: eager, on the CPU. It takes keys [*B, 2], which is all that its vmap rule needs.

_U32 = [np.array(i, np.uint32) for i in range(33)]  # an array [] is taken in half the time of a Python integer
_NUMPY = _Arithmetic(
    add=np.add,
    mix=lambda x, r, y: (x << _U32[r] | x >> _U32[32 - r]) ^ y,
    ints=lambda x: x.view(np.int32),
    floats=lambda x: x.view(np.float32),
    where=np.where,
    sqrt=np.sqrt,
    square=np.square,
)
_PYTHON = _NUMPY._replace(add=lambda x, y: (x + y) & _WORD, mix=lambda x, r, y: ((x << r) & _WORD | x >> (32 - r)) ^ y)
_CHUNK = 2**14  # numbers worked on at once: a few arrays of them stay in the cache
_FEW = 4  # numbers up to which Python's integers are faster


def _words(keys: np.ndarray, high: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two words [S, n] of the counters (high, counts [S, n] or [1, n]) under keys [S, 2], all uint32."""
    if len(keys) * counts.shape[1] > _FEW:
        return _threefry(_NUMPY, keys[:, :1], keys[:, 1:], np.uint32(high), counts)
    pairs = zip(keys.tolist(), counts.tolist() * (len(keys) // len(counts)), strict=True)
    words = [_threefry(_PYTHON, k0, k1, high, c) for (k0, k1), row in pairs for c in row]
    table = np.array(words, np.uint32).reshape(len(keys), counts.shape[1], 2)
    return table[..., 0], table[..., 1]


def _numpy_keys(keys: Tensor, counts: Tensor) -> Tensor:
    k = keys.numpy().view(np.uint32).reshape(-1, 2)
    c = counts.numpy().view(np.uint32).reshape(len(k), counts.shape[-1])
    words = np.stack(_words(k, 0, c), axis=-1).view(np.int32)
    return torch.from_numpy(words.reshape(*counts.shape, 2))


def _numpy_draw(keys: Tensor, what: str, size: int) -> Tensor:
    k = keys.numpy().view(np.uint32).reshape(-1, 2)
    out = np.empty((len(k), size), np.int32 if what == "bits" else np.float32)
    rows = max(1, _CHUNK // max(1, size))
    for i in range(0, len(k), rows):
        for j in range(0, size, _CHUNK):
            part = out[i : i + rows, j : j + _CHUNK]
            counts = np.arange(part.shape[1], dtype=np.uint32)[None] + np.uint32(j & _WORD)
            x0, x1 = _words(k[i : i + rows], j >> 32, counts)
            part[:] = _TRANSFORMS[what](_NUMPY, (x0 ^ x1).view(np.int32))
    return torch.from_numpy(out.reshape(*keys.shape[:-1], size))


# Two operators hide numpy from torch. (`torch.library.custom_op` does the same at four times the overhead.)

_LIBRARY = torch.library.Library("fnrl", "FRAGMENT")
_LIBRARY.define("random_keys(Tensor keys, Tensor counts) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define("random_draw(Tensor keys, str what, int size) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.impl("random_keys", _numpy_keys, "CPU")
_LIBRARY.impl("random_draw", _numpy_draw, "CPU")
_random_keys = torch.ops.fnrl.random_keys.default
_random_draw = torch.ops.fnrl.random_draw.default


def _fake_keys(keys: Tensor, counts: Tensor) -> Tensor:
    return counts.new_empty((*counts.shape, 2))


def _fake_draw(keys: Tensor, what: str, size: int) -> Tensor:
    return keys.new_empty((*keys.shape[:-1], size), dtype=torch.int32 if what == "bits" else torch.float32)


def _vmap_keys(info: Any, in_dims: tuple[int | None, int | None], *args: Tensor) -> tuple[Tensor, int]:
    pairs = zip(args, in_dims, strict=True)
    lanes = [x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0) for x, d in pairs]
    return _random_keys(*lanes), 0


def _vmap_draw(info: Any, in_dims: tuple[int, None, None], keys: Tensor, what: str, size: int) -> tuple[Tensor, int]:
    return _random_draw(keys.movedim(in_dims[0], 0), what, size), 0


torch.library.register_fake("fnrl::random_keys", _fake_keys, lib=_LIBRARY)
torch.library.register_fake("fnrl::random_draw", _fake_draw, lib=_LIBRARY)
torch.library.register_vmap("fnrl::random_keys", _vmap_keys, lib=_LIBRARY)
torch.library.register_vmap("fnrl::random_draw", _vmap_draw, lib=_LIBRARY)


def _on_numpy(key: Tensor) -> bool:
    return key.is_cpu and not torch.compiler.is_compiling()


def _keys(key: Tensor, counts: Tensor) -> Tensor:
    return _random_keys(key, counts) if _on_numpy(key) else _torch_keys(key, counts)


def _draw(key: Tensor, shape: Sequence[int], what: str) -> Tensor:
    draw = _random_draw if _on_numpy(_checked(key)) else _torch_draw
    dims = _shape(shape)
    return draw(key, what, math.prod(dims)).reshape(dims)
