"""Networks as values: a configuration with `init(key, shape) -> named tensors` and `apply(tensors, x) -> y`.

`x` is `[..., *shape]` with any leading axes. A network of your own is `module(Class, **kwargs)`: any `nn.Module`
without hidden state or hidden randomness.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnrl import random
from fnrl.autodiff import under_transform
from fnrl.component import component, option, setting
from fnrl.errors import CompositionError

Tensors = dict[str, Tensor]


@runtime_checkable
class Network(Protocol):
    """What an actor needs of a network."""

    def init(self, key: Tensor, shape: tuple[int, ...]) -> Tensors: ...

    def apply(self, tensors: Tensors, x: Tensor) -> Tensor: ...

    def width(self, shape: tuple[int, ...]) -> int:
        """Features out, for inputs of `shape`."""
        ...


def orthogonal(key: Tensor, rows: int, columns: int, gain: float) -> Tensor:
    """A `[rows, columns]` matrix with orthonormal rows or columns, times `gain` (arXiv 1312.6120)."""
    tall = random.normal(key, (max(rows, columns), min(rows, columns))).double()
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))
    return (gain * (q if rows >= columns else q.T)).float().contiguous()


def _sigmoid(x: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.tanh(0.5 * x)


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)


def _elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))


# torch rounds some functions by where an element lies in its array, and lanes would then depend on their neighbours.
# These are the same functions to the last bit or two, of operations that round alike everywhere.
_STEADY: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.sigmoid: _sigmoid,
    F.sigmoid: _sigmoid,
    F.silu: lambda x: x * _sigmoid(x),
    F.softplus: _softplus,
    F.mish: lambda x: x * torch.tanh(_softplus(x)),
    F.elu: _elu,
    F.celu: _elu,
    F.selu: lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * _elu(x)),
}


@component
class MLP:
    """Dense layers of the given widths, each followed by the activation; orthogonal weights with gain sqrt(2), zero
    biases.
    """

    hidden: tuple[int, ...] = option(default=(64, 64), help="widths of the hidden layers")
    activation: Callable[[Tensor], Tensor] = option(
        default=torch.tanh, help="torch.tanh, torch.nn.functional.silu, ..."
    )

    def __post_init__(self) -> None:
        if not all(isinstance(h, int) and h > 0 for h in self.hidden):
            raise ValueError(f"MLP.hidden = {self.hidden!r}: expected a tuple of positive ints such as (64, 64)")
        try:
            same = self.activation(torch.zeros(2)).shape == (2,)
        except Exception as e:
            raise TypeError(f"MLP.activation = {self.activation!r} can't be called with a tensor alone: {e}") from e
        if not same or isinstance(self.activation, nn.Module):
            raise TypeError(
                f"MLP.activation = {self.activation!r}: expected a function from a tensor to one of its shape, such as "
                "torch.nn.functional.relu"
            )

    def init(self, key: Tensor, shape: tuple[int, ...]) -> Tensors:
        """Weights `[out, in]` and biases `[out]` as `0.weight, 0.bias, ...`."""
        out: Tensors = {}
        fan_in = math.prod(shape)
        for i, width in enumerate(self.hidden):
            out[f"{i}.weight"] = orthogonal(random.fold_in(key, i), width, fan_in, math.sqrt(2.0))
            out[f"{i}.bias"] = torch.zeros(width)
            fan_in = width
        return out

    def apply(self, tensors: Tensors, x: Tensor) -> Tensor:
        """Features `[..., width]` of inputs `[..., features]`."""
        activation = _STEADY.get(self.activation, self.activation)
        for i in range(len(self.hidden)):
            x = activation(F.linear(x, tensors[f"{i}.weight"], tensors[f"{i}.bias"]))
        return x

    def width(self, shape: tuple[int, ...]) -> int:
        """The last hidden width."""
        return self.hidden[-1] if self.hidden else math.prod(shape)


@component
class CNN:
    """The convolutions of arXiv 1312.5602 / Nature 2015 on images `[..., H, W, C]` scaled to [0, 1] (with
    `channels_first`, `[..., C, H, W]`: stacks of frames), and one dense layer.
    """

    filters: tuple[int, ...] = option(default=(32, 64, 64), help="channels of each convolution")
    kernels: tuple[int, ...] = option(default=(8, 4, 3), help="kernel sizes")
    strides: tuple[int, ...] = option(default=(4, 2, 1), help="strides")
    hidden: int = setting(default=512, help="width of the dense layer")
    channels_first: bool = option(default=False, help="whether channels, such as a stack of frames, come first")

    def __post_init__(self) -> None:
        layers = self.filters, self.kernels, self.strides
        if len({len(x) for x in layers}) > 1 or min((n for x in layers for n in x), default=1) < 1:
            raise ValueError(f"{self!r}: expected filters, kernels and strides of one length, positive ints all")

    def _sizes(self, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        if len(shape) != 3:
            raise CompositionError(f"CNN takes images [H, W, C], got observations of shape {shape}: use MLP")
        (c, h, w), read = (shape, "[C, H, W]") if self.channels_first else ((shape[2], *shape[:2]), "[H, W, C]")
        out = [(h, w, c)]
        for f, k, s in zip(self.filters, self.kernels, self.strides, strict=True):
            h, w, c = (h - k) // s + 1, (w - k) // s + 1, f
            if min(h, w) < 1:
                other = not self.channels_first
                raise CompositionError(
                    f"CNN: an image of shape {shape}, read as {read}, is too small for kernels {self.kernels}; if its "
                    f"channels come {'first' if other else 'last'}: CNN(channels_first={other})"
                )
            out.append((h, w, c))
        return out

    def init(self, key: Tensor, shape: tuple[int, ...]) -> Tensors:
        """Kernels `[out, in, k, k]`, the dense layer and biases."""
        sizes = self._sizes(shape)
        out: Tensors = {}
        for i, (f, k) in enumerate(zip(self.filters, self.kernels, strict=True)):
            fan_in = sizes[i][2] * k * k
            flat = orthogonal(random.fold_in(key, i), f, fan_in, math.sqrt(2.0))
            out[f"{i}.weight"], out[f"{i}.bias"] = flat.reshape(f, sizes[i][2], k, k), torch.zeros(f)
        last = len(self.filters)
        flat = orthogonal(random.fold_in(key, last), self.hidden, math.prod(sizes[-1]), math.sqrt(2.0))
        out[f"{last}.weight"], out[f"{last}.bias"] = flat, torch.zeros(self.hidden)
        return out

    def apply(self, tensors: Tensors, x: Tensor) -> Tensor:
        """Features `[..., hidden]`."""
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        x = x if self.channels_first else x.movedim(-1, 1)
        last = len(self.filters)
        for i, s in enumerate(self.strides):
            x = torch.relu(_convolve(x, tensors[f"{i}.weight"], tensors[f"{i}.bias"], s))
        x = torch.relu(F.linear(x.flatten(1), tensors[f"{last}.weight"], tensors[f"{last}.bias"]))
        return x.reshape(*lead, self.hidden)

    def width(self, shape: tuple[int, ...]) -> int:
        """The dense layer's width."""
        self._sizes(shape)
        return self.hidden


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """`F.conv2d`; of lanes as a product with patches: oneDNN's grouped convolutions round by the number of groups."""
    if torch.compiler.is_compiling() or not under_transform():
        return F.conv2d(x, weight, bias, stride=stride)
    k = weight.shape[-1]
    patches = x.unfold(2, k, stride).unfold(3, k, stride).permute(0, 2, 3, 1, 4, 5).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).movedim(-1, 1)


