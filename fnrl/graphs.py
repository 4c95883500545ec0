"""Compilation: a function of tensors is traced into one graph of torch operations, which inductor makes C++ of, or for
a GPU kernels, which are recorded and launched together.

A graph is of one set of shapes and holds no state: tensors in, tensors out. What inductor makes is kept on disk (in
`TORCHINDUCTOR_CACHE_DIR`), so that another process traces again but compiles nothing.
"""

import dataclasses
import functools
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnrl.errors import CompilerWarning

# torch's compiler is imported where it is used: a run that compiles nothing should not wait a second for it

Flat = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_CPU: dict[str, Any] = {"cpp_wrapper": True}  # the calls between kernels are C++, too: half the cost of small ones
_KEEP: dict[str, Any] = {"realize_opcount_threshold": 8}  # operations that inductor would rather repeat than store: 30


@dataclasses.dataclass
class Spent:
    """Seconds that this process spent on compiling, and the graphs it made."""

    seconds: float = 0.0
    graphs: int = 0


SPENT = Spent()


def compiled(f: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor], keep: bool = False) -> Flat | None:
    """`f(*tensors)` for tensors of the shapes of `example`, as a function of their list; None without a compiler.

    With `keep`, less of what is read in several places is computed again in each.
    """
    if not _compiler():
        return None
    from torch._inductor.exc import InductorError

    begin = time.perf_counter()
    try:
        made = _compiled(f, example, keep)
    except (InductorError, ImportError) as error:  # as it was compiled, or found in the cache
        damaged = _DAMAGED.search(str(error))
        if damaged is None:
            raise
        os.unlink(damaged[1])
        made = _compiled(f, example, keep)
    SPENT.seconds += time.perf_counter() - begin
    SPENT.graphs += 1
    return made


# what a process that was killed while it compiled leaves on disk, for all later ones to stumble over
_DAMAGED = re.compile(r"ImportError: (\S+\.so): ")


