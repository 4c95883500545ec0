"""The architectures: by combinator, by NAPPO's keywords, by name; and what no scheme is.

The twelve that there are keep the laws in one process, in an order of arrivals that is drawn, and lengths that are.
"""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fnrl
from fnrl import schemes, tree
from fnrl.testing import Shuffled, check_node
from fnrl.topology import asynchronous, centralised, collect, decentralised, gradients, synchronous

ENV = fnrl.envs.CartPole(num_envs=2, time_limit=6)
COLLECTIONS = (collect, synchronous(collect, 2), asynchronous(collect, 2))
TWELVE = [
    *(centralised(gradients(c)) for c in COLLECTIONS),
    *(centralised(synchronous(gradients(c), 2)) for c in COLLECTIONS),
    *(centralised(asynchronous(gradients(c), 2)) for c in COLLECTIONS),
    *(decentralised(gradients(c), 2) for c in COLLECTIONS),
]


def parts(storage=None, **ppo):
    actor = fnrl.OnPolicyActorCritic(ENV.spec, policy=fnrl.MLP((5,)), value=fnrl.MLP((5,)))
    algo = fnrl.PPO(**{"epochs": 2, "minibatches": 2, **ppo})
    more = {"normalise_obs": fnrl.NormaliseObs(), "scale_reward": fnrl.ScaleReward()}
    return fnrl.Parts(ENV, actor, algo, storage or fnrl.GAE(steps=8), **more)


def run(scheme, state, updates):
    infos = []
    for _ in range(updates):
        state, info = scheme.step(state)
        infos.append(info)
    return state, infos


def test_the_keywords_name_the_twelve():
    words = "synchronous", "asynchronous"
    cols = [{}, *({"col_workers": 2, "col_communication": w} for w in words)]
    grads = [{}, *({"grad_workers": 2, "grad_communication": w} for w in words)]
    made = [schemes.nappo(**c, **g) for g, c in itertools.product(grads, cols)]
    made += [schemes.nappo(grad_workers=2, update_execution="decentralized", **c) for c in cols]
    assert made == TWELVE
    assert schemes.nappo(grad_workers=2, update_execution="centralized") == TWELVE[3]


def test_names_are_values():
    assert schemes.a2c() == schemes.ppo() == centralised(gradients(collect))
    assert schemes.a2c(workers=3) == centralised(gradients(synchronous(collect, 3)))
    assert schemes.named("IMPALA", workers=4) == schemes.ape_x(4) == centralised(gradients(asynchronous(collect, 4)))
    assert schemes.a3c(4) == centralised(asynchronous(gradients(collect), 4))
    assert schemes.dppo(4) == centralised(synchronous(gradients(collect), 4))
    assert schemes.named("dd-ppo", workers=4) == decentralised(gradients(collect), 4)
    assert schemes.dd_ppo(4, 0.5, 0.25) == decentralised(gradients(collect), 4, quorum=0.5, samples=0.25)


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        (lambda: schemes.nappo(col_workers=0), r"col_workers = 0: expected an int of at least 1; leave it out"),
        (lambda: schemes.nappo(grad_workers=-2), r"grad_workers = -2"),
        (lambda: schemes.nappo(col_workers=2, col_communication="synchronus"), r"did you mean 'synchronous'\?"),
        (lambda: schemes.nappo(update_execution="decentral"), r"did you mean 'decentrali[sz]ed'\?"),
        (lambda: schemes.nappo(update_execution="decentralised"), r"pass grad_workers=2 or more"),
        (
            lambda: schemes.nappo(grad_workers=2, grad_communication="asynchronous", update_execution="decentralised"),
            r"nothing is asynchronous: grad_communication='synchronous' is dec.*, update_execution='centralised'",
        ),
        (lambda: schemes.nappo(col_communication="asynchronous"), r"there are none: pass col_workers=2"),
        (
            lambda: schemes.nappo(col_workers=2, col_communication="asynchronous", col_fraction_workers=0.5),
            r"nobody waits with col_communication='asynchronous'",
        ),
        (lambda: schemes.nappo(col_workers=2, col_max_lag=3), r"synchronous workers never lag"),
        (lambda: schemes.named("imapla", workers=2), r"no scheme 'imapla'; did you mean 'impala'\?"),
        (lambda: schemes.named("impala"), r"impala needs workers: impala\(workers=4\)"),
        (lambda: schemes.named("a3c", wrokers=2), r"a3c has no option 'wrokers'; did you mean 'workers'\?"),
        (
            lambda: decentralised(asynchronous(gradients(collect), 4), 2),
            r"average before anyone goes on.*write decentralised\(gradients\(collect\), workers=4\)",
        ),
        (lambda: decentralised(collect, 2), r"decentralised takes a node that produces updates"),
        (lambda: decentralised(gradients(collect), 0), r"decentralised: workers = 0"),
        (
            lambda: asynchronous(centralised(gradients(collect)), 2),
            r"asynchronous takes .* that produces rollouts or",
        ),
        (lambda: asynchronous(collect, 2, max_lag=-1), r"max_lag = -1, expected an int of at least 0"),
        (lambda: synchronous(collect, 2, quorum=0.0), r"quorum = 0.0, expected a number in \(0, 1\]"),
        (lambda: synchronous(collect, 2, samples=0.5), r"samples=0.5 has no effect with quorum=1.*quorum=0.75"),
        (lambda: decentralised(gradients(collect), 2, quorum=0.5), r"decentralised: quorum=0.5 has no effect"),
        (
            lambda: fnrl.Scheme(parts(target_kl=0.1), schemes.a3c(2)),
            r"target_kl stops one plan, and asynchronous\(gradients\(collect\)\) has a plan in each worker",
        ),
    ],
)
def test_what_is_no_scheme(compose, message):
    with pytest.raises(fnrl.CompositionError, match=message):
        compose()


