"""What is not synchronous on Ray: recorded, and repeated in one process to the same bits."""

import warnings

import pytest
import ray
from ray_cases import faulty, kill, left_behind, on_policy, on_ray, owners

import fnrl
from fnrl import tree
from fnrl.apply import first_algo
from fnrl.executor.ray.cell import Cell
from fnrl.executor.ray.cluster import connect
from fnrl.executor.ray.wire import packed, shipped
from fnrl.lift import Run
from fnrl.record import is_record
from fnrl.topology import asynchronous, centralised, collect, decentralised, gradients, synchronous
from fnrl.types import Landed


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with left_behind() as left:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()
    assert left == []


def run(scheme, state, updates):
    choices = []
    for _ in range(updates):
        state, info = scheme.step(state)
        choices += info.choices
    return state, choices


def in_flight(x):
    """What calls that have landed will tell, once they are taken."""
    if isinstance(x, Landed):
        yield from x.info.choices
    below = (
        [getattr(x, n) for n in type(x).__fields__.data] if is_record(x) else x if isinstance(x, tuple | list) else ()
    )
    for y in below:
        yield from in_flight(y)


def assert_replays(parts, topology, choices, gathered, updates):
    """Whether one process, told the choices, comes to the same bits: calls in flight, too."""
    scheme = fnrl.Scheme(parts, topology, fnrl.Recorded([*choices, *in_flight(gathered)]))
    again, told = run(scheme, scheme.init(fnrl.key(0)), updates)
    assert told == choices
    assert tree.different_bits(scheme.gather(again), gathered) == []


NESTED = [
    centralised(gradients(asynchronous(collect, 2))),
    centralised(asynchronous(gradients(asynchronous(collect, 1)), 2, max_lag=3)),
    centralised(asynchronous(gradients(collect), 2)),
    centralised(asynchronous(gradients(synchronous(collect, 2)), 2)),
    decentralised(gradients(asynchronous(collect, 2)), 2),
    centralised(synchronous(asynchronous(gradients(collect), 2), 2)),
]


@pytest.mark.parametrize("topology", NESTED, ids=repr)
def test_an_asynchronous_run_replays_in_one_process_also_when_resumed(topology):
    parts = on_policy()
    scheme = fnrl.Scheme(parts, topology, on_ray())
    state, first = run(scheme, scheme.init(fnrl.key(0)), 13)
    pure = scheme.gather(state)
    after, more = run(scheme, state, 6)  # what was gathered goes on
    assert_replays(parts, topology, first + more, scheme.gather(after), 19)
    scheme.close(after)
    resumed, rest = run(scheme, scheme.restore(pure), 14)
    gathered = scheme.gather(resumed)
    scheme.close(resumed)
    assert_replays(parts, topology, first + rest, gathered, 27)
    fresh = fnrl.Scheme(parts, topology, fnrl.Recorded(first + rest))
    with pytest.raises(fnrl.ExecutorError, match="the record does not say which arrival was number"):
        run(fresh, fresh.restore(pure), 60)


STOPPED = [
    centralised(gradients(synchronous(collect, 3, quorum=0.3, samples=0.1))),
    centralised(synchronous(gradients(collect), 3, quorum=0.3, samples=0.1)),
    decentralised(gradients(collect), 3, quorum=0.3, samples=0.1),
    centralised(synchronous(gradients(synchronous(collect, 1)), 3, quorum=0.3, samples=0.1)),  # a cell stops its own
]


@pytest.mark.parametrize("topology", STOPPED, ids=repr)
def test_stopped_rollouts_are_recorded_and_replay(topology, tmp_path):
    parts = faulty(tmp_path, "slow", 300)  # one worker takes three seconds, the others (and who replays) do not
    scheme = fnrl.Scheme(parts, topology, on_ray())
    state, choices = run(scheme, scheme.init(fnrl.key(0)), 17)
    gathered = scheme.gather(state)
    scheme.close(state)
    lengths = [c.value for c in choices if c.kind == "length"]
    assert len(lengths) == 3 * 3  # plans, collectors
    assert 30 <= min(lengths) < 150 < max(lengths) == 300
    assert gathered.env_steps == 2 * sum(lengths)
    assert_replays(parts, topology, choices, gathered, 17)


