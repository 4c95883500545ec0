"""What a record is restored into: as many workers and environments as it was saved with, or a typed refusal."""

import dataclasses

import pytest

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
