"""Off-policy algorithms: losses against loops, runs that are exact, and values that are known."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fnrl
from fnrl import random, tree
from fnrl.algos.base import AlgoState
from fnrl.collect import _draw, _drawn
from fnrl.component import component, hypers
from fnrl.distributions import Normal
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.testing import probes
from fnrl.topology import nodes
from fnrl.types import OffPolicyBatch, Params, Weights

B, GAMMA = 7, 0.9
BOX = EnvSpec("box", Box((3,)), Box((2,), -2.0, 2.0))
CHOICE = EnvSpec("choice", Box((3,)), Discrete(4))
SMALL = fnrl.MLP((8,), torch.tanh)


def actor_of(spec, **options):
    policy = options.pop("policy", SMALL)
    return fnrl.OffPolicyActorCritic(spec, policy, SMALL, **options)


ALGORITHMS = {
    "sac": (fnrl.SAC(first_temperature=0.3), actor_of(BOX)),
    "sac, fixed temperature": (fnrl.SAC(temperature=0.2), actor_of(BOX, critics=3)),
    "sac, discrete": (fnrl.SAC(first_temperature=0.3), actor_of(CHOICE)),
    "td3": (fnrl.TD3(), actor_of(BOX, stochastic=False)),
    "ddpg": (fnrl.DDPG(), actor_of(BOX, stochastic=False, critics=1)),
    "dqn": (fnrl.DQN(double=False), actor_of(CHOICE, policy=None, critics=1)),
    "double duelling dqn": (fnrl.DQN(), actor_of(CHOICE, policy=None, critics=1, duelling=True)),
}
named = pytest.mark.parametrize("name", ALGORITHMS)


def example(name, seed=0):
    """An algorithm, an actor, weights whose target is elsewhere, a batch and the noise of its loss."""
    algo, actor = ALGORITHMS[name]
    params, target, _ = algo.init(actor, actor.init(random.key(seed)))
    target = Params(target.vector + 0.1 * random.normal(random.key(seed + 1), target.vector.shape), target.layout)

    hyper = {n: torch.tensor(float(v)) for n, v in hypers(algo).items()} | {"gamma": torch.tensor(GAMMA)}
    weights = Weights(params, target, hyper, (), 0, 0)
    keys = random.split(random.key(seed + 2), 6)
    discrete = isinstance(actor.spec.action, Discrete)
    action = random.randint(keys[1], (B,), 0, 4) if discrete else random.uniform(keys[1], (B, 2), -1.0, 1.0)
    batch = OffPolicyBatch(
        random.normal(keys[0], (B, 3)),
        action,
        3.0 * random.normal(keys[2], (B,)),
        random.normal(keys[3], (B, 3)),
        GAMMA * (random.uniform(keys[4], (B,)) < 0.7).float(),
        random.uniform(keys[5], (B,)),
    )
    return algo, actor, weights, batch, tree.index(algo.noise(actor, random.key(seed + 3), 1, B), 0)


def layers(tree_, group, x):
    """A network of one hidden layer, by hand."""
    hidden = torch.tanh(x @ tree_[f"{group}.0.weight"].T + tree_[f"{group}.0.bias"])
    return hidden @ tree_[f"{group}.head.weight"].T + tree_[f"{group}.head.bias"]


def duel(x):
    return x[:, :1] + x[:, 1:] - x[:, 1:].mean(-1, keepdim=True)


def by_hand(name, params, target, batch, noise):
    """Losses of critics, policy and temperature apart, each of its own parameters, sample by sample from the papers."""
    algo, actor = ALGORITHMS[name]
    p, t = params.tree(), target.tree()
    stop = {n: x.detach() for n, x in p.items()}
    n = actor.critics
    obs, following = batch.obs, batch.next_obs
    if isinstance(algo, fnrl.DQN):
        value = duel if actor.duelling else lambda x: x
        q = value(layers(p, "critic0", obs))[torch.arange(B), batch.action]
        after = value(layers(t, "critic0", following))
        choice = (value(layers(stop, "critic0", following)) if algo.double else after).argmax(-1)
        y = batch.reward + batch.discount * after[torch.arange(B), choice]
        return (batch.weight * F.smooth_l1_loss(q, y.detach(), reduction="none")).mean(), None, None
    if isinstance(algo, fnrl.SAC) and isinstance(actor.spec.action, Discrete):
        alpha = stop["algo.log_temperature"].exp()
        probs = torch.softmax(layers(stop, "policy", following), -1)
        q_after = torch.stack([layers(t, f"critic{i}", following) for i in range(n)]).min(0).values
        y = batch.reward + batch.discount * (probs * (q_after - alpha * probs.log())).sum(-1)
        qs = [layers(p, f"critic{i}", obs) for i in range(n)]
        critic = sum((batch.weight * 0.5 * (q[torch.arange(B), batch.action] - y) ** 2).mean() for q in qs)
        pi = torch.softmax(layers(p, "policy", obs), -1)
        policy = (pi * (alpha * pi.log() - torch.stack(qs).detach().min(0).values)).sum(-1).mean()
        h = -(pi * pi.log()).sum(-1).detach()
        return critic, policy, -(p["algo.log_temperature"] * (0.89 * math.log(4) - h.mean())).sum()

    def q_of(tensors, i, x, a):
        return layers(tensors, f"critic{i}", torch.cat([x, a], -1))[:, 0]

    def sampled(tensors, x, eps):
        mean, log_std = layers(tensors, "policy", x).split(2, -1)
        u = mean + log_std.clamp(-20, 2).exp() * eps
        logp = Normal(mean, log_std).log_prob(u) - torch.log1p(-(torch.tanh(u) ** 2)).sum(-1)
        return torch.tanh(u), logp

    if isinstance(algo, fnrl.SAC):
        learnt = algo.temperature is None
        alpha = stop["algo.log_temperature"].exp() if learnt else torch.tensor(algo.temperature)
        a, logp = sampled(stop, following, noise[0])
        y = torch.stack([q_of(t, i, following, a) for i in range(n)]).min(0).values - alpha * logp
        b, logp_b = sampled(p, obs, noise[1])
        policy = (alpha * logp_b - torch.stack([q_of(stop, i, obs, b) for i in range(n)]).min(0).values).mean()
        temperature = -(p["algo.log_temperature"] * (logp_b.detach() - 2.0)).mean() if learnt else None
    else:
        a = torch.tanh(layers(t, "policy", following))
        if isinstance(algo, fnrl.TD3):
            a = (a + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
        y = torch.stack([q_of(t, i, following, a) for i in range(n)]).min(0).values
        policy, temperature = -q_of(stop, 0, obs, torch.tanh(layers(p, "policy", obs))).mean(), None
    y = (batch.reward + batch.discount * y).detach()
    critic = sum((batch.weight * 0.5 * (q_of(p, i, obs, batch.action) - y) ** 2).mean() for i in range(n))
    return critic, policy, temperature


@named
@pytest.mark.parametrize("seed", [0, 10])
def test_the_joint_gradient_is_that_of_the_losses_apart(name, seed):
    algo, actor, weights, batch, noise = example(name, seed)
    grads, aux = algo.grad(actor, weights, batch, noise)
    vector = weights.params.vector.clone().requires_grad_()
    params = Params(vector, weights.params.layout)
    apart = [x for x in by_hand(name, params, weights.target, batch, noise) if x is not None]
    expected = sum(torch.autograd.grad(x, vector, retain_graph=True)[0] for x in apart)
    torch.testing.assert_close(grads, expected, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(aux.info["loss"], sum(apart).detach(), rtol=1e-4, atol=1e-5)
    groups = dict(zip(params.layout.groups, grads.split(list(params.layout.group_sizes)), strict=True))
    assert all(float(g.abs().max()) > 0.0 for g in groups.values())
    assert aux.priority.shape == (B,)
    assert bool((aux.priority > 0.0).all())
    # each loss moves its own parameters only: critics do not learn from the policy's
    for i, group in enumerate(("critic0", "policy", "algo")[: len(apart)]):
        (alone,) = torch.autograd.grad(apart[i], vector, retain_graph=True)
        mine = dict(zip(params.layout.groups, alone.split(list(params.layout.group_sizes)), strict=True))
        assert {g for g, x in mine.items() if float(x.abs().max()) > 0.0} == {
            g for g in groups if g.rstrip("0123456789") == group.rstrip("0123456789")
        }


@named
def test_weights_of_samples_scale_their_errors_and_a_terminal_state_has_no_successor(name):
    algo, actor, weights, batch, noise = example(name)
    ended = dataclasses.replace(batch, discount=torch.zeros(B))
    other = dataclasses.replace(ended, next_obs=ended.next_obs + 5.0)
    a, b = (algo.grad(actor, weights, x, noise) for x in (ended, other))
    assert tree.same_bits(a, b)
    none = dataclasses.replace(batch, weight=torch.zeros(B))
    grads, _ = algo.grad(actor, weights, none, noise)
    layout = weights.params.layout
    for group, g in zip(layout.groups, grads.split(list(layout.group_sizes)), strict=True):
        assert (float(g.abs().max()) == 0.0) == group.startswith("critic")


def applied(algo, weights, updates, grads):
    state = AlgoState.fresh(weights, algo.optimiser.init(weights.params))
    out = []
    for _ in range(updates):
        state, _ = algo.apply(state, grads, {"loss": torch.zeros(())})
        out.append(state)
    return out


def test_td3_moves_policy_and_targets_at_every_second_update():
    algo, actor, weights, batch, noise = example("td3")
    grads, _ = algo.grad(actor, weights, batch, noise)
    before, states = weights, applied(algo, weights, 4, grads)
    for k, state in enumerate(states):
        moves = k % 2 == 1
        names = before.params.layout.names
        moved = {n.split(".")[0] for n in names if not torch.equal(before.params[n], state.weights.params[n])}
        assert moved == ({"policy", "critic0", "critic1"} if moves else {"critic0", "critic1"})
        expected = before.target.vector
        if moves:
            expected = 0.995 * expected + 0.005 * state.weights.params.vector
        torch.testing.assert_close(state.weights.target.vector, expected, rtol=1e-6, atol=1e-7)
        before = state.weights
    assert states[-1].opt.count.tolist() == [2.0, 4.0, 4.0]  # the policy's Adam has seen two


@fnrl.component
class Cautious(fnrl.TD3):
    """TD3 that also stops a plan."""

    target_kl: float | None = fnrl.hyper(default=0.1, help="stop")


def test_a_stop_and_a_delay_hold_together():
    _, actor, weights, batch, noise = example("td3")
    algo = Cautious()
    weights = dataclasses.replace(weights, hyper={**weights.hyper, "target_kl": torch.tensor(0.1)})
    grads, _ = algo.grad(actor, weights, batch, noise)
    state = AlgoState.fresh(weights, algo.optimiser.init(weights.params))
    for kl, moved in ((0.0, {"critic0", "critic1"}), (1.0, set())):
        after, _ = algo.apply(state, grads, {"loss": torch.zeros(()), "approx_kl": torch.tensor(kl)})
        names = weights.params.layout.names
        assert {n.split(".")[0] for n in names if not torch.equal(weights.params[n], after.weights.params[n])} == moved
    late = dataclasses.replace(state, updates=torch.tensor(1))
    after, _ = algo.apply(late, grads, {"loss": torch.zeros(()), "approx_kl": torch.tensor(1.0)})
    assert tree.same_bits(after.weights.target, weights.target)


def test_a_hard_target_is_a_copy_at_every_so_many_updates():
    algo, actor, weights, batch, noise = example("dqn")
    algo = dataclasses.replace(algo, target_every=3)
    grads, _ = algo.grad(actor, weights, batch, noise)
    states = applied(algo, weights, 6, grads)
    same = [torch.equal(s.weights.target.vector, s.weights.params.vector) for s in states]
    assert same == [False, False, True, False, False, True]


def test_learning_rates_of_their_own():
    for name, group, rate in (("sac", "algo", "temperature_lr"), ("td3", "policy", "critic_lr")):
        algo, actor, weights, batch, noise = example(name)
        algo = dataclasses.replace(algo, **{rate: 0.0})
        weights = dataclasses.replace(weights, hyper={**weights.hyper, rate: torch.tensor(0.0)})
        state = applied(algo, weights, 2, algo.grad(actor, weights, batch, noise)[0])[-1]
        layout = weights.params.layout
        moved = {n.split(".")[0] for n in layout.names if not torch.equal(weights.params[n], state.weights.params[n])}
        assert moved == ({g for g in layout.groups if g != group} if name == "sac" else {group})


def test_the_temperature_aims_at_the_entropy():
    algo, actor, weights, batch, noise = example("sac")
    for aim, sign in ((100.0, -1.0), (-100.0, 1.0)):  # too little entropy: the gradient raises log alpha
        grads, _ = dataclasses.replace(algo, target_entropy=aim).grad(actor, weights, batch, noise)
        assert float(torch.sign(Params(grads, weights.params.layout)["algo.log_temperature"])) == sign


# -- acting -------------------------------------------------------------------------------------------------------


def test_random_actions_are_uniform_and_only_where_they_should_be():
    actor = actor_of(CHOICE, policy=None, critics=1, explore=fnrl.EpsilonGreedy())
    params, obs = actor.init(random.key(0)), random.normal(random.key(1), (4000, 3))
    greedy = actor.act(params, obs, actor.memory(4000), None)[0]
    for epsilon, anything in ((0.3, False), (0.0, True)):
        noise = actor.explored(actor.noise(random.key(2), 1, 4000), {"epsilon": torch.tensor(epsilon)}, anything)
        action, *_ = actor.act(params, obs, actor.memory(4000), tree.index(noise, 0))
        share = 1.0 if anything else epsilon
        assert abs(float((action != greedy).float().mean()) - 0.75 * share) < 0.04
        replaced = noise.action[0][noise.replace[0]]
        counts = replaced.bincount(minlength=4) / len(replaced)
        np.testing.assert_allclose(counts.numpy(), 0.25, atol=0.04)


def test_gaussian_exploration_has_its_deviation_and_is_clipped():
    actor = actor_of(BOX, stochastic=False, explore=fnrl.Gaussian(noise_std=0.4))
    params, obs = actor.init(random.key(0)), random.normal(random.key(1), (3000, 3))
    plain = actor.act(params, obs, actor.memory(3000), None)[0]
    noise = actor.explored(actor.noise(random.key(2), 1, 3000), {"noise_std": torch.tensor(0.4)}, False)
    action, env_action, _, _ = actor.act(params, obs, actor.memory(3000), tree.index(noise, 0))
    assert float(action.abs().max()) <= 1.0
    inside = action.abs() < 1.0
    assert abs(float((action - plain)[inside].std()) - 0.4) < 0.03
    torch.testing.assert_close(env_action, 2.0 * action)


def test_ornstein_uhlenbeck_drifts_back_and_begins_anew():
    explore = fnrl.OrnsteinUhlenbeck(noise_std=0.5, theta=0.3, dt=0.1)
    memory, x = torch.zeros(1, 2), np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.normal(size=2)
        x = x + 0.3 * (0.0 - x) * 0.1 + 0.5 * math.sqrt(0.1) * n
        draw = explore.scale(torch.tensor(n, dtype=torch.float32)[None], {"noise_std": torch.tensor(0.5)})
        action, memory = explore.explore(torch.full((1, 2), 0.2), draw, memory)
        np.testing.assert_allclose(memory[0].numpy(), x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(action[0].numpy(), np.clip(0.2 + x, -1, 1), rtol=1e-4, atol=1e-5)
    env = fnrl.envs.gym("Pendulum-v1", num_envs=2, max_episode_steps=5)
    actor = fnrl.OffPolicyActorCritic(env.spec, SMALL, SMALL, stochastic=False, explore=explore)
    parts = fnrl.Parts(env, actor, fnrl.DDPG(batch=4), fnrl.Replay(capacity=100, steps=5, warmup=0))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state, _ = scheme.step(scheme.init(fnrl.key(0)))
    assert float(state.node.child.child.memory.abs().max()) == 0.0  # the episodes ended with the rollout
    scheme.close(state)


# -- runs ---------------------------------------------------------------------------------------------------------

POLE = fnrl.envs.CartPole(num_envs=2, time_limit=9)
PUSH = probes.ActionObservationReward(num_envs=2, continuous=True)
FAST = fnrl.Linear(1.0, 0.1, steps=50)


def parts_of(name, prioritised=True):
    env = PUSH if name in ("sac", "td3", "ddpg") else POLE
    actor = {
        "sac": lambda: actor_of(env.spec),
        "sac, discrete": lambda: actor_of(env.spec),
        "td3": lambda: actor_of(env.spec, stochastic=False, explore=fnrl.Gaussian()),
        "ddpg": lambda: actor_of(env.spec, stochastic=False, critics=1, explore=fnrl.OrnsteinUhlenbeck()),
        "dqn": lambda: actor_of(env.spec, policy=None, critics=1, explore=fnrl.EpsilonGreedy(epsilon=FAST)),
    }[name]()
    cls = {"sac, discrete": fnrl.SAC}.get(name) or getattr(fnrl, name.upper())
    more = {"target_every": 3} if name == "dqn" else {}
    algo = cls(batch=5, ratio=0.5, **more)
    storage = fnrl.Replay(
        capacity=24, steps=3, warmup=12, n_step=2, prioritised=fnrl.Prioritised() if prioritised else None
    )
    return fnrl.Parts(env, actor, algo, storage, normalise_obs=fnrl.NormaliseObs())


RUNS = ("sac", "sac, discrete", "td3", "ddpg", "dqn")
TOPOLOGIES = {
    "simple": fnrl.centralised(fnrl.gradients(fnrl.collect)),
    "wide": fnrl.centralised(fnrl.synchronous(fnrl.gradients(fnrl.synchronous(fnrl.collect, 2)), 2)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_exactly_and_a_fork_goes_its_own_way(name):
    """Mid-plan (three updates each), with a ring that has turned and one that has not, and targets that moved."""
    scheme = fnrl.Scheme(parts_of(name), TOPOLOGIES["simple"])
    for n, m in ((2, 5), (13, 8)):
        state = scheme.init(fnrl.key(1))
        state, _ = scheme.step(state, n)
        copy = scheme.restore(scheme.gather(state))
        a, _ = scheme.step(state, m)
        with pytest.raises(fnrl.StaleStateError):
            scheme.step(state, m)
        b, _ = scheme.step(copy, m)
        assert tree.different_bits(scheme.gather(a), scheme.gather(b)) == []
    assert a.env_steps > 24


@pytest.mark.parametrize("lanes", [None, 2])
def test_noise_that_is_drawn_ahead_for_short_rollouts_is_what_each_draws_alone(lanes):
    parts = dataclasses.replace(parts_of("td3"), storage=fnrl.Replay(capacity=90, warmup=8))
    scheme = fnrl.Scheme(parts, TOPOLOGIES["simple"])
    state = scheme.init(fnrl.key(1) if lanes is None else fnrl.seeds(lanes))
    run, own = scheme._run(state), state.node.child.child
    while own.rollouts < 70:
        own = state.node.child.child
        alone = run.lift(_draw)(parts.env, parts.actor, 1, own.key, run.number(own.rollouts))
        assert tree.same_bits(tree.stack(_drawn(run, own)[0], run.axis), alone)
        state, _ = scheme.step(state)
    assert own.ahead != ()
    assert scheme.gather(state).node.child.child.ahead == ()


@component
class Watched(fnrl.TD3):
    """Keeps what its losses were given."""

    seen: ClassVar[list[torch.Tensor]] = []

    def loss(self, actor, params, weights, batch, noise):
        self.seen.append(noise)
        return super().loss(actor, params, weights, batch, noise)


def test_each_update_has_noise_of_its_own_though_it_is_drawn_for_many():
    parts = dataclasses.replace(parts_of("td3"), algo=Watched(batch=5, ratio=0.5))
    scheme = fnrl.Scheme(parts, TOPOLOGIES["simple"])
    state = scheme.init(fnrl.key(1))
    scheme.step(state, 60)
    drawn = [
        parts.algo.noise(parts.actor, nodes._keys(state.node.child.key, torch.tensor(i), 1)[0, 1], 32, 5)[:30]
        for i in (0, 10, 20)
    ]  # of every 32 thirty, for a plan has three
    assert tree.same_bits(torch.stack(Watched.seen), torch.cat(drawn)[:60])


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("lanes", [None, 2])
def test_an_evaluation_explores_nothing(hosted, lanes):
    env = fnrl.envs.gym("CartPole-v1", num_envs=2) if hosted else fnrl.envs.CartPole(num_envs=2)
    found = []
    for explore in (fnrl.EpsilonGreedy(epsilon=1.0), None):
        actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((8,)), critics=1, explore=explore)
        parts = fnrl.Parts(env, actor, fnrl.DQN(batch=8), fnrl.Replay(capacity=64, warmup=8))
        key = fnrl.key(0) if lanes is None else fnrl.seeds(lanes)
        state = fnrl.Scheme(parts, TOPOLOGIES["simple"]).init(key)
        found.append(fnrl.evaluate(parts, state.weights, key, episodes=4).returns)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", RUNS)
def test_lanes_are_bit_equal_for_any_count_and_agree_with_solo(name):
    scheme = fnrl.Scheme(parts_of(name), TOPOLOGIES["simple"])
    keys = torch.stack([fnrl.key(seed) for seed in range(5)])
    five, two = (scheme.gather(scheme.step(scheme.init(k), 12)[0]) for k in (keys, keys[:2]))
    firsts, seconds = tree.leaves(five), tree.leaves(two)
    assert tree.different_bits([x[:2] for x in firsts], seconds) == []
    solo = scheme.step(scheme.init(keys[1]), 1)[0]
    both = scheme.step(scheme.init(keys[:2]), 1)[0]
    torch.testing.assert_close(both.weights.params.vector[1], solo.weights.params.vector, rtol=1e-5, atol=1e-6)


def test_workers_have_rings_of_their_own():
    scheme = fnrl.Scheme(parts_of("dqn"), TOPOLOGIES["wide"])
    state, _ = scheme.step(scheme.init(fnrl.key(0)), 6)
    again = scheme.restore(scheme.gather(state))
    a, _ = scheme.step(state, 5)
    b, _ = scheme.step(again, 5)
    assert scheme.same(a, b)
    rings = [w.storage.token.owner for w in a.node.child.workers]
    assert rings[0] is not rings[1]
    assert rings[0].rows.reward.shape == (7, 4)  # two collectors of two environments


def test_warm_up_actions_are_random_and_counted():
    scheme = fnrl.Scheme(parts_of("dqn"), TOPOLOGIES["simple"])
    state = scheme.init(fnrl.key(0))
    state, _ = scheme.step(state)
    assert state.env_steps == 12  # 2 rollouts of 3 x 2
    assert (state.version, state.settled) == (1, False)
    state, _ = scheme.step(state, 2)
    assert state.settled  # half an update a step: three of the last rollout's six
    state, _ = scheme.step(state)
    assert state.env_steps == 18


# -- learning -----------------------------------------------------------------------------------------------------


def error(env, algo, actor, storage, updates):
    """The largest error of the values of the actions taken, on every observation."""
    parts = fnrl.Parts(env, actor, algo, storage)
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state, _ = scheme.step(scheme.init(fnrl.key(0)), updates)
    obs = env.observations
    params = state.weights.params
    x = actor.features(params, obs)
    action, *_ = actor.act(params, obs, actor.memory(len(obs)), None)
    if isinstance(env.spec.action, Discrete):
        value = actor.q(params, x).amin(0).gather(-1, action[:, None])[:, 0]
    else:
        value = actor.q(params, x, action).amin(0)
    return float((value - env.value(obs, 0.5)).abs().max())


def agent(kind, env):
    tiny = fnrl.MLP((16,), torch.tanh)
    policy = {"dqn": None}.get(kind, tiny)
    options = {
        "sac": {},
        "td3": {"stochastic": False, "explore": fnrl.Gaussian(noise_std=0.3)},
        "ddpg": {"stochastic": False, "critics": 1, "explore": fnrl.Gaussian(noise_std=0.3)},
        "dqn": {"critics": 1, "explore": fnrl.EpsilonGreedy(epsilon=0.3)},
    }[kind]
    given = {"lr": fnrl.Linear(0.02, 0.0005, steps=4_000), "gamma": 0.5, "batch": 64, "ratio": 1 / 16}
    slow = {**given, "lr": fnrl.Linear(0.005, 0.0005, steps=4_000), "critic_lr": fnrl.Linear(0.03, 0.0005, steps=4_000)}
    algo = {
        "sac": lambda: fnrl.SAC(tau=0.05, temperature=fnrl.Linear(0.1, 0.0005, steps=3_000), **given),
        "td3": lambda: fnrl.TD3(tau=0.1, smooth=0.0, delay=1, **slow),
        "ddpg": lambda: fnrl.DDPG(tau=0.1, **slow),
        "dqn": lambda: fnrl.DQN(target_every=10, **given),
    }[kind]()
    return algo, fnrl.OffPolicyActorCritic(env.spec, policy, tiny, **options)


LEARNING = [
    (kind, probe)
    for probe in probes.PROBES
    for kind in (("sac", "td3", "ddpg") if probe.continuous else ("sac", "dqn"))
]


@pytest.mark.parametrize(("kind", "probe"), LEARNING, ids=[f"{k}-{p!r}" for k, p in LEARNING])
def test_the_values_of_the_probes_are_found(kind, probe):
    algo, actor = agent(kind, probe)
    assert error(probe, algo, actor, fnrl.Replay(capacity=4096, steps=1, warmup=64), 280) < 0.05


@pytest.mark.parametrize("lanes", [None, 2])
def test_a_target_moves_at_every_so_many_updates_of_a_scheme(lanes):
    env = fnrl.envs.CartPole(num_envs=2)
    actor = fnrl.OffPolicyActorCritic(env.spec, None, fnrl.MLP((4,)), critics=1)
    parts = fnrl.Parts(env, actor, fnrl.DQN(batch=4, ratio=0.5, target_every=3), fnrl.Replay(capacity=40, warmup=8))
    scheme = fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))
    state = scheme.init(fnrl.key(0) if lanes is None else fnrl.seeds(lanes))
    for _ in range(10):
        before = state.weights.target.vector
        state, _ = scheme.step(state)
        due = state.version % 3 == 0
        want = state.weights.params.vector if due else before
        assert torch.equal(state.weights.target.vector, want)
