"""Configurations read back: from the JSON that `printed` makes to the value.

Nothing is imported because a file names it. Only fnrl's own components, spaces, nodes and executors are built, and
torch's activations by name. What else a configuration holds (a network class, an environment callable, a component
of the user's) stays with the user's code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fnrl.component import COMPONENTS, printed
from fnrl.envs import GymVector
from fnrl.errors import CheckpointError
from fnrl.executor import Inline, Ray, Recorded, Resources
from fnrl.networks import Module
from fnrl.scheme import Scheme
from fnrl.spaces import Box, Discrete, EnvSpec, Goal
from fnrl.topology import Asynchronous, Centralised, Collect, Decentralised, Gradients, Sharded, Synchronous

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}

_ALIASES = (F.tanh, F.relu, F.sigmoid)
_BY_PRINT = {printed(f): f for f in (*ACTIVATIONS.values(), *_ALIASES)}
_PLAIN = {
    f"{c.__module__}.{c.__qualname__}": c
    for c in (
        *(Box, Discrete, EnvSpec, Goal, Scheme, Inline, Recorded, Ray, Resources),
        *(Collect, Gradients, Synchronous, Asynchronous, Centralised, Decentralised, Sharded),
    )
}
_FLOATS = ("inf", "-inf", "nan")


def rebuild(config: Any, hint: str) -> Any:
    """The value that `printed` made `config` of.

    Errors: CheckpointError naming the place of what can't be rebuilt, with `hint` for what to do instead.
    """
    return _value(config, "", hint)


def _value(x: Any, path: str, hint: str) -> Any:
    if isinstance(x, list):
        return tuple(_value(v, f"{path}[{i}]", hint) for i, v in enumerate(x))
    if isinstance(x, dict):
        return _instance(x, path, hint)
    return float(x) if isinstance(x, str) and x in _FLOATS else x


def _instance(x: dict[str, Any], path: str, hint: str) -> Any:
    where, name = path or "the configuration", x.get("")
    cls = _PLAIN.get(str(name)) or (COMPONENTS.get(str(name)) if str(name).startswith("fnrl.") else None)
    if cls is None or cls is Module:
        what = x.get("cls") if cls is Module else name
        raise CheckpointError(
            f"{where} is {what!r}, which is not fnrl's own, so it can't be rebuilt from a file: {hint}"
        )
    if cls is GymVector and (x["wrappers"] or x["env"] != x["spec"]["name"]):  # an id is the name of its spec
        made = [*([] if x["env"] == x["spec"]["name"] else [x["env"]]), *x["wrappers"]]
        raise CheckpointError(f"{where} is made by {', '.join(made)}, which is not fnrl's own: {hint}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if set(x) - {""} != set(fields):
        raise CheckpointError(f"{where}: {name} has the fields {sorted(fields)}, the file has {sorted(set(x) - {''})}")
    values: dict[str, Any] = {}
    for key, field in fields.items():
        there, at = x[key], f"{path}.{key}" if path else key
        if callable(field.default) and isinstance(there, str):
            if there not in _BY_PRINT:
                raise CheckpointError(f"{at} is {there!r}, not an activation of torch's known here: {hint}")
            values[key] = _BY_PRINT[there]
        else:
            values[key] = _value(there, at, hint)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
