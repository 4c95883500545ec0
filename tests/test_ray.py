"""Cells that die, hang and are lost: the run goes on, and ends with the bits of the undisturbed one."""

import contextlib
import dataclasses
import json
import random as python_random
import threading
import time

import pytest
import ray
from ray_cases import cell_pids, faulty, kill, left_behind, off_policy, on_policy, on_ray, owners

import fnrl
from fnrl import tree
from fnrl.checkpoint import CheckpointWarning
from fnrl.component import component, option
from fnrl.executor.ray.faults import kind_of
from fnrl.executor.ray.resources import refuse_more_than
from fnrl.logs import read_config
from fnrl.topology import asynchronous, centralised, collect, gradients, synchronous

COLLECTORS = centralised(gradients(synchronous(collect, 2)))
GRADIENTS = centralised(synchronous(gradients(collect), 2))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with left_behind() as left:
        ray.init(
            "local",
            num_cpus=4,
            resources={"seat": 8},
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()
    assert left == []


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


def test_cells_killed_together_change_no_bit():
    scheme = fnrl.Scheme(on_policy(), GRADIENTS, executor=on_ray())
    state, none = run(scheme, scheme.init(fnrl.key(0)), 13)
    for owner in cells_of(state):
        kill(owner.pid)
    state, faults = run(scheme, state, 9)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert (none, faults) == ({}, {"faults/died": 2.0})
    assert_same(on_policy(), GRADIENTS, gathered, 22)


@pytest.mark.slow
def test_a_cell_that_dies_while_it_recovers_and_cells_below_cells_change_no_bit():
    topology = centralised(synchronous(gradients(synchronous(collect, 2)), 2))
    parts = off_policy(fnrl.envs.CartPole(num_envs=1, time_limit=20), spread=7.0)
    scheme = fnrl.Scheme(parts, topology, executor=on_ray(snapshot_every=1000))
    state, none = run(scheme, scheme.init(fnrl.key(0)), 9)
    outer = {o.pid for o in cells_of(state)}
    kill(min(cell_pids() - outer))  # its cell replaces it
    state, below = run(scheme, state, 5)
    owner = cells_of(state)[0]
    first = owner.pid

    def again():
        while owner.pid in (None, first):
            time.sleep(0.001)
        kill(owner.pid)  # the replacement has said hello, and has its state and fourteen calls to make again

    watcher = threading.Thread(target=again, daemon=True)
    watcher.start()
    kill(first)
    state, faults = run(scheme, state, 6)
    watcher.join(timeout=0)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert (none, below, faults) == ({}, {"faults/died": 1.0}, {"faults/died": 2.0})
    assert_same(parts, topology, gathered, 20)


@pytest.mark.parametrize(
    ("parts", "topology", "updates"),
    [
        (on_policy(), GRADIENTS, 60),  # plans of eight, episodes of twenty steps in rollouts of 32
        (off_policy(fnrl.envs.gym("CartPole-v1", num_envs=2)), GRADIENTS, 100),  # rings of 24 rows
    ],
    ids=["plans", "rings"],
)
def test_cells_killed_at_drawn_points_change_no_bit(parts, topology, updates):
    scheme = fnrl.Scheme(parts, topology, executor=on_ray())
    drawn = python_random.Random(0)
    when = sorted(drawn.sample(range(2, updates - 1), 9))
    killed = set()  # processes: on a busy machine one may be drawn again before it is gone

    def before(i, state):
        if i in when:
            victims = [cells_of(state)[drawn.randrange(2)]] if i != when[4] else cells_of(state)
            for owner in victims:
                killed.add(owner.pid)
                threading.Timer(drawn.uniform(0.0, 0.005), kill, [owner.pid]).start()

    state, faults = run(scheme, scheme.init(fnrl.key(0)), updates, before)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert faults == {"faults/died": float(len(killed))}
    assert len(killed) >= 8
    assert_same(parts, topology, gathered, updates)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        pytest.param("hang", "hung", marks=pytest.mark.slow, id="hang"),
        pytest.param("die", "environment", id="simulator"),
        pytest.param("trip", "environment", id="raise"),
        pytest.param("born", "died", marks=pytest.mark.slow, id="start"),
    ],
)
def test_what_another_process_may_mend_is_tried_again(tmp_path, what, kind):
    parts = faulty(tmp_path, what)
    scheme = fnrl.Scheme(parts, COLLECTORS, executor=on_ray(deadline=8.0))
    state, faults = run(scheme, scheme.init(fnrl.key(1)), 25)
    gathered = scheme.gather(state)
    scheme.close(state)
    assert faults == {f"faults/{kind}": 1.0}
    assert_same(parts, COLLECTORS, gathered, 25, seed=1)


