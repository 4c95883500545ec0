"""Records: frozen dataclasses whose tensors are pytree leaves.

A field is one of three kinds. A plain field holds tensors, or trees of them, and crosses into `vmap`, `grad` and
compiled graphs. A `static()` field is configuration: hashable, part of the structure. A `host()` field is a counter
or a token that belongs to the host program: it travels with the state and never enters a lifted method
(`fnrl.tree.flatten(..., host=False)` leaves `HOST_ONLY` in its place), since a changing integer inside a compiled
graph means compiling again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar, dataclass_transform

import torch
from torch.utils import _pytree as torch_pytree

T = TypeVar("T")

_KIND = "fnrl.kind"

RECORDS: dict[str, type] = {}  # by `module.qualname`: with PLAIN, the only classes a checkpoint can name
PLAIN: dict[str, type] = {}


def name_of(cls: type) -> str:
    """`module.qualname`, the key of `RECORDS` and `PLAIN`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(cls: type[T]) -> type[T]:
    """Lets a frozen dataclass without tensors (a parameter layout) stand in static and host fields that are saved.

    Errors: TypeError when `cls` isn't a frozen dataclass.
    """
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"plain takes a frozen dataclass, got {cls!r}; put it above @dataclass(frozen=True)")
    PLAIN[name_of(cls)] = cls
    return cls


def static(**kwargs: Any) -> Any:
    """A field of configuration: hashable, compared as part of the tree's structure."""
    return dataclasses.field(metadata={_KIND: "static"}, **kwargs)


def host(**kwargs: Any) -> Any:
    """A field of the host program (a counter, a token): part of the state, invisible to lifted methods."""
    return dataclasses.field(metadata={_KIND: "host"}, **kwargs)


class _HostOnly:
    """What a lifted method finds in a `host()` field: any use of it is an error."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("a host() field is not available inside a lifted method: pass the number as a tensor")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __int__ = __float__ = __bool__ = __index__ = _refuse

    def __repr__(self) -> str:
        return "HOST_ONLY"


HOST_ONLY = _HostOnly()


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of a record's fields by kind; kept on the class as `__fields__`."""

    data: tuple[str, ...]
    static: tuple[str, ...]
    host: tuple[str, ...]

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """Of every kind."""
        return self.data + self.static + self.host


@dataclass_transform(frozen_default=True, field_specifiers=(static, host, dataclasses.field))
def record(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree: plain fields are children, `static()` and `host()` fields are
    structure.
    """
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    kinds = {f.name: f.metadata.get(_KIND, "data") for f in dataclasses.fields(made)}
    fields = Fields(*(tuple(n for n, kind in kinds.items() if kind == k) for k in ("data", "static", "host")))
    made.__fields__ = fields
    if "__repr__" not in cls.__dict__:
        made.__repr__ = _record_repr
    rest = fields.static + fields.host

    def flatten(x: Any) -> tuple[list[Any], Any]:
        return [getattr(x, n) for n in fields.data], tuple(getattr(x, n) for n in rest)

    def flatten_with_keys(x: Any) -> tuple[list[Any], Any]:
        return [(torch_pytree.GetAttrKey(n), getattr(x, n)) for n in fields.data], tuple(getattr(x, n) for n in rest)

    def unflatten(children: Any, context: Any) -> Any:
        return made(**dict(zip(fields.data, children, strict=True)), **dict(zip(rest, context, strict=True)))

    torch_pytree.register_pytree_node(made, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
    RECORDS[name_of(made)] = made
    return made


def made(cls: type[T], values: dict[str, Any]) -> T:
    """A record of all its fields' values, which it keeps: as `cls(**values)`, in half the time."""
    x = object.__new__(cls)
    object.__setattr__(x, "__dict__", values)
    return x


def replace(x: T, **changes: Any) -> T:
    """A record with other values in some fields: as `dataclasses.replace`, in less time.

    Errors: TypeError for a field that it doesn't have.
    """
    held = x.__dict__
    values = {n: held[n] for n in x.__fields__.all}  # type: ignore[attr-defined]
    values.update(changes)
    if len(values) > len(x.__fields__.all):  # type: ignore[attr-defined]
        raise TypeError(f"{type(x).__name__} has no field {sorted(set(values) - set(x.__fields__.all))}")  # type: ignore[attr-defined]
    return made(type(x), values)


def fields_of(cls: type) -> Fields:
    """The fields of a record class by kind."""
    return cls.__fields__  # type: ignore[attr-defined]


class cached(Generic[T]):  # noqa: N801
    """A property of a record, computed once; under torch.compile each time it is read (functools' takes a lock, which
    that can't).
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, x: Any, owner: Any = None) -> T:
        value = self.compute(x)
        if not torch.compiler.is_dynamo_compiling():
            x.__dict__[self.compute.__name__] = value
        return value


def once(compute: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of a record, computed once for each, as `cached` does for its own properties; each time where
    gradients flow through it, for a backward pass frees what it was made of.
    """
    name = f"{compute.__module__}.{compute.__qualname__}"

    @functools.wraps(compute)
    def of(x: Any) -> T:
        value = x.__dict__.get(name)
        if value is None:
            value = compute(x)
            learns = any(v.requires_grad for v in torch_pytree.tree_leaves(value) if isinstance(v, torch.Tensor))
            if not (learns or torch.compiler.is_dynamo_compiling()):
                x.__dict__[name] = value
        return value

    return of


def is_record(x: Any) -> bool:
    """Whether `x` is an instance of a class made by `record`."""
    return hasattr(type(x), "__fields__")


_SHORT = {"float32": "f32", "float64": "f64", "int64": "i64", "int32": "i32", "uint8": "u8", "bool": "bool"}


def short(x: Any) -> str:
    """`f32[128, 4]` for a tensor, `repr` for the rest."""
    if isinstance(x, torch.Tensor):
        name = str(x.dtype).removeprefix("torch.")
        return f"{_SHORT.get(name, name)}{list(x.shape)}"
    return repr(x)


def _record_repr(self: Any) -> str:
    fields = self.__fields__
    inside = ", ".join(f"{n}={short(getattr(self, n))}" for n in fields.data + fields.static + fields.host)
    return f"{type(self).__name__}({inside})"
