"""What a record is restored into: as many workers and environments as it was saved with; and what begins anew."""

import dataclasses

import pytest
import torch
from hosted_cases import Hidden

import fnrl
from fnrl.topology import centralised, collect, gradients, synchronous

ENV = fnrl.envs.CartPole(num_envs=2, time_limit=20)
SMALL = fnrl.MLP((4,))


def scheme(topology, env=ENV):
    actor = fnrl.OnPolicyActorCritic(env.spec, SMALL, SMALL)
    return fnrl.Scheme(fnrl.Parts(env, actor, fnrl.PPO(minibatches=2), fnrl.GAE(steps=8)), topology)


COLLECTORS = [centralised(gradients(synchronous(collect, n))) for n in (1, 2, 4)]
LEARNERS = [centralised(synchronous(gradients(collect), n)) for n in (1, 2, 4)]
NESTED = [centralised(synchronous(gradients(synchronous(collect, n)), 2)) for n in (1, 2, 4)]
PLAIN = centralised(gradients(collect))


@pytest.mark.parametrize("topologies", [COLLECTORS, LEARNERS, NESTED])
@pytest.mark.parametrize(("saved", "given"), [(1, 0), (1, 2), (2, 1)])
def test_the_number_of_workers_is_the_saved_one(topologies, saved, given):
    before, after = scheme(topologies[saved]), scheme(topologies[given])
    state, _ = before.step(before.init(fnrl.key(0)), updates=3)  # inside a plan
    numbers = rf"saved with {2**saved} workers, synchronous.* has {2**given}"
    with pytest.raises(fnrl.CheckpointError, match=numbers):
        after.restore(before.gather(state))


@pytest.mark.parametrize("topology", [PLAIN, COLLECTORS[1]])
def test_the_number_of_environments_is_the_saved_one(topology):
    before, after = scheme(topology), scheme(topology, dataclasses.replace(ENV, num_envs=4))
    with pytest.raises(fnrl.CheckpointError, match="saved with 2 environments, collect has 4"):
        after.restore(before.gather(before.init(fnrl.key(0))))


@pytest.mark.parametrize(("saved", "given"), [(PLAIN, COLLECTORS[1]), (COLLECTORS[1], PLAIN), (LEARNERS[1], PLAIN)])
def test_the_topology_is_the_saved_one(saved, given):
    before, after = scheme(saved), scheme(given)
    with pytest.raises(fnrl.CheckpointError, match="give the scheme the topology it was saved with"):
        after.restore(before.gather(before.init(fnrl.key(0))))


def test_an_episode_that_begins_anew_takes_its_tally_along():
    """Environment 1 can't be brought back; what was earned, remembered and scaled so far was its old episode's."""
    env = fnrl.envs.gym(Hidden, 2, exact=False)
    actor = fnrl.OnPolicyActorCritic(env.spec, SMALL, SMALL, recurrent=fnrl.GRU(3))
    parts = fnrl.Parts(env, actor, fnrl.A2C(), fnrl.GAE(steps=53), scale_reward=fnrl.ScaleReward())
    s = fnrl.Scheme(parts, PLAIN)
    state, _ = s.step(s.init(fnrl.key(0)))
    pure = s.gather(state)
    before = pure.node.child.child
    before.env.obs[0, 3] = 23.0  # what a replay of environment 0 shows
    with pytest.warns(RuntimeWarning, match="episode was restarted.*environment 1"):
        state = s.restore(pure)
    after = state.node.child.child
    for what, old in (
        (after.tally.returns, before.tally.returns),
        (after.tally.lengths, before.tally.lengths),
        (after.tally.scale.discounted, before.tally.scale.discounted),
        (after.memory.abs().sum(-1), before.memory.abs().sum(-1)),
    ):
        assert what[0] == old[0] != 0
        assert what[1] == 0 != old[1]
    assert torch.equal(after.tally.scale.moments.mean, before.tally.scale.moments.mean)
    _, info = s.step(state)
    ends = info.episodes[0]
    assert ends.lengths[ends.end].tolist() == [30, 30, 30]
    s.close(state)
