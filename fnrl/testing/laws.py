"""The laws that every pure method and every component obeys, and the error that says which one was broken."""

import contextlib
import dataclasses
import inspect
import json
import pickle
import random as python_random
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrl import tree
from fnrl.errors import StaleStateError
from fnrl.executor.inline import Inline
from fnrl.lift import Run, is_dynamic
from fnrl.manifest import decode, encode
from fnrl.record import short

VALUE = "a component is a value: it prints, compares, hashes, pickles and does not change"
PURE = "a call changes none of its inputs"
QUIET = "a call leaves the global random generators alone"
SAME = "the same inputs give the same bits"
LANES = "a lane's bits do not depend on how many lanes there are"
SOLO = "a lane computes what it computes alone"
COMPILED = "compiled equals eager"
SHAPES = "shapes and dtypes are as declared"
FINITE = "finite in, finite out"
SAVED = "what is loaded is what was saved"
KEYS = "the key decides"
STALE = "a state that was stepped can't be stepped again"


class LawError(AssertionError):
    """A component broke a law; the message names the component, the law, and the leaf and input that show it."""


def broken(subject: Any, law: str, evidence: str) -> NoReturn:
    """Raises LawError; `subject` is a component, or text that names one."""
    raise LawError(f"{label(subject)} breaks the law '{law}': {evidence}")


def label(subject: Any) -> str:
    """A component's text, cut where it gets long."""
    text = subject if isinstance(subject, str) else repr(subject)
    return text if len(text) <= 200 else f"{text[:197]}..."


def for_all(law: Callable[..., None], max_examples: int, **given_as: st.SearchStrategy[Any]) -> None:
    """Runs `law(**drawn)` on `max_examples` draws, always the same ones; a failing one is told."""
    chosen = settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate],  # the draws are small as they are; shrinking would take minutes
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )
    chosen(given(**given_as)(law))()


# -- one call -------------------------------------------------------------------------------------------------------


def check_call(component: Any, method: Callable[..., Any], *args: Any) -> Any:
    """Calls a method twice under different global seeds and gives its result.

    Laws: no input changes (not even to the same bits, in place), the results have equal bits, and the generators of
    torch, numpy and Python are where they were.
    """
    name = f"{label(component)}.{method.__name__}"
    inputs = list(_leaves_of(method, args))
    before = [(path, x, x.clone(), x._version) for path, x in inputs]
    results: list[Any] = []
    for seed in (1, 2):
        with global_seed(seed) as moved:
            results.append(method(*args))
        if moved and seed == 2:  # the first call may import, and imports may draw
            broken(name, QUIET, f"it moved the generator of {' and of '.join(moved)}: draw from fnrl.random and a key")
    for path, x, copy, version in before:
        if not tree.same_bits(x, copy):
            broken(name, PURE, f"the input {path} {difference(x, copy)}")
        if x._version != version:
            broken(name, PURE, f"the input {path} ({short(x)}) was written in place, with the bits it had")
    same(name, SAME, results[0], results[1], "the first call", "the second")
    return results[0]


def check_lanes(component: Any, method: Callable[..., Any], *calls: tuple[Any, ...]) -> None:
    """Three calls of a method (as tuples of arguments, shapes alike) as lanes of one.

    Laws: of two lanes and of three, the first two have equal bits; each lane equals the call alone, to rounding.
    """
    name = f"{label(component)}.{method.__name__}"
    try:
        two, three = (_lifted(method, calls[:n]) for n in (2, 3))
    except (RuntimeError, TypeError, ValueError) as e:
        raise LawError(f"{name} breaks the law '{SOLO}': it does not run under vmap: {e}") from e
    same(name, LANES, tree.map(lambda x: x[:2], three), two, "three lanes", "two")
    for i, call in enumerate(calls):
        close(name, SOLO, tree.index(three, i), method(*call), f"lane {i}", "alone")


