"""A module imports only from lower floors (or its own package); heavy packages stay where they belong."""

import ast
from pathlib import Path

import fnrl

ROOT = Path(fnrl.__file__).parent
FLOORS = [
    {"record", "random", "check", "tree", "token", "errors"},
    {"component", "types", "spaces", "autodiff", "optim", "distributions", "returns", "losses", "networks"},
    {"actors", "envs"},
    {"algos", "storages"},
    {"parts", "graphs", "lift", "merge", "collect", "apply", "executor", "topology"},
    {
        "scheme",
        "schemes",
        "lanes",
        "report",
        "results",
        "rundir",
        "saved",
        "sweep",
        "tuning",
        "config",
        "evaluate",
        "history",
        "interrupts",
        "pieces",
        "manifest",
        "checkpoint",
        "policy",
        "learner",
        "settings",
        "logs",
        "plots",
        "presets",
    },
    {"cli", "testing", "__main__"},
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}
SHELLS = {"ray": {"executor"}, "gymnasium": {"envs", "spaces", "presets", "testing"}, "chex": {"check"}, "jax": set()}
SHELLS |= {
    "hypothesis": {"testing"},
    "rich": {"logs", "cli"},
    "matplotlib": {"plots"},
    "optuna": {"tuning"},
    "safetensors": {"pieces", "checkpoint", "policy"},
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        name = inside.parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            if node.module == "fnrl":
                yield from (f"fnrl.{alias.name}" for alias in node.names)


def test_every_module_stands_on_a_floor():
    assert {name for name, _, _ in modules()} <= set(FLOOR)


def test_modules_import_only_from_lower_floors():
    wrong = []
    for name, path, tree in modules():
        for other in imported(tree):
            parts = other.split(".")
            if parts[0] != "fnrl" or len(parts) == 1 or parts[1] not in FLOOR or parts[1] == name:
                continue
            if FLOOR[parts[1]] > FLOOR[name]:
                wrong.append(
                    f"{path.relative_to(ROOT)} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[parts[1]]})"
                )
    assert wrong == []


def test_heavy_packages_stay_in_their_shells():
    wrong = []
    for name, path, tree in modules():
        for other in imported(tree):
            allowed = SHELLS.get(other.split(".")[0])
            if allowed is not None and name not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert wrong == []


def test_topology_knows_no_algorithm_and_no_ray():
    names = {n for path in (ROOT / "topology").glob("*.py") for n in imported(ast.parse(path.read_text()))}
    assert "fnrl.merge" in names
    assert not {
        n for n in names if n.startswith(("ray", "fnrl.algos", "fnrl.storages", "fnrl.actors", "fnrl.executor"))
    }


def test_files_fit_in_the_head():
    assert [str(p.relative_to(ROOT)) for _, p, _ in modules() if len(p.read_text().splitlines()) > 420] == []


def test_the_public_surface_is_what_init_says():
    assert sorted(fnrl.__all__, key=str) == sorted(set(fnrl.__all__), key=str)
    assert all(hasattr(fnrl, name) for name in fnrl.__all__)


def test_importing_fnrl_brings_neither_ray_nor_jax():
    import subprocess
    import sys

    code = "import sys, fnrl; heavy = 'ray jax chex hypothesis matplotlib pybullet'.split(); "
    code += "print([m for m in heavy if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert out.stdout.strip() == "[]"


def test_an_editable_install_is_found_by_a_script_beside_the_clone():
    """A folder `fnrl` without `__init__.py` hides what an import hook finds, but not what a plain path entry does."""
    for file, command in (("Makefile", "--editable"), ("README.md", "pip install -c constraints.txt -e")):
        lines = [x for x in (ROOT.parent / file).read_text().splitlines() if command in x]
        assert lines
        assert all("--config-settings editable_mode=compat" in x for x in lines)
