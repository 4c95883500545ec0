"""Every example runs as it stands: those that take long for fewer steps, or among the slow tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "hindsight": {"env_steps": 1_500},
    "loop_parts": {"env_steps": 2_048},
    "loop_scheme": {"env_steps": 2_048},
    "off_policy": {"env_steps": 3_000},
    "seeds": {"env_steps": 1_024, "seeds": 2},
    "sweep": {"env_steps": 1_024},
    "your_own": {"env_steps": 1_024},
}
WHOLE = [p.name for p in sorted(EXAMPLES.glob("*.py")) if not p.name.startswith("test_")]


@pytest.mark.parametrize("name", SHORT)
def test_an_example_runs_for_a_while(name, capsys):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # what it defines pickles by name
    spec.loader.exec_module(module)
    assert module.main(**SHORT[name]) is not None
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WHOLE)
def test_an_example_runs_as_it_stands(name):
    subprocess.run([sys.executable, str(EXAMPLES / name)], check=True, timeout=600)


def test_the_example_for_components_passes_as_a_test():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(EXAMPLES / "test_your_component.py")], timeout=300)
    assert done.returncode == 0