def test_what_an_environment_raises_again_comes_up_with_its_type_and_its_worker(tmp_path):
    scheme = fnrl.Scheme(faulty(tmp_path, "raise"), COLLECTORS, executor=on_ray())
    state = scheme.init(fnrl.key(0))
    with pytest.raises(fnrl.EnvironmentFault, match=r"worker 0 \(collect\): Once, environment 0.*gripper is st") as e:
        run(scheme, state, 25)
    assert any("in its cell" in note for note in e.value.__notes__)
    assert cells_of(state)[0].row == ["environment"]
    scheme.close(state)


@pytest.mark.slow
def test_a_cell_above_another_does_not_try_again_what_that_one_did(tmp_path):
    topology = centralised(synchronous(gradients(synchronous(collect, 1)), 1))
    scheme = fnrl.Scheme(faulty(tmp_path, "raise"), topology, executor=on_ray())
    with pytest.raises(fnrl.EnvironmentFault, match=r"worker 0 .*worker 0\.0 \(collect\).*gripper"):
        run(scheme, scheme.init(fnrl.key(0)), 40)
    assert (tmp_path / "mark").read_text() == "raised\n" * 2


def test_an_asynchronous_run_that_goes_on_is_told_again_what_ended_a_call(tmp_path):
    parts = dataclasses.replace(faulty(tmp_path, "raise"), storage=fnrl.VTrace(steps=16))
    scheme = fnrl.Scheme(parts, centralised(gradients(asynchronous(collect, 2))), on_ray())
    state, raised = scheme.init(fnrl.key(0)), []
    for _ in range(20_000):
        try:
            state, _ = scheme.step(state)
        except fnrl.EnvironmentFault as error:
            raised.append(str(error))
        if len(raised) == 3:
            break
    scheme.close(state)
    assert len(raised) == 3
    assert all("(collect): Once, environment 0" in x and "the gripper is stuck" in x for x in raised)


def test_an_asynchronous_run_goes_on_when_an_environment_raises(tmp_path):
    parts = dataclasses.replace(faulty(tmp_path, "trip"), storage=fnrl.VTrace(steps=16))
    scheme = fnrl.Scheme(parts, centralised(gradients(asynchronous(collect, 2))), on_ray())
    state, faults, updates = scheme.init(fnrl.key(0)), {}, 0
    while not faults and updates < 20_000:
        state, faults = run(scheme, state, 10)
        updates += 10
    scheme.close(state)
    assert faults == {"faults/environment": 1.0}
    assert updates > 100  # the other worker's, meanwhile


def test_a_worker_that_always_fails_stops_the_run(tmp_path):
    scheme = fnrl.Scheme(faulty(tmp_path, "end"), COLLECTORS, executor=on_ray(retries=1))
    state = scheme.init(fnrl.key(0))
    with pytest.raises(fnrl.ExecutorError, match=r"worker 0 \(collect\) failed 2 times in a row \(died, died\)") as e:
        run(scheme, state, 25)
    assert isinstance(e.value.__cause__, ray.exceptions.ActorDiedError)
    scheme.close(state)


def test_faults_are_told_in_the_metrics_and_kept_with_the_run(tmp_path):
    scheme = fnrl.Scheme(on_policy(), COLLECTORS, executor=on_ray())
    with fnrl.Learner(scheme, target_steps=5 * 256, log_dir=tmp_path / "run") as learner:
        learner.step(9)
        kill(cells_of(learner.state)[1].pid)
        learner.train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [n["faults/died"] for n in lines if n.get("event") == "recovered"] == [1.0]
    assert [n for n in lines if "event" not in n][-1]["faults/died"] == 1.0
    assert read_config(tmp_path / "run")["faults"] == {"faults/died": 1.0}
    with (
        pytest.warns(CheckpointWarning, match="executor"),
        fnrl.Learner.resume(tmp_path / "run", fnrl.Scheme(on_policy(), COLLECTORS)) as again,
    ):
        assert again.get_metrics()["faults/died"] == 1.0


def test_faults_that_end_a_run_are_counted_with_it(tmp_path):
    one = centralised(gradients(synchronous(collect, 1)))
    scheme = fnrl.Scheme(faulty(tmp_path, "end"), one, executor=on_ray(retries=1))
    with (
        pytest.raises(fnrl.ExecutorError, match="failed 2 times in a row"),
        fnrl.Learner(scheme, target_steps=10_000, log_dir=tmp_path / "run") as learner,
    ):
        learner.train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [n["faults/died"] for n in lines if n.get("event") == "fault"] == [2.0]
    assert read_config(tmp_path / "run")["faults"] == {"faults/died": 2.0}