_HIDDEN = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase)


@component
class Module:
    """A user's own `nn.Module` class, built from the key and run functionally; see `module`."""

    skeleton: ClassVar[nn.Module]  # of each value, on the meta device
    widths: ClassVar[dict[tuple[int, ...], int]]  # by shape of the input

    cls: type[nn.Module]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # made here once: later would be inside a transform or a graph, where constructors may not draw
        object.__setattr__(self, "skeleton", self._build("meta"))
        object.__setattr__(self, "widths", {})

    def __reduce__(self) -> Any:
        return Module, (self.cls, self.kwargs), {"widths": self.widths}

    def _build(self, device: str) -> nn.Module:
        with torch.device(device):
            made = self.cls(**dict(self.kwargs))
        for name, part in made.named_modules():
            if isinstance(part, _HIDDEN) or (isinstance(part, nn.MultiheadAttention) and part.dropout > 0.0):
                why = "keeps no explicit state" if isinstance(part, nn.RNNBase) else "hides state or randomness"
                raise CompositionError(
                    f"{self.cls.__name__}.{name} is a {type(part).__name__}, which {why}; use LayerNorm, or a GRU part"
                )
        if next(made.buffers(), None) is not None:
            raise CompositionError(
                f"{self.cls.__name__} has buffers, which are hidden state; make them parameters or constants"
            )
        return made

    def init(self, key: Tensor, shape: tuple[int, ...]) -> Tensors:
        """The parameters that the class itself draws, from a seed made of the key."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.seed_of(key))
            made = self._build("cpu")
        return {n: p.detach().clone() for n, p in made.named_parameters()}

    def apply(self, tensors: Tensors, x: Tensor) -> Tensor:
        """The module's output with these parameters (a group may hold others besides)."""
        own = {n: tensors[n] for n, _ in self.skeleton.named_parameters()}
        return torch.func.functional_call(self.skeleton, own, (x,))

    def width(self, shape: tuple[int, ...]) -> int:
        """The size of the last axis of its output, found once for a shape, when parts are composed.

        Errors: CompositionError when the module does not take such inputs, or draws random numbers.
        """
        if shape not in self.widths:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                made = self._build("cpu")
                before = torch.random.get_rng_state()
                try:
                    out = made(torch.zeros(1, *shape))
                except (RuntimeError, TypeError, ValueError, IndexError) as e:
                    raise CompositionError(
                        f"{self.cls.__name__} does not take observations of shape {shape}: {e}"
                    ) from e
                if not torch.equal(before, torch.random.get_rng_state()):
                    raise CompositionError(f"{self.cls.__name__} draws random numbers as it is called: leave them out")
            self.widths[shape] = int(out.shape[-1])
        return self.widths[shape]