def check_compiled(component: Any, method: Callable[..., Any], *args: Any) -> None:
    """The method as one graph (traced by dynamo and AOT autograd, run without code generation): equal to rounding."""
    name = f"{label(component)}.{method.__name__}"
    leaves, structure = tree.flatten([a for a in args if is_dynamic(a)], host=False)

    def flat(*xs: Tensor) -> tuple[Tensor, ...]:
        dynamic = iter(tree.unflatten(structure, xs))
        return tuple(tree.leaves(method(*(next(dynamic) if is_dynamic(a) else a for a in args))))

    eager = tuple(tree.leaves(method(*args)))  # first, as a run does: what is cached on the host is cached by it
    try:
        graph: Any = torch.compile(  # type: ignore[call-overload]
            flat, fullgraph=True, dynamic=False, backend="aot_eager", isolate_recompiles=True
        )
        compiled = graph(*leaves)
    except Exception as e:
        raise LawError(f"{name} breaks the law '{COMPILED}': it does not trace into one graph: {e}") from e
    close(name, COMPILED, compiled, eager, "compiled", "eager")


def check_value(component: Any) -> None:
    """A component prints what it is, compares and hashes by value, survives a pickle, and refuses to be changed."""
    text = repr(component)
    address = re.search(r"<[^<>]* at 0x[0-9a-f]+>", text)
    if address:
        broken(component, VALUE, f"it prints {address[0]}, which says nothing of its value: use a module-level name")
    try:
        copy = pickle.loads(pickle.dumps(component))
        known = hash(component)
    except Exception as e:
        raise LawError(f"{label(component)} breaks the law '{VALUE}': {type(e).__name__}: {e}") from e
    if copy != component or hash(copy) != known or repr(copy) != text:
        broken(component, VALUE, f"its copy by pickle is another value, {label(copy)}")
    names = [f.name for f in dataclasses.fields(component)] if dataclasses.is_dataclass(component) else ["a"]
    try:
        for name in names:
            setattr(component, name, getattr(component, name, None))
    except dataclasses.FrozenInstanceError:
        return
    if names:
        broken(component, VALUE, f"its {names[0]} can be set: decorate its class with @fnrl.component")


def check_saved(component: Any, what: str, state: Any) -> None:
    """A state becomes a manifest and tensors, and comes back with its bits and its host fields."""
    try:
        structure, leaves, pieces = encode(state)
        again = decode(json.loads(json.dumps(structure)), {n: x.clone() for n, x in leaves.items()}, pieces.read)
    except Exception as e:
        raise LawError(f"{label(component)} breaks the law '{SAVED}': {what}: {e}") from e
    same(component, SAVED, again, state, f"{what} loaded", "saved")


# -- comparisons ----------------------------------------------------------------------------------------------------


def same(subject: Any, law: str, a: Any, b: Any, a_name: str, b_name: str) -> None:
    """Breaks `law` unless two trees have one structure and equal bits."""
    for path, x, y in _pairs(subject, law, a, b, a_name, b_name, host=True):
        if not tree.same_bits(x, y):
            broken(subject, law, f"{path} of {a_name} {difference(x, y)} of {b_name}")


def close(subject: Any, law: str, a: Any, b: Any, a_name: str, b_name: str, tolerance: float = 1e-4) -> None:
    """Breaks `law` unless the floats agree to `tolerance` (of the leaf's largest entry) and all else is equal."""
    for path, x, y in _pairs(subject, law, a, b, a_name, b_name, host=False):
        if x.dtype == y.dtype and x.shape == y.shape:
            if not x.is_floating_point():
                if torch.equal(x, y):
                    continue
            elif x.numel() == 0 or torch.allclose(
                x, y, rtol=tolerance, atol=0.1 * tolerance * (1.0 + float(y.detach().abs().max())), equal_nan=True
            ):
                continue
        broken(subject, law, f"{path} of {a_name} {difference(x, y)} of {b_name}")