def test_rollouts_of_unequal_length_need_parts_that_take_them():
    memory = fnrl.OnPolicyActorCritic(ENV.spec, recurrent=fnrl.GRU(4))
    ours = fnrl.Parts(ENV, memory, fnrl.PPO(minibatches=1), fnrl.GAE(steps=8))
    with pytest.raises(fnrl.CompositionError, match=r"synchronous\(quorum=0.5\).*whole columns.*leave quorum out"):
        fnrl.Scheme(ours, centralised(gradients(synchronous(collect, 2, quorum=0.5, samples=0.5))))
    replay = fnrl.Parts(ENV, fnrl.OffPolicyActorCritic(ENV.spec), fnrl.SAC(batch=8), fnrl.Replay(capacity=64, warmup=8))
    with pytest.raises(fnrl.CompositionError, match=r"a row of|a replay's row"):
        fnrl.Scheme(replay, decentralised(gradients(collect), 2, quorum=0.5, samples=0.5))
    fnrl.Scheme(ours, centralised(gradients(synchronous(collect, 2, quorum=0.9, samples=0.5))))  # waits for both


def test_print_draws_the_task_graph():
    topology = schemes.nappo(col_workers=2, col_communication="asynchronous", grad_workers=3)
    shown = str(fnrl.Scheme(parts(), topology))
    assert shown.splitlines() == [
        "centralised: applies updates here, sends weights down",
        "│ ▲ updates",
        "└─ synchronous: 3 here, averaged in worker order",
        "   │ ▲ updates x3",
        "   └─ gradients: PPO, GAE of 8 steps x 2 environments, 4 updates of each",
        "      │ ▲ rollouts",
        "      └─ asynchronous: 2 here, one call in flight each, taken as they arrive",
        "         │ ▲ rollouts x2",
        "         └─ collect: CartPole-v1, 2 environments",
    ]


@pytest.mark.parametrize("topology", TWELVE[2:], ids=repr)
def test_the_laws_hold_for_every_scheme(topology):
    check_node(topology, parts(), max_examples=1)


LEAVES = st.just(collect)
STOPPED = st.sampled_from([(1.0, 1.0), (0.4, 0.3)])  # quorum and samples
ROLLOUTS = st.recursive(
    LEAVES,
    lambda node: st.one_of(
        st.builds(lambda node, n, stopped: synchronous(node, n, *stopped), node, st.integers(1, 2), STOPPED),
        st.builds(asynchronous, node, st.integers(1, 3), st.sampled_from([None, 0, 3])),
    ),
    max_leaves=2,
)
UPDATES = st.one_of(
    ROLLOUTS.map(gradients),
    st.builds(
        lambda node, n, stopped: synchronous(node, n, *stopped), ROLLOUTS.map(gradients), st.integers(1, 2), STOPPED
    ),
    st.builds(asynchronous, ROLLOUTS.map(gradients), st.integers(1, 3), st.sampled_from([None, 1])),
)
TOPOLOGIES = st.one_of(UPDATES.map(centralised), st.builds(decentralised, ROLLOUTS.map(gradients), st.integers(1, 2)))


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(topology=TOPOLOGIES, seed=st.integers(0, 99), n=st.integers(0, 7), m=st.integers(1, 6))
def test_any_order_is_pure_resumes_and_replays(topology, seed, n, m):
    scheme = fnrl.Scheme(parts(), topology, Shuffled(seed))
    middle, first = run(scheme, scheme.init(fnrl.key(seed)), n)
    before = [x.clone() for x in tree.leaves(middle)]
    end, rest = run(scheme, middle, m)
    assert tree.same_bits(before, tree.leaves(middle))
    resumed, _ = run(scheme, scheme.restore(scheme.gather(middle)), m)
    assert tree.different_bits(scheme.gather(end), scheme.gather(resumed)) == []
    choices = [c for info in first + rest for c in info.choices]
    replay = fnrl.Scheme(parts(), topology, fnrl.Recorded(choices))
    again, _ = run(replay, replay.init(fnrl.key(seed)), n + m)
    assert tree.different_bits(again.node.algo, end.node.algo) == []


def test_a_topology_prints_as_it_is_written():
    for topology in (
        asynchronous(collect, 2, max_lag=1),
        asynchronous(collect, 2, max_lag=0),
        synchronous(collect, 2, quorum=0.5, samples=0.25),
        decentralised(gradients(collect), 2, check_every=1),
        *TWELVE,
    ):
        assert eval(repr(topology)) == topology