def test_faults_met_as_the_last_state_is_gathered_are_told(tmp_path):
    scheme = fnrl.Scheme(on_policy(), COLLECTORS, executor=on_ray())
    with fnrl.Learner(scheme, target_steps=256, log_dir=tmp_path / "run") as learner:
        while not learner.done():
            learner.step()
        kill(cells_of(learner.state)[0].pid)
        metrics = learner.train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [n["faults/died"] for n in lines if n.get("event") == "recovered"] == [1.0]
    assert metrics["faults/died"] == 1.0
    assert read_config(tmp_path / "run")["faults"] == {"faults/died": 1.0}


@pytest.mark.slow
def test_faults_at_two_levels_are_told_together(tmp_path):
    """A cell below that was replaced, and then itself the one that fails for good: both levels' faults end the run."""
    topology = centralised(synchronous(gradients(synchronous(collect, 2)), 1))
    scheme = fnrl.Scheme(on_policy(), topology, executor=on_ray())
    with fnrl.Learner(scheme, target_steps=512, log_dir=tmp_path / "run") as learner:
        outer = {o.pid for o in cells_of(learner.state)}
        while not learner.done():
            learner.step()
        kill(min(cell_pids() - outer))  # its cell replaces it, asked for its state by the last save
        learner.train(progress=False)
    assert read_config(tmp_path / "run")["faults"] == {"faults/died": 1.0}

    scheme = fnrl.Scheme(faulty(tmp_path, "end"), topology, executor=on_ray(retries=1))
    with fnrl.Learner(scheme, target_steps=10_000, log_dir=tmp_path / "ended") as learner:
        kill(cells_of(learner.state)[0].pid)  # a fault of the upper level, before those of the lower one
        with pytest.raises(fnrl.ExecutorError, match=r"worker 0\.\d \(collect\) failed 2 times in a row"):
            learner.train(progress=False)
    assert read_config(tmp_path / "ended")["faults"]["faults/died"] >= 3.0


def test_a_learner_on_ray_resumes_to_the_bits_of_an_undisturbed_run(tmp_path):
    scheme = fnrl.Scheme(on_policy(), GRADIENTS, executor=on_ray())
    with fnrl.Learner(scheme, target_steps=6 * 256, log_dir=tmp_path / "run") as learner:
        learner.step(19)
        learner.save()
    with fnrl.Learner.resume(tmp_path / "run", scheme) as again:
        again.step(10)
        gathered = scheme.gather(again.state)
    assert_same(on_policy(), GRADIENTS, gathered, 29)


@pytest.mark.slow
def test_a_snapshot_bounds_what_is_kept():
    scheme = fnrl.Scheme(on_policy(), GRADIENTS, executor=on_ray(snapshot_every=3))
    state, most = scheme.init(fnrl.key(0)), 0
    for _ in range(70):
        state, _ = scheme.step(state)
        most = max(most, *(len(o.kept) for o in cells_of(state)))
    assert all(o.birth[0] == "restore" for o in cells_of(state))
    assert 3 <= most <= 16 * 3 + 1
    scheme.close(state)


# -- refused before anything starts ---------------------------------------------------------------------------------


@component
class Locked(fnrl.envs.CartPole):
    """It holds what can't be sent."""

    lock: object = option(default=threading.Lock(), help="a lock")