def expect(subject: Any, what: str, x: Any, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Breaks `SHAPES` unless `x` is a tensor of this shape (None fits any size) and dtype."""
    fits = isinstance(x, Tensor) and len(x.shape) == len(shape)
    if not fits or any(d is not None and d != n for d, n in zip(shape, x.shape, strict=True)) or x.dtype != dtype:
        dims = ", ".join("any" if d is None else str(d) for d in shape)
        broken(subject, SHAPES, f"{what} is {short(x)}, expected {str(dtype).removeprefix('torch.')}[{dims}]")


def finite(subject: Any, what: str, x: Any) -> None:
    """Breaks `FINITE` if a float of the tree is not finite."""
    bad = tree.non_finite(x)
    if bad:
        broken(subject, FINITE, f"{what}{'.' if bad[0] else ''}{bad[0]} holds a NaN or an infinity")


def difference(x: Any, y: Any) -> str:
    """`at [0, 1] is 0.5, not 0.25`: where `x` first differs from `y`."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"is {short(x)}, not the {short(y)}"
    unlike = torch.nonzero((x != y) & ~((x != x) & (y != y)))
    if unlike.numel() == 0 and unlike.shape[0] == 0:
        return "differs in the sign of a zero from that"
    at = tuple(unlike[0].tolist())
    return f"at {list(at)} is {x[at].item()}, not the {y[at].item()}"


# -- inside ---------------------------------------------------------------------------------------------------------


def _pairs(subject: Any, law: str, a: Any, b: Any, *names: str, host: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    one, two = tree.flatten(a, host=host)[1], tree.flatten(b, host=host)[1]
    if one != two:
        broken(subject, law, f"{names[0]} and {names[1]} differ in structure: {_unlike(one, two)}")
    for (path, x), (_, y) in zip(tree.paths(a), tree.paths(b), strict=True):
        yield path or "the result", x, y


def _unlike(a: tree.Structure, b: tree.Structure) -> str:
    """The first node at which two structures differ."""
    if (a.kind, a.extra, len(a.children)) != (b.kind, b.extra, len(b.children)):
        one, two = (f"{getattr(s.kind, '__name__', 'a tensor')}{s.extra} of {len(s.children)}" for s in (a, b))
        return f"{label(one)} against {label(two)}"
    return next(_unlike(c, d) for c, d in zip(a.children, b.children, strict=True) if c != d)


def _leaves_of(method: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    names = list(inspect.signature(method).parameters)
    for i, arg in enumerate(args):
        if is_dynamic(arg):
            name = names[i] if i < len(names) else str(i)
            yield from ((f"{name}.{path}" if path else name, x) for path, x in tree.paths(arg))


def _lifted(method: Callable[..., Any], calls: tuple[tuple[Any, ...], ...]) -> Any:
    run: Any = Run(None, Inline(), lanes=len(calls))  # type: ignore[arg-type]
    stacked = (tree.stack(xs) if is_dynamic(xs[0]) else xs[0] for xs in zip(*calls, strict=True))
    return run.lift(method)(*stacked)


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[list[str]]:
    """Seeds the global generators inside, and puts them back; names those that were used."""
    kept = torch.get_rng_state(), np.random.get_state(), python_random.getstate()
    moved: list[str] = []
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed takes ten times as long
    np.random.seed(seed)
    python_random.seed(seed)
    start = _generators()
    try:
        yield moved
        moved += [name for name, now in _generators().items() if now != start[name]]
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        python_random.setstate(kept[2])


def _generators() -> dict[str, Any]:
    name, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(words).tobytes(), *rest),
        "Python": python_random.getstate(),
    }


def check_gather(component: Any, state: Any) -> Any:
    """What `component.gather(state)` gives: the same twice, and pure records that can be saved."""
    record = component.gather(state)
    same(component, SAME, record, component.gather(state), "gather", "gather again")
    check_saved(component, "what gather gives", record)
    return record


def refuses_stale(subject: Any, law: str, step: Callable[[], Any]) -> None:
    """Breaks `law` unless a step raises StaleStateError."""
    try:
        step()
    except StaleStateError:
        return
    broken(subject, law, "it was stepped, and raised no StaleStateError")
