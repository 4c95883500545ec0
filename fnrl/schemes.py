"""Architectures by name, and by NAPPO's keywords: each is a topology, a value to print, compare and compose further."""

import inspect
from collections.abc import Callable
from typing import Any

from fnrl.component import nearest
from fnrl.errors import CompositionError
from fnrl.topology import asynchronous, centralised, collect, decentralised, gradients, synchronous

_COMMUNICATION = {"synchronous": "synchronous", "asynchronous": "asynchronous"}
_EXECUTION = {
    "centralised": "centralised",
    "decentralised": "decentralised",
    "centralized": "centralised",
    "decentralized": "decentralised",
}


def a2c(workers: int | None = None) -> Any:
    """One learner, and `workers` collectors in step, or none besides itself: A2C, PPO. arXiv 1707.06347."""
    return nappo(col_workers=workers)


ppo = a2c


def a3c(workers: int) -> Any:
    """Gradient workers that collect for themselves; each gradient is applied as it arrives. arXiv 1602.01783."""
    return nappo(grad_workers=workers, grad_communication="asynchronous")


def impala(workers: int, max_lag: int | None = None) -> Any:
    """One learner, and collectors that don't wait for it; with `VTrace` and A2C it is IMPALA. arXiv 1802.01561."""
    return nappo(col_workers=workers, col_communication="asynchronous", col_max_lag=max_lag)


def ape_x(workers: int, max_lag: int | None = None) -> Any:
    """The same with a replay: collectors fill one ring, by turns as they come. arXiv 1803.00933."""
    return impala(workers, max_lag)


def dppo(workers: int) -> Any:
    """Gradient workers that collect for themselves, averaged in one place. arXiv 1707.02286."""
    return nappo(grad_workers=workers)


def dd_ppo(workers: int, quorum: float = 1.0, samples: float = 1.0) -> Any:
    """Gradient workers that each apply the average, and need not wait for the slowest. arXiv 1911.00357."""
    return nappo(
        grad_workers=workers,
        update_execution="decentralised",
        grad_fraction_workers=quorum,
        grad_fraction_samples=samples,
    )


NAMED: dict[str, Callable[..., Any]] = {
    "a2c": a2c,
    "ppo": ppo,
    "a3c": a3c,
    "impala": impala,
    "ape_x": ape_x,
    "dppo": dppo,
    "dd_ppo": dd_ppo,
}


def named(name: str, **options: Any) -> Any:
    """The architecture of that name. Errors: CompositionError for an unknown one (with the nearest), or its options."""
    make = NAMED.get(name.lower().replace("-", "_")) if isinstance(name, str) else None
    if make is None:
        raise CompositionError(f"no scheme {name!r}{nearest(str(name), NAMED)}")
    takes = inspect.signature(make).parameters
    for option in options:
        if option not in takes:
            raise CompositionError(f"{name} has no option {option!r}{nearest(option, takes)}")
    missing = [n for n, p in takes.items() if p.default is p.empty and n not in options]
    if missing:
        raise CompositionError(f"{name} needs {' and '.join(missing)}: {name}({missing[0]}=4)")
    return make(**options)


def nappo(
    col_workers: int | None = None,
    col_communication: str = "synchronous",
    grad_workers: int | None = None,
    grad_communication: str = "synchronous",
    update_execution: str = "centralised",
    col_fraction_workers: float = 1.0,
    col_fraction_samples: float = 1.0,
    grad_fraction_workers: float = 1.0,
    grad_fraction_samples: float = 1.0,
    col_max_lag: int | None = None,
    grad_max_lag: int | None = None,
) -> Any:
    """The architecture that NAPPO's keywords name. Workers are those besides the one that has them; None is none.

    Errors: CompositionError for an unknown word (with the nearest), no workers where there must be some, and for what
    is no scheme (with the reason, and what is).
    """
    col = _word("col_communication", col_communication, _COMMUNICATION)
    grad = _word("grad_communication", grad_communication, _COMMUNICATION)
    execution = _word("update_execution", update_execution, _EXECUTION)
    node = _level("col", collect, col_workers, col, col_fraction_workers, col_fraction_samples, col_max_lag)
    node = gradients(node)
    if execution == "centralised":
        return centralised(
            _level("grad", node, grad_workers, grad, grad_fraction_workers, grad_fraction_samples, grad_max_lag)
        )
    if grad_workers is None:
        raise CompositionError(
            "update_execution='decentralised' has gradient workers apply updates, and there are none: pass "
            "grad_workers=2 or more, or update_execution='centralised'"
        )
    if grad == "asynchronous" or grad_max_lag is not None:
        raise CompositionError(
            "update_execution='decentralised' has workers average before any goes on, so that nothing is asynchronous: "
            "grad_communication='synchronous' is decentralised, update_execution='centralised' takes them as they come"
        )
    return decentralised(node, grad_workers, grad_fraction_workers, grad_fraction_samples)


def _level(
    which: str, node: Any, workers: int | None, how: str, quorum: float, samples: float, max_lag: int | None
) -> Any:
    if workers is None:
        said = [
            n
            for n, x, default in (
                (f"{which}_communication", how, "synchronous"),
                (f"{which}_fraction_workers", quorum, 1.0),
                (f"{which}_fraction_samples", samples, 1.0),
                (f"{which}_max_lag", max_lag, None),
            )
            if x != default
        ]
        if said:
            raise CompositionError(f"{said[0]} is about {which}_workers, and there are none: pass {which}_workers=2")
        return node
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise CompositionError(f"{which}_workers = {workers!r}: expected an int of at least 1; leave it out for none")
    if how == "asynchronous":
        if quorum != 1.0 or samples != 1.0:
            raise CompositionError(
                f"{which}_fraction_workers and {which}_fraction_samples say how long to wait for others; nobody waits "
                f"with {which}_communication='asynchronous': leave them out, or use 'synchronous'"
            )
        return asynchronous(node, workers, max_lag)
    if max_lag is not None:
        raise CompositionError(
            f"{which}_max_lag is about {which}_communication='asynchronous'; synchronous workers never lag"
        )
    return synchronous(node, workers, quorum, samples)


def _word(name: str, said: str, words: dict[str, str]) -> str:
    found = words.get(said.lower()) if isinstance(said, str) else None
    if found is None:
        raise CompositionError(f"{name} = {said!r}{nearest(str(said), words)}")
    return found