def wide(**ray_options):
    return fnrl.Scheme(
        on_policy(), centralised(synchronous(gradients(synchronous(collect, 2)), 2)), on_ray(**ray_options)
    )


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [{"CPU": 3.0}, {"CPU": 3.0}],
            r"3 collect cells ask for 2 CPU each, and the nodes .* have room for 2 .*3 CPU; 3",
        ),
        ([{"CPU": 1.0}, {"CPU": 1.5}], r"a collect cell asks for 2 CPU, and no node .*1 CPU; 1.5 CPU"),
        ([{"CPU": 4.0}], r"cells ask for 6 CPU .*3 collect cells with 2 each.* the cluster has 4"),
        ([{"CPU": 6.0}], None),
        ([{"CPU": 2.5}, {"CPU": 4.0}], None),
    ],
)
def test_cells_must_fit_on_the_nodes_not_on_their_sum(nodes, message):
    asked = [("collect", 3, fnrl.Resources(cpus=2.0))]
    refused = pytest.raises(fnrl.CompositionError, match=message) if message else contextlib.nullcontext()
    with refused:
        refuse_more_than(nodes, asked)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.OutOfMemoryError("no room"), "memory"),
        (ray.exceptions.ObjectLostError("ab", "cd", "ef"), "lost"),
        (ray.exceptions.GetTimeoutError(), "hung"),
        (ray.exceptions.WorkerCrashedError(), "died"),
        (ValueError("the node's own"), None),
    ],
)
def test_faults_have_their_kinds(error, kind):
    assert kind_of(error) == kind


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (lambda: wide(collect=fnrl.Resources(cpus=1.0)), r"ask for 4.4 CPU \(.*4 collect cells with 1 each.*has 4"),
        (lambda: wide(gradients=fnrl.Resources(gpus=1)), r"a gradients cell asks for 1 CPU \+ 1 GPU, and no node"),
        (lambda: wide(collect=fnrl.Resources(custom={"arm": 1})), r"collect cell asks for .*1 arm.*0 arm"),
        (lambda: fnrl.Scheme(on_policy(Locked()), COLLECTORS, on_ray()), r"parts\.env\.lock = .*lock.*can't be sent"),
        (
            lambda: fnrl.Scheme(on_policy(steps=500_000), COLLECTORS, on_ray()),
            r"one round needs 2\d\d MB in the object store .*weights of 0 MB, 2\d\d MB of products.*has 8\d MB",
        ),
    ],
    ids=["total", "gpu", "custom", "lock", "store"],
)
def test_what_the_cluster_cannot_hold_is_said_at_once(scheme, message):
    scheme = scheme()
    with pytest.raises(fnrl.CompositionError, match=message):
        scheme.init(fnrl.key(0))


def test_a_cell_that_others_leave_no_room_for_is_not_waited_for_for_ever():
    @ray.remote(num_cpus=3.5)
    class Other:
        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    scheme = fnrl.Scheme(on_policy(), COLLECTORS, on_ray(collect=fnrl.Resources(cpus=0.4), patience=3.0))
    message = (
        r"worker \d \(collect\) asks for 0\.4 CPU and did not start within 3 s; free in the cluster: 0\.1 of 4 CPU"
    )
    with pytest.raises(fnrl.ExecutorError, match=message):
        scheme.init(fnrl.key(0))
    ray.kill(other)


@pytest.mark.slow
def test_resources_are_those_of_each_kind():
    kinds = {"collect": fnrl.Resources(cpus=0.5, custom={"seat": 1}), "gradients": fnrl.Resources(cpus=0.25)}
    scheme = wide(**kinds)
    state = scheme.init(fnrl.key(0))
    expected = (4 - 4 * 0.5 - 2 * 0.25, 8 - 4)
    for _ in range(200):  # Ray takes a while to count back what the tests before have let go
        left = ray.available_resources()
        if (left["CPU"], left.get("seat", 0.0)) == expected:
            break
        time.sleep(0.1)
    assert (left["CPU"], left.get("seat", 0.0)) == expected
    scheme.close(state)


# -- workers that are not waited for ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_asynchronous_run_goes_on_while_a_worker_hangs_and_another_dies(tmp_path):
    parts = faulty(tmp_path, "hang")
    topology = centralised(gradients(asynchronous(collect, 3)))
    scheme = fnrl.Scheme(dataclasses.replace(parts, storage=fnrl.VTrace(steps=16)), topology, on_ray(deadline=6.0))
    state, faults, taken = scheme.init(fnrl.key(0)), {}, 0
    while set(faults) != {"faults/hung", "faults/died"} and taken < 4000:
        if taken == 120:
            workers = state.node.child.child
            kill(workers.calls[-1].state.token.owner.pid)
        state, info = scheme.step(state)
        faults |= {n: x for n, x in info.report.items() if n.startswith("faults/")}
        taken = state.node.child.child.taken
    scheme.close(state)
    assert faults == {"faults/hung": 1.0, "faults/died": 1.0}
    assert taken > 120


@pytest.mark.slow
def test_a_straggler_that_was_stopped_and_died_ends_where_it_did(tmp_path):
    topology = centralised(gradients(synchronous(collect, 2, quorum=0.5, samples=0.25)))
    parts = faulty(tmp_path, "slow", 64)
    scheme = fnrl.Scheme(parts, topology, executor=on_ray(snapshot_every=1000))
    state, lengths = scheme.init(fnrl.key(0)), []
    for i in range(40):
        if i == 33:
            before = scheme.gather(state)
            for owner in cells_of(state):
                kill(owner.pid)
            after = scheme.gather(state)  # by other cells, which made every rollout again
            assert tree.different_bits(before, after) == []
        state, info = scheme.step(state)
        lengths += [c.value for c in info.choices if c.kind == "length"]
    scheme.close(state)
    assert min(lengths) < 64