def module(cls: type[nn.Module], **kwargs: Any) -> Module:
    """A network from an `nn.Module` class and its arguments, by name so that it prints, compares and ships."""
    return Module(cls, tuple(sorted(kwargs.items())))


@component
class GRU:
    """A gated recurrent unit: arXiv 1406.1078, gates as `torch.nn.GRUCell`; memory `[..., size]`."""

    size: int = setting(default=64, help="width of the memory")

    def init(self, key: Tensor, features: int) -> Tensors:
        """Input and memory weights of the three gates, stacked."""
        gates = [
            [orthogonal(random.fold_in(key, 3 * side + g), self.size, fan_in, 1.0) for g in range(3)]
            for side, fan_in in ((0, features), (1, self.size))
        ]
        zeros = torch.zeros(3 * self.size)
        return {
            "x.weight": torch.cat(gates[0]),
            "h.weight": torch.cat(gates[1]),
            "x.bias": zeros,
            "h.bias": zeros.clone(),
        }

    def apply(self, tensors: Tensors, x: Tensor, memory: Tensor) -> Tensor:
        """The next memory, which is also the output."""
        xr, xz, xn = F.linear(x, tensors["x.weight"], tensors["x.bias"]).chunk(3, -1)
        hr, hz, hn = F.linear(memory, tensors["h.weight"], tensors["h.bias"]).chunk(3, -1)
        # not torch.sigmoid: its last elements are computed by other code, so that lanes would depend on their number
        r, z = (0.5 + 0.5 * torch.tanh(0.5 * gate) for gate in (xr + hr, xz + hz))
        return torch.lerp(torch.tanh(xn + r * hn), memory, z)


def linear(key: Tensor, features: int, out: int, gain: float) -> Tensors:
    """The tensors of one dense layer: orthogonal weights with `gain`, zero biases."""
    return {"weight": orthogonal(key, out, features, gain), "bias": torch.zeros(out)}