def test_a_cell_that_is_lost_chooses_again_as_it_did():
    topology = centralised(synchronous(gradients(asynchronous(collect, 2)), 2))
    parts = on_policy()
    scheme = fnrl.Scheme(parts, topology, on_ray(snapshot_every=1000))
    state, first = run(scheme, scheme.init(fnrl.key(0)), 18)
    kill(owners(state.node.child)[1].pid)
    state, rest = run(scheme, state, 8)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert_replays(parts, topology, first + rest, gathered, 26)


def test_cells_below_a_cell_read_the_copy_of_the_weights_that_it_was_given(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # a cell keeps what is told
    parts, executor = on_policy(hidden=(256, 256)), on_ray()
    run_, node = Run(parts, executor), gradients(synchronous(collect, 2))
    weights = first_algo(run_, fnrl.key(0)).weights
    cell = Cell()  # in this process
    with executor.opening(run_, node):
        cell.begin([], 1, shipped(run_, node), "init", fnrl.key(0).numpy())
    made = packed(weights)
    assert made.size > 64 * 1024
    cell.step(ray.get(made.wire), 1, [made])
    assert [sent.wire for _, sent in connect(None, None)._published] == [made.wire]
    cell.finish()


def test_what_a_cell_warns_of_is_told_by_the_driver():
    topology = centralised(synchronous(gradients(asynchronous(collect, 2, max_lag=0)), 1))
    scheme = fnrl.Scheme(on_policy(), topology, on_ray())
    state = scheme.init(fnrl.key(0))
    with pytest.warns(fnrl.LagWarning, match="products 8 were dropped") as told:
        state, _ = run(scheme, state, 50)
    scheme.close(state)
    assert len(told) == 1


def test_decentralised_cells_hold_the_bits_of_one_process():
    parts = on_policy()
    there = fnrl.Scheme(parts, decentralised(gradients(collect), 2, check_every=1), on_ray())
    here = fnrl.Scheme(parts, centralised(synchronous(gradients(collect), 2)))
    a, b = there.init(fnrl.key(0)), here.init(fnrl.key(0))
    a, b = there.set(run(there, a, 5)[0], lr=1e-3), here.set(run(here, b, 5)[0], lr=1e-3)
    a, b = run(there, a, 12)[0], run(here, b, 12)[0]
    pure = there.gather(a)
    there.close(a)
    assert tree.different_bits(pure.node.algo, b.node.algo) == []


@pytest.mark.parametrize("child", [collect, synchronous(collect, 2)], ids=repr)
def test_a_replica_that_is_killed_goes_on_from_its_snapshot(child):
    topology, parts = decentralised(gradients(child), 2, check_every=1), on_policy()
    there, here = fnrl.Scheme(parts, topology, on_ray()), fnrl.Scheme(parts, topology)
    a, b = there.init(fnrl.key(0)), here.init(fnrl.key(0))
    killed = []
    for update in range(20):
        if update in (7, 8, 14):  # snapshots are every 4 updates; a plan has 8
            owner = owners(a.node.child)[update % 2]
            killed.append((owner, owner.pid))
            kill(owner.pid)
        if update == 16:
            a, b = there.set(a, lr=1e-3), here.set(b, lr=1e-3)
        a, b = there.step(a)[0], here.step(b)[0]
    pure = there.gather(a)
    assert all(owner.pid != pid for owner, pid in killed)
    assert [w.algo for w in pure.node.child.workers] == [(), ()]  # the root has it once
    resumed = there.restore(pure)
    there.close(a)
    a, b = run(there, resumed, 5)[0], run(here, b, 5)[0]
    last = there.gather(a)
    there.close(a)
    assert tree.different_bits(last, here.gather(b)) == []
