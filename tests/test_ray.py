"""Cells that die, hang and are lost: the run goes on, and ends with the bits of the undisturbed one."""

import random as python_random
import threading

import pytest
import ray
from ray_cases import kill, off_policy, on_policy, on_ray, owners

import fnrl
from fnrl import tree
from fnrl.topology import centralised, collect, gradients, synchronous

COLLECTORS = centralised(gradients(synchronous(collect, 2)))
GRADIENTS = centralised(synchronous(gradients(collect), 2))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def run(scheme, state, updates, before=lambda i, state: None):
    """The state after so many updates, and the faults of all of them together."""
    faults = {}
    for i in range(updates):
        before(i, state)
        state, info = scheme.step(state)
        for name, n in info.report.items():
            if name.startswith("faults/"):
                faults[name] = faults.get(name, 0) + n
    return state, faults


def assert_same(parts, topology, state, updates, seed=0):
    """Whether the gathered state has the bits of so many undisturbed updates in one process."""
    here = fnrl.Scheme(parts, topology)
    want, _ = run(here, here.init(fnrl.key(seed)), updates)
    assert tree.different_bits(here.gather(want), state) == []


def cells_of(state):
    below = state.node.child
    return owners(below if hasattr(below, "workers") else below.child)


@pytest.mark.parametrize(
    ("parts", "topology", "updates"),
    [
        (on_policy(), GRADIENTS, 40),  # plans of eight, episodes of twenty steps in rollouts of 32
        (off_policy(fnrl.envs.gym("CartPole-v1", num_envs=2)), GRADIENTS, 80),  # rings of 24 rows
    ],
    ids=["plans", "rings"],
)
def test_cells_killed_at_drawn_points_change_no_bit(parts, topology, updates):
    scheme = fnrl.Scheme(parts, topology, executor=on_ray())
    drawn = python_random.Random(0)
    when = sorted(drawn.sample(range(2, updates - 1), 5))

    def before(i, state):
        if i in when:
            victims = [cells_of(state)[drawn.randrange(2)]] if i != when[2] else cells_of(state)
            for owner in victims:
                threading.Timer(drawn.uniform(0.0, 0.005), kill, [owner.pid]).start()

    state, faults = run(scheme, scheme.init(fnrl.key(0)), updates, before)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert faults == {"faults/died": 6.0}
    assert_same(parts, topology, gathered, updates)
