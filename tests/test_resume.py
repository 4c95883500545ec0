"""Exact resume of a simulated robot: stopped anywhere, inside a plan and inside an episode, restored by replay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fnrl
from fnrl import tree

pytest.importorskip("pybullet_envs_gymnasium")


def scheme() -> fnrl.Scheme:
    """Episodes of 11 steps in rollouts of 8: every window has episodes that end and rollouts that cut them."""
    env = fnrl.envs.gym("HopperBulletEnv-v0", num_envs=2, max_episode_steps=11)
    small = fnrl.MLP((8,))
    parts = fnrl.Parts(
        env,
        fnrl.OnPolicyActorCritic(env.spec, small, small),
        fnrl.PPO(epochs=1, minibatches=2),
        fnrl.GAE(steps=8),
        normalise_obs=fnrl.NormaliseObs(),
        scale_reward=fnrl.ScaleReward(),
    )
    return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))


SCHEME = scheme()


@settings(max_examples=4)
@given(n=st.integers(0, 9), m=st.integers(1, 6))
def test_run_is_resume_of_run(n, m):
    _check(n, m)


def test_in_the_seventh_episode():
    state = _check(21, 7)
    episodes = SCHEME.gather(state).node.child.child.env.episodes
    assert int(episodes.min()) >= 7
    SCHEME.close(state)


def _check(n: int, m: int) -> fnrl.SchemeState:
    state = SCHEME.init(fnrl.key(3))
    if n:
        state, _ = SCHEME.step(state, updates=n)
    resumed = SCHEME.restore(SCHEME.gather(state))
    state, _ = SCHEME.step(state, updates=m)
    resumed, _ = SCHEME.step(resumed, updates=m)
    assert tree.different_bits(SCHEME.gather(state), SCHEME.gather(resumed)) == []
    SCHEME.close(resumed)
    return state


def test_a_stale_state_is_refused_and_a_fork_is_not():
    state = SCHEME.init(fnrl.key(0))
    fork = SCHEME.fork(state)
    after, _ = SCHEME.step(state)
    with pytest.raises(fnrl.StaleStateError, match="fork"):
        SCHEME.step(state)
    apart, _ = SCHEME.step(fork)
    assert tree.different_bits(SCHEME.gather(after), SCHEME.gather(apart)) == []
    for s in (after, apart):
        SCHEME.close(s)


@pytest.mark.parametrize(
    ("other", "updates"), [({"ratio": 1.0}, 80), ({"ratio": 0.125}, 10), ({"warmup": 2000}, 20), ({"warmup": 8}, 20)]
)
def test_another_ratio_or_warmup_counts_from_there_on(other, updates, tmp_path):
    def scheme(ratio=0.25, warmup=20):
        env = fnrl.envs.CartPole(num_envs=4)
        net, explore = fnrl.MLP((8,)), fnrl.EpsilonGreedy()
        actor = fnrl.OffPolicyActorCritic(env.spec, policy=None, critics=1, critic=net, explore=explore)
        parts = fnrl.Parts(env, actor, fnrl.DQN(batch=8, ratio=ratio), fnrl.Replay(capacity=500, warmup=warmup))
        return fnrl.Scheme(parts, fnrl.centralised(fnrl.gradients(fnrl.collect)))

    with fnrl.Learner(scheme(), 200, tmp_path) as learner:
        learner.train(progress=False)
        before = learner.state
    assert before.version == (200 - 20 + 4) // 4
    with fnrl.Learner.resume(tmp_path, scheme(**other), 280) as learner:
        learner.step()
        assert (
            learner.state.version == before.version + 1
        )  # neither what was missed nor what was too much is made up for
        assert learner.state.env_steps <= before.env_steps + 8
        learner.train(progress=False)
        assert learner.state.env_steps == before.env_steps + 80
        assert abs(learner.state.version - before.version - updates) <= 1