def _compiled(f: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor], keep: bool) -> Flat:
    traced, fakes, mode = _trace(f, example)
    through = _outputs(traced)
    inputs = traced.graph.find_nodes(op="placeholder")
    kept = [i for i, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            traced.graph.erase_node(node)
    traced.recompile()
    nothing = all(given for given, _ in through)
    on_cpu = all(x.is_cpu for x in example)
    options = (_CPU if on_cpu else {}) | (_KEEP if keep else {})
    graph = (lambda _: ()) if nothing else _made(traced, [fakes[i] for i in kept], mode, options)
    writes = any(n.target is _ATEN.copy_.default for n in traced.graph.nodes)  # into an input: it must be the caller's
    if not (nothing or writes) and recordable(mine := [example[i] for i in kept]):
        graph = recorded(graph, mine)

    def run(xs: Sequence[Tensor]) -> Sequence[Tensor]:
        made = graph([x if (x := xs[i]).is_contiguous() else x.contiguous() for i in kept])
        return [xs[i] if given else made[i] for given, i in through]

    return run


def _trace(f: Callable[..., Any], example: Sequence[Tensor]) -> tuple[torch.fx.GraphModule, list[Any], Any]:
    """The graph, the stand-ins for the tensors it was traced with, and the mode that they are of."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.compiler import _compile_session_context  # type: ignore[attr-defined]
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # no shape varies, but inductor's cache takes no graph without a ShapeEnv
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    table = select_decomp_table()
    table = {**table, **{op: _either(rule, table.get(op)) for op, rule in _RULES.items()}}
    with torch.no_grad(), _compile_session_context(), mode:
        # of tensors of their own: one that is given twice, as fresh parameters and their target are, would be one input
        fakes = [mode.from_tensor(torch.empty(x.shape, dtype=x.dtype, device=x.device)) for x in example]
        return make_fx(torch.func.functionalize(f), decomposition_table=table)(*fakes), fakes, mode


def _either(rule: Callable[..., Any], other: Callable[..., Any] | None) -> Callable[..., Any]:
    """The rule, or where it doesn't apply inductor's own, if it has one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        made = rule(*args, **kwargs)
        return made if made is not NotImplemented or other is None else other(*args, **kwargs)

    return run


def _made(
    traced: torch.fx.GraphModule, fakes: list[Any], mode: Any, options: dict[str, Any]
) -> Callable[[list[Tensor]], Any]:
    """A function of a list, which it empties. By inductor alone: torch's own front end would trace the graph once more
    (a tenth of the time) and go over each call's arguments (6 us).
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    output: Any = traced.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    modes = tracing(TracingContext(mode)), V.set_fake_mode(mode), V.set_real_inputs(fakes)
    with torch.no_grad(), config.patch(options), modes[0], modes[1], modes[2]:  # type: ignore[attr-defined]
        cpp: Any = {"cpp_wrapper": config.cpp_wrapper, "is_inference": True}
        made: Any = compile_fx_inner(joint_graph_passes(traced), fakes, **cpp)
    return getattr(made, "current_callable", made)  # a graph of views alone comes back as it is


def recordable(xs: Sequence[Tensor]) -> bool:
    """Whether what computes with these tensors can be recorded: they are on one GPU, and can be held twice."""
    return bool(xs) and xs[0].is_cuda and len({x.device for x in xs}) == 1 and sum(x.nbytes for x in xs) <= _HELD


def recorded(f: Callable[[list[Tensor]], Any], example: Sequence[Tensor]) -> Flat:
    """`f` of a list of tensors like `example`, whose kernels a GPU launches together, as they were recorded here: one
    by one, most launches take the host longer than the kernel takes the GPU. Inputs are copied to where the recording
    reads, outputs from where it writes. `f` may not wait for the GPU; what it calls that is recorded is part of it.
    """
    own = [x.clone(memory_format=torch.contiguous_format) for x in example]
    cuda, where = torch.cuda.CUDAGraph(), example[0].device
    with torch.no_grad(), torch.cuda.device(where):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            f(list(own))  # what is loaded or chosen on first use can't be recorded
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(cuda, capture_error_mode="thread_local"):
            made = f(list(own))

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            return f(list(xs))
        with torch.no_grad(), torch.cuda.device(where):
            torch._foreach_copy_(own, list(xs))  # pyright: ignore[reportPrivateImportUsage]
            cuda.replay()
            return [x.clone() for x in made]

    return run


_HELD = 2**30  # bytes of inputs from which on kernels are not small


def _outputs(traced: torch.fx.GraphModule) -> list[tuple[bool, int]]:
    """Leaves to the graph what it computes; gives where each output comes from: an input, or what is left."""
    output: Any = traced.graph.output_node()
    inputs: list[Any] = list(traced.graph.find_nodes(op="placeholder"))
    (wanted,) = output.args
    made = list(dict.fromkeys(n for n in wanted if n not in inputs))
    output.args = (tuple(made),)
    return [(True, inputs.index(n)) if n in inputs else (False, made.index(n)) for n in wanted]


@functools.cache
def _compiler() -> bool:
    """Whether there is a C++ compiler; says so, once, if not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        warnings.warn(
            "compile=True needs a C++ compiler (g++ or clang++, or the one that $CXX names), and there is none: this "
            "run is eager, with the same results but several times slower",
            CompilerWarning,
            stacklevel=8,
        )
        return False
    return True


# How a graph computes some operations in other ways than eager torch, to a few units in the last place.

_TANH_ODD = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _tanh(x: Tensor) -> Tensor:
    """As Eigen and XLA: a ratio of polynomials, of sums and products alone, in a sixth of the library's time."""
    if x.dtype != torch.float32:
        return NotImplemented
    x = x.clamp(-7.90531110763549805, 7.90531110763549805)
    z = x * x
    return x * _horner(z, _TANH_ODD) / _horner(z, _TANH_EVEN)


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    p = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        p = p * x + c
    return p


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """`(b' a')'`, of few columns that lie side by side: the library takes two to six times as long for `a b`. In lanes
    a single row goes as one of two: inductor makes a loop of it that jumps from row to row of `b`.
    """
    few = 2 if b.dim() == 2 else 1
    if b.dim() == 3 and b.is_cpu and a.shape[-2] == 1 and min(b.shape[-2:]) >= _MANY and b.stride(-1) == 1:
        return torch.matmul(torch.cat([a, a], -2), b)[..., :1, :].contiguous()
    if not few <= b.shape[-1] < min(16, a.shape[-2]) or b.stride(-1) != 1:
        return NotImplemented
    return torch.matmul(b.mT, a.mT).mT


def _sum(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The columns of a matrix, such as a bias's gradient, by a product with ones: a loop would jump as well."""
    if not x.is_cpu or x.dim() not in (2, 3) or not dim or [d % x.dim() for d in dim] != [x.dim() - 2]:
        return NotImplemented
    if x.dtype != torch.float32 or dtype not in (None, x.dtype) or min(x.shape[-2:]) < _MANY or x.stride(-1) != 1:
        return NotImplemented
    total = torch.matmul(x.new_ones(*x.shape[:-2], 2, x.shape[-2]), x)
    return (total[..., :1, :] if keepdim else total[..., 0, :]).contiguous()


_MANY = 64  # rows and columns from which on a matrix is too large to be jumped about in

_ATEN = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.tanh.default: _tanh,
    _ATEN.mm.default: _mm,
    _ATEN.bmm.default: _mm,
    _ATEN.sum.dim_IntList: _sum,
}
