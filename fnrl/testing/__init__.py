"""The laws as a tool: what every environment, actor, algorithm, storage and topology must do, checked by hypothesis.

    from fnrl.testing import check_environment

    def test_my_environment():
        check_environment(MyEnvironment(num_envs=4))

A broken law raises `LawError`, which names the component, the law in words, and the leaf and input that show it.
The strategies make keys, spaces, rollouts, records and trees for tests of your own. `fnrl.testing.probes` holds five
environments whose values are known; `Shuffled` is an executor that draws what a cluster leaves to chance.
Needs hypothesis: `pip install 'fnrl[testing]'`.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as e:
    raise ImportError("fnrl.testing needs hypothesis: pip install 'fnrl[testing]'") from e

from fnrl.testing import probes
from fnrl.testing.actor import check_actor
from fnrl.testing.algorithm import check_algorithm
from fnrl.testing.environment import check_environment
from fnrl.testing.laws import LawError
from fnrl.testing.node import check_node
from fnrl.testing.shuffled import Shuffled
from fnrl.testing.storage import check_storage
from fnrl.testing.strategies import box, discrete, keys, records, rollouts, spaces, specs, trees

__all__ = [
    "LawError",
    "Shuffled",
    "box",
    "check_actor",
    "check_algorithm",
    "check_environment",
    "check_node",
    "check_storage",
    "discrete",
    "keys",
    "probes",
    "records",
    "rollouts",
    "spaces",
    "specs",
    "trees",
]
