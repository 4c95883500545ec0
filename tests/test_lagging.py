"""What lags and what is cut short: V-trace, lag that is bounded, rollouts of unequal length, rings that are filled by
turns.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import warnings

import pytest
import torch
from test_schemes import ENV, parts, run

import fnrl
from fnrl import returns, schemes, tree
from fnrl.cli import main
from fnrl.lift import Run
from fnrl.testing import Shuffled, check_storage
from fnrl.topology import asynchronous, centralised, collect, gradients, synchronous


class Reversed(fnrl.Inline):
    """The newest call always arrives first."""

    def arrival(self, run, calls, taken):
        return len(calls) - 1


def lags(infos, name):
    return [n for info in infos for n in info.lags.get(f"scheme/metrics/{name}", ())]


def test_lag_is_measured_in_versions():
    scheme = fnrl.Scheme(parts(), schemes.impala(workers=2))  # plans of four updates, taken in turn
    _, infos = run(scheme, scheme.init(fnrl.key(0)), 20)
    assert lags(infos, "collection_lag") == [0, 4, 8, 8, 8]
    assert set(lags(infos, "gradient_lag")) == {0}
    scheme = fnrl.Scheme(parts(), schemes.a3c(workers=3))
    _, infos = run(scheme, scheme.init(fnrl.key(0)), 8)
    assert lags(infos, "gradient_lag") == [0, 1, 2, 2, 2, 2, 2, 2]
    scheme = fnrl.Scheme(parts(), schemes.dppo(workers=2))
    _, infos = run(scheme, scheme.init(fnrl.key(0)), 8)
    assert {*lags(infos, "gradient_lag"), *lags(infos, "collection_lag")} == {0}


def test_max_lag_is_strict():
    topology = centralised(asynchronous(gradients(collect), 3, max_lag=4))
    free = fnrl.Scheme(parts(), schemes.a3c(workers=3), Reversed())
    _, infos = run(free, free.init(fnrl.key(0)), 12)
    assert lags(infos, "gradient_lag") == [0] * 12  # two workers starve
    scheme = fnrl.Scheme(parts(), topology, Reversed())
    _, infos = run(scheme, scheme.init(fnrl.key(0)), 12)
    assert max(lags(infos, "gradient_lag")) == 4
    assert sum(info.report.get("scheme/dropped", 0) for info in infos) == 1  # of two that reach it together, one
    with_choice = [c.count for info in infos for c in info.choices]
    assert with_choice != list(range(len(with_choice)))  # what could not be otherwise is no choice
    for max_lag in (0, 3, 9):
        scheme = fnrl.Scheme(parts(), centralised(gradients(asynchronous(collect, 3, max_lag=max_lag))), Shuffled(1))
        with pytest.warns(fnrl.LagWarning) if max_lag < 9 else contextlib.nullcontext():
            _, infos = run(scheme, scheme.init(fnrl.key(0)), 24)
        assert max(lags(infos, "collection_lag")) <= max_lag


def test_a_limit_that_drops_most_of_the_work_is_told_once():
    scheme = fnrl.Scheme(parts(), centralised(gradients(asynchronous(collect, 3, max_lag=1))))
    with pytest.warns(fnrl.LagWarning, match=r"max_lag=1\): of 16 products 12 .* are 12 versions old") as told:
        state, _ = run(scheme, scheme.init(fnrl.key(0)), 60)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(scheme, scheme.restore(scheme.gather(state)), 20)
        wide = fnrl.Scheme(parts(), centralised(gradients(asynchronous(collect, 3, max_lag=12))))
        run(wide, wide.init(fnrl.key(0)), 60)


def test_vtrace_is_told_the_present_policy():
    check_storage(fnrl.VTrace(steps=5), max_examples=2)
    ours = parts(fnrl.VTrace(steps=8))
    scheme = fnrl.Scheme(ours, schemes.impala(workers=2))
    state, _ = run(scheme, scheme.init(fnrl.key(0)), 9)  # the plan under way is of a rollout eight versions old
    weights = state.weights
    flight = state.node.child.child.calls[0].product  # of version 4, its ratios to the present policy are not 1
    assert flight.version == 4
    storage = ours.storage.append(ours.storage.init(), flight)
    batch = ours.storage.prepare(storage, ours.actor, weights)
    steps, h = flight.steps, weights.hyper
    seen = weights.normaliser(steps.obs)
    starts = torch.zeros_like(steps.truncated)
    logp, _, value, _ = ours.actor.evaluate(weights.params, seen, steps.memory[0], starts, steps.action)
    following = weights.normaliser(steps.next_obs)
    next_value, _ = ours.actor.values(weights.params, following, steps.memory[0], starts)
    advantage, target = returns.vtrace(
        logp, steps.logp, steps.reward, value, next_value, steps.terminated, steps.truncated, h["gamma"]
    )
    assert float((logp - steps.logp).abs().max()) > 1e-4
    close = torch.testing.assert_close
    close(batch.advantage.reshape(8, 2), advantage)
    close(batch.target.reshape(8, 2), target)
    close(batch.logp.reshape(8, 2), logp)  # a ratio is to the policy at the plan's beginning


@dataclasses.dataclass(frozen=True)
class After(fnrl.Inline):
    """Every rollout that may be stopped is stopped after so many steps."""

    steps: int = 3

    def stopped(self, run, rollout, steps):
        return steps >= self.steps


def test_a_rollout_that_is_stopped_is_a_rollout_cut_there():
    topology = synchronous(collect, 2, quorum=0.5, samples=0.1)
    scheme = fnrl.Scheme(parts(), centralised(gradients(topology)), After())
    run_ = scheme._run(scheme.init(fnrl.key(0)))
    weights = scheme.init(fnrl.key(0)).weights
    begun = topology.init(run_, fnrl.key(0))
    state, rollout, info = topology.step(run_, begun, weights)
    whole_run = dataclasses.replace(run_, executor=fnrl.Inline())
    _, whole, _ = topology.step(whole_run, topology.init(whole_run, fnrl.key(0)), weights)
    assert [(c.kind, c.node, c.value) for c in info.choices] == [("length", "0", 3), ("length", "1", 3)]
    assert whole.valid == ()
    assert rollout.valid.tolist() == [[True] * 4] * 3 + [[False] * 4] * 5
    assert rollout.env_steps == 3 * 4
    assert rollout.steps.obs.shape == whole.steps.obs.shape
    for name in ("obs", "action", "logp", "next_obs", "terminated"):
        assert torch.equal(getattr(rollout.steps, name)[:3], getattr(whole.steps, name)[:3]), name
    assert bool((rollout.steps.terminated | rollout.steps.truncated)[2].all())  # bootstrapped from where it was
    assert not bool((rollout.steps.terminated & rollout.steps.truncated)[2].any())
    assert float(rollout.moments.count) == 12
    _, following, _ = topology.step(run_, state, weights)  # the episodes go on
    assert torch.equal(
        following.steps.obs[0],
        torch.where(whole.steps.terminated[2, :, None], following.steps.obs[0], whole.steps.obs[3]),
    )


def test_minibatches_are_drawn_among_what_happened():
    storage, plan = fnrl.GAE(steps=8), fnrl.PPO(epochs=3, minibatches=4).plan
    actor = fnrl.OnPolicyActorCritic(ENV.spec)
    valid = torch.ones(8, 6, dtype=torch.bool)
    valid[3:, :2], valid[5:, 4:] = False, False
    index = storage.order(actor, plan, 6, fnrl.key(0), valid)
    assert index.shape == storage.order(actor, plan, 6, fnrl.key(0)).shape == (12, 12)
    good = set(torch.nonzero(valid.flatten()).flatten().tolist())
    for epoch in index.reshape(3, 48):
        assert set(epoch.tolist()) == good
        assert epoch.bincount().max() <= math.ceil(48 / len(good))
    assert not torch.equal(index[:4], index[4:8])
    full = torch.ones_like(valid)
    assert torch.equal(storage.order(actor, plan, 6, fnrl.key(0), full), storage.order(actor, plan, 6, fnrl.key(0)))


def test_nothing_of_a_filled_up_step_is_learnt():
    scheme = fnrl.Scheme(parts(), centralised(gradients(synchronous(collect, 2, quorum=0.5, samples=0.1))), After())

    def poisoned(run, rollout, steps):
        made = filled(run, rollout, steps)
        spoil = tree.map(lambda x: torch.where(_like(~made.valid, x), x.new_full((), 77), x), made.steps)
        keep = dataclasses.replace(spoil, terminated=made.steps.terminated, truncated=made.steps.truncated)
        return dataclasses.replace(made, steps=dataclasses.replace(keep, action=made.steps.action))

    def _like(mask, x):
        return mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))

    collecting = importlib.import_module("fnrl.collect")
    filled = collecting._filled
    want, _ = run(scheme, scheme.init(fnrl.key(0)), 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "_filled", poisoned)
        got, _ = run(scheme, scheme.init(fnrl.key(0)), 9)
    assert tree.different_bits(want.weights, got.weights) == []


def test_collectors_that_fill_one_ring_by_turns_keep_their_successors_apart():
    actor = fnrl.OffPolicyActorCritic(ENV.spec, None, fnrl.MLP((8,)), critics=1, explore=fnrl.EpsilonGreedy())
    replay = fnrl.Replay(capacity=64, steps=3, warmup=16, n_step=3)
    ours = fnrl.Parts(ENV, actor, fnrl.DQN(batch=8, ratio=0.5), replay)
    scheme = fnrl.Scheme(ours, schemes.ape_x(workers=2), Shuffled(3))
    state, _ = run(scheme, scheme.init(fnrl.key(0)), 20)
    ring = state.node.child.storage.token.take()
    places = torch.arange(ring.size * 2)
    batch = replay.sample(ring.rows, state.weights, places, torch.ones(len(places)), ring.where)
    # CartPole moves its cart by its speed: x' = x + tau v, whoever took the step; one of another collector would not
    rows = ring.rows.obs.flatten(0, 1)[places]
    one = dataclasses.replace(replay, n_step=1)
    batch = one.sample(ring.rows, state.weights, places, torch.ones(len(places)), ring.where)
    torch.testing.assert_close(batch.next_obs[:, 0], rows[:, 0] + 0.02 * rows[:, 1], rtol=1e-5, atol=1e-6)
    resumed = scheme.restore(scheme.gather(state))
    a, b = run(scheme, state, 9)[0], run(scheme, resumed, 9)[0]
    assert tree.different_bits(scheme.gather(a), scheme.gather(b)) == []
    with pytest.raises(fnrl.CompositionError, match=r"collectors take turns in the ring: pass frames=None"):
        dataclasses.replace(replay, frames=fnrl.Frames(count=2)).check_interleaved()


def test_every_environment_explores_as_far_as_its_place_says():
    n, spread = 3, 7.0
    places = torch.cat([Run(None, None).child(i, 2).child(j, 2).places(n) for i in range(2) for j in range(2)])
    explore = fnrl.EpsilonGreedy(epsilon=0.4, spread=spread)
    found = explore.placed({"epsilon": torch.tensor(0.4)}, places)["epsilon"]
    want = [0.4 ** (1 + spread * i / (4 * n - 1)) for i in range(4 * n)]  # arXiv 1803.00933, section 4
    torch.testing.assert_close(found, torch.tensor(want))
    assert Run(None, None, lanes=2).child(1, 2).places(1).tolist() == [[1.0], [1.0]]
    assert Run(None, None).places(1).tolist() == [0.0]
    alike = {"epsilon": torch.tensor(0.4)}
    assert fnrl.EpsilonGreedy().placed(alike, places) is alike


@pytest.mark.parametrize("lanes", [None, 2])
def test_the_last_collector_of_ape_x_is_all_but_greedy(lanes):
    env = fnrl.envs.CartPole(num_envs=1)
    explore = fnrl.EpsilonGreedy(epsilon=0.9, spread=200.0)  # 0.9 and 6e-10
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((8,)), critics=1, explore=explore)
    ours = fnrl.Parts(env, actor, fnrl.DQN(batch=8, ratio=0.5), fnrl.Replay(capacity=64, steps=32, warmup=32))
    scheme = fnrl.Scheme(ours, centralised(gradients(synchronous(collect, 2))))
    state = scheme.init(fnrl.key(0) if lanes is None else fnrl.seeds(lanes))
    run_, weights = scheme._run(state), dataclasses.replace(state.weights, version=1)
    _, rollout, _ = synchronous(collect, 2).step(run_, state.node.child.child, weights)
    steps = rollout.steps if lanes is None else tree.index(rollout.steps, 1)
    params = weights.params if lanes is None else tree.index(weights.params, 1)
    greedy = actor.q(params, actor.features(params, steps.obs.flatten(0, 1)))[0].argmax(-1).reshape(32, 2)
    assert float((steps.action != greedy).float().mean(0)[0]) > 0.25
    assert torch.equal(steps.action[:, 1], greedy[:, 1])


def test_a_learner_records_and_the_record_replays(tmp_path):
    topology = centralised(asynchronous(gradients(asynchronous(collect, 2)), 2))
    scheme = fnrl.Scheme(parts(), topology, Shuffled(5))
    with fnrl.Learner(scheme, 10_000, tmp_path / "run") as learner:
        learner.step(9)
        learner.save()
        learner.step(4)  # lost: the process ends without a save
        metrics = learner.get_metrics()
    assert metrics["scheme/metrics/gradient_lag"] > 0
    with fnrl.Learner.resume(tmp_path / "run", scheme) as learner:
        learner.step(8)
        want = learner.state.weights
    lines = [json.loads(text) for text in (tmp_path / "run" / "arrivals.jsonl").read_text().splitlines()]
    assert [x["updates"] for x in lines] == list(range(1, 18))
    replay = fnrl.Scheme(parts(), topology, fnrl.Recorded(tmp_path / "run"))
    state, _ = run(replay, replay.init(fnrl.key(0)), 17)
    assert tree.different_bits(state.weights, want) == []
    with pytest.raises(fnrl.ExecutorError, match="can't be read as the record of a run"):
        fnrl.Recorded(tmp_path / "nowhere")


def test_replicas_that_differ_are_found():
    scheme = fnrl.Scheme(parts(), fnrl.decentralised(gradients(collect), 2, check_every=3))
    state, _ = run(scheme, scheme.init(fnrl.key(0)), 4)
    workers = state.node.child.workers
    wrong = tree.map(lambda x: x, workers[1].algo)
    wrong.weights.params.vector[0] += 1e-6
    workers = (workers[0], dataclasses.replace(workers[1], algo=wrong))
    child = dataclasses.replace(state.node.child, workers=workers)
    state = dataclasses.replace(state, node=dataclasses.replace(state.node, child=child))
    with pytest.raises(fnrl.DivergedError, match="at update 6 the replicas 1 of decentralised"):
        run(scheme, state, 4)


def test_schemes_on_the_command_line(tmp_path, capsys):
    words = f"train --env CartPole --steps 2000 --eval-every 0 --quiet --dir {tmp_path}/"
    assert main(f"{words}a --scheme impala --workers 2 --storage VTrace".split()) == 0
    assert main(f"{words}b --grad-workers 2 --grad-communication asynchronous".split()) == 0
    assert main(["resume", f"{tmp_path}/a", "--steps", "4000", "--quiet"]) == 0
    assert main(f"{words}c --scheme imapla --workers 2".split()) == 1
    assert "did you mean 'impala'?" in capsys.readouterr().err
    assert main(f"{words}c --scheme a3c --grad-workers 2".split()) == 1
    assert "use one or the other" in capsys.readouterr().err
    assert (tmp_path / "a" / "arrivals.jsonl").exists()
