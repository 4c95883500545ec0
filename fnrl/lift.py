"""Where a node runs: parts, executor, path, lanes; and how component methods are lifted over lanes and compiled.

A lifted method is the method itself for one seed, `torch.func.vmap` of it for S lanes (every tensor gains a leading
axis `[S]`), and either of them compiled. Tensors, and trees of them, are arguments; anything else (a component, a
number, None) is part of the program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fnrl import graphs, tree
from fnrl.parts import Parts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """The surroundings of a node: what never changes while it steps."""

    parts: Parts
    executor: Any
    path: tuple[int, ...] = ()
    lanes: int | None = None
    compile: bool = False
    device: str = "cpu"
    copy: bool = True  # whether gather and restore copy rings, or share their memory
    which: tuple[int, ...] = ()  # the numbers of the lanes, where they aren't 0, 1, ...
    least: float | None = None  # the part of a rollout after which a collector may be stopped; None for never
    place: tuple[int, int] = (0, 1)  # the number of this replica among all, through the levels, and how many they are

    def child(self, i: int, of: int | None = None, least: float | None = None) -> "Run":
        """The run of the i-th of so many replicas below this node (`of` is None where each is a run of its own); where
        two nodes may stop it, both their parts are made.
        """
        least = self.least if least is None else max(least, self.least or 0.0)
        number, among = self.place
        place = self.place if of is None else (number * of + i, among * of)
        return dataclasses.replace(self, path=(*self.path, i), place=place, least=least)

    @property
    def name(self) -> str:
        """`0.1` for the second replica of the first replica; `root` at the top."""
        return ".".join(map(str, self.path)) or "root"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each lane: it keeps it when others are dropped."""
        return self.which or tuple(range(self.lanes or 0))

    @property
    def axis(self) -> int:
        """The position of a record's first own axis (time): behind the lanes, if there are any."""
        return 0 if self.lanes is None else 1

    def lift(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method over lanes."""
        return method if self.lanes is None else _mapped(method)

    def graph(self, method: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
        """A method over lanes, compiled if this run compiles: for the few calls in which the time goes. What is read
        in several places is computed in each of them, or with `keep` once, as a gradient wants its activations.
        """
        return _compiled(method, self.lanes is not None, keep) if self.compile else self.lift(method)

    def together(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        """`loop(graph, ...)`, which calls graphs made by `graph`, one after another: on a GPU launched as one."""
        if not self.compile or self.device == "cpu":
            return functools.partial(loop, self.graph)
        return _recorded(loop, self.lanes is not None)

    def number(self, n: int) -> Tensor:
        """A number of the host as a tensor, int64, one for each lane: what changes from call to call goes into a lifted
        method so.
        """
        return torch.full(() if self.lanes is None else (self.lanes,), n, device=self.device)

    def places(self, n: int) -> Tensor:
        """Where each of this replica's n environments stands among those of all, in [0, 1]: `[n]`, for each lane."""
        return _places(*self.place, n, self.lanes, self.device)

    def over_lanes(self, make: Callable[[Tensor], T], key: Tensor) -> T:
        """`make(key)` for one key, or for each lane's key `[S, 2]` in a loop, stacked; made on the CPU, and moved to
        the device.
        """
        key = key.cpu()
        if self.lanes is None:
            return tree.to(make(key), self.device)
        return tree.to(tree.stack([make(k) for k in key.unbind(0)]), self.device)


@functools.lru_cache(maxsize=64)
def _places(number: int, among: int, n: int, lanes: int | None, device: str) -> Tensor:
    at = torch.arange(number * n, number * n + n, device=device) / max(among * n - 1, 1)
    return at if lanes is None else at.expand(lanes, n).contiguous()


def is_dynamic(x: Any) -> bool:
    """Whether an argument is a tree of tensors rather than part of the program."""
    return _kind_is_dynamic(type(x))


@functools.cache
def _kind_is_dynamic(cls: type) -> bool:
    return issubclass(cls, Tensor | tuple | list | dict) or hasattr(cls, "__fields__")


def _split(args: tuple[Any, ...]) -> tuple[list[Tensor], tuple[Any, ...], tree.Structure]:
    """Leaves of the dynamic arguments, the static ones (`...` in a dynamic one's place), and the structure."""
    dynamic = tuple(a for a in args if is_dynamic(a))
    leaves, structure = tree.flatten(dynamic, host=False)
    return leaves, tuple(... if is_dynamic(a) else a for a in args), structure


def _call(method: Callable[..., Any], statics: tuple[Any, ...], structure: tree.Structure, leaves: Any) -> Any:
    dynamic = iter(tree.unflatten(structure, leaves))
    return method(*(next(dynamic) if s is ... else s for s in statics))


@functools.lru_cache(maxsize=512)
def _mapped(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        leaves, statics, structure = _split(args)
        made: list[tree.Structure] = []

        def flat(*xs: Tensor) -> tuple[Tensor, ...]:
            out, out_structure = tree.flatten(_call(method, statics, structure, xs))
            made.append(out_structure)
            return tuple(out)

        out = torch.func.vmap(flat)(*leaves)
        return tree.unflatten(made[0], out)

    return run


@functools.lru_cache(maxsize=512)
def _compiled(method: Callable[..., Any], mapped: bool, keep: bool) -> Callable[..., Any]:
    def make(flat: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> graphs.Flat | None:
        return graphs.compiled(torch.func.vmap(flat) if mapped else flat, leaves, keep)

    return _made_once(method, _mapped(method) if mapped else method, make)


@functools.lru_cache(maxsize=512)
def _recorded(loop: Callable[..., Any], mapped: bool) -> Callable[..., Any]:
    def method(*args: Any) -> Any:
        return loop(lambda method, keep=False: _compiled(method, mapped, keep), *args)

    def make(flat: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> graphs.Flat | None:
        return graphs.recorded(lambda xs: [*flat(*xs)], leaves) if graphs.recordable(leaves) else None

    return _made_once(method, method, make)


def _made_once(method: Callable[..., Any], eager: Callable[..., Any], make: Callable[..., Any]) -> Callable[..., Any]:
    """A method as `make` makes it of a function of its leaves, for each kind of arguments; `eager` where it can't."""
    made: dict[Any, tuple[graphs.Flat, Callable[[Any], Any]] | None] = {}

    def run(*args: Any) -> Any:
        leaves: list[Tensor] = []
        which = tuple([tree.sign(a, leaves) if is_dynamic(a) else a for a in args])
        if which not in made:
            made[which] = _made(method, args, make)
        found = made[which]
        return eager(*args) if found is None else found[1](found[0](leaves))

    return run


def _made(
    method: Callable[..., Any], args: tuple[Any, ...], make: Callable[..., Any]
) -> tuple[graphs.Flat, Callable[[Any], Any]] | None:
    """The program of a method for arguments such as these, and how what it returns is built."""
    leaves, statics, structure = _split(args)
    made: list[tree.Structure] = []

    def flat(*xs: Tensor) -> tuple[Tensor, ...]:
        out, out_structure = tree.flatten(_call(method, statics, structure, xs))
        made.append(out_structure)
        return tuple(out)

    program = make(flat, leaves)
    return None if program is None else (program, tree.builder(made[0]))
