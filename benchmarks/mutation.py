"""Mutation testing of the mathematics: change one thing in a module, run its tests, and see whether they notice.

Each mutant is a forked process with the changed source in place of the module, so torch and the oracles are imported
once. A mutant that hangs counts as noticed. Survivors are printed as diffs.
"""

import argparse
import ast
import copy
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import HERE, Row, main

ROOT = HERE.parent
TESTS = {
    "returns": ["tests/test_returns.py"],
    "losses": ["tests/test_losses.py"],
    "optim": ["tests/test_optim.py"],
    "storages.rollout": ["tests/test_rollout.py"],
}
BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def silent_nodes(tree: ast.Module) -> set[int]:
    """Nodes whose change is no change of behaviour: annotations, docstrings, messages of errors, and lines of help."""
    out: set[int] = set()
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.AST):
                out.update(id(x) for x in ast.walk(part))
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            out.update(id(x) for x in ast.walk(body[0]))
        if isinstance(node, ast.Raise):
            out.update(id(x) for x in ast.walk(node))
        if isinstance(node, ast.keyword) and node.arg == "help":
            out.update(id(x) for x in ast.walk(node.value))
        if isinstance(node, ast.JoinedStr):
            out.update(id(x) for x in ast.walk(node))
    return out


def mutants(tree: ast.Module) -> Iterator[ast.Module]:
    """Every tree that differs in one operator, comparison, constant, argument, sign, condition or slice."""
    silent = silent_nodes(tree)
    for i, node in enumerate(ast.walk(tree)):
        if id(node) in silent:
            continue
        for change in changes(node):
            made = copy.deepcopy(tree)
            change(list(ast.walk(made))[i])
            yield ast.fix_missing_locations(made)


def changes(node: ast.AST) -> Iterator[Any]:
    """What can be changed at a node, as functions on its copy."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield lambda n: setattr(n, "op", BINARY[type(n.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield lambda n: n.ops.__setitem__(0, COMPARE[type(n.ops[0])]())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.UnaryOp):
        yield lambda n: setattr(n, "op", ast.UAdd() if isinstance(n.op, ast.USub) else ast.Not())
    if isinstance(node, ast.If | ast.IfExp):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Slice) and (node.lower or node.upper):
        yield lambda n: (setattr(n, "lower", None), setattr(n, "upper", None))
    if isinstance(node, ast.Call):
        for j in range(len(node.args)):
            if len(node.args) + len(node.keywords) > 1:
                yield lambda n, j=j: n.args.pop(j)
        for j, word in enumerate(node.keywords):
            if word.arg != "help":
                yield lambda n, j=j: n.keywords.pop(j)


class Swap(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the mutated source when the module is imported."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Only the one module."""
        return importlib.util.spec_from_loader(fullname, self, origin=str(self.path)) if fullname == self.name else None

    def exec_module(self, module: Any) -> None:
        """The mutant."""
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def survives(name: str, path: Path, tree: ast.Module, tests: list[str], limit: float) -> bool:
    """Whether the tests pass with this source."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.meta_path.insert(0, Swap(f"fnrl.{name}", path, tree))
            import pytest

            quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
            code = int(pytest.main([*quiet, *[str(ROOT / t) for t in tests]]))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def case(name: str) -> Any:
    """A case that mutates one module."""

    def run(args: argparse.Namespace) -> Iterator[Row]:
        path = ROOT / "fnrl" / (name.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text())
        before = ast.unparse(tree).splitlines()
        import chex, jax, numpy, optax, pytest, rlax, torch  # noqa: E401, F401, I001

        torch.set_num_threads(1)
        begin = time.monotonic()
        if not survives(name, path, tree, TESTS[name], 600.0):
            raise SystemExit(f"{TESTS[name]} fail without any mutation")
        limit = 20.0 + 10.0 * (time.monotonic() - begin)
        made = [m for m in mutants(tree) if ast.unparse(m).splitlines() != before]
        with ThreadPoolExecutor(args.jobs) as pool:
            alive = list(pool.map(lambda m: survives(name, path, m, TESTS[name], limit), made))
        diffs = []
        for mutant, lives in zip(made, alive, strict=True):
            if lives:
                lines = difflib.unified_diff(before, ast.unparse(mutant).splitlines(), n=0, lineterm="")
                diffs.append([x for x in lines if x[0] in "+-" and not x.startswith(("+++", "---"))])
                print("survived:", *diffs[-1], sep="\n    ", flush=True)
        killed = len(made) - len(diffs)
        yield Row(name, f"mutants killed, {killed} of {len(made)}", killed / len(made), 0.9, detail=diffs)

    run.__doc__ = f"Mutants of fnrl/{name.replace('.', '/')}.py noticed by {', '.join(TESTS[name])}: at least 90 %."
    return run


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jobs = {"type": int, "default": 2, "help": "mutants at once"}
    main(__doc__ or "", {name: case(name) for name in TESTS}, jobs=jobs)
