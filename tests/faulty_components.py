"""Actors, storages and algorithms with one fault each."""

import dataclasses
from typing import ClassVar

import torch

import fnrl
from fnrl import random
from fnrl.storages import GAE
from fnrl.storages.rollout import RolloutState
from fnrl.types import Aux

# -- actors ---------------------------------------------------------------------------------------------------------


class Actor(fnrl.OnPolicyActorCritic):
    """Small, and with memory."""


class Epsilon(Actor):
    def act(self, params, obs, memory, noise):
        out = super().act(params, obs, memory, noise)
        return out[0] + 0.0 * torch.randn(()), *out[1:]


class DoesNotRecur(Actor):
    """NAPPO 4.1.3: acts on the memory it was given, and unrolls a moving one in training."""

    def act(self, params, obs, memory, noise):
        return *super().act(params, obs, memory, noise)[:3], memory


class MissesStarts(Actor):
    def evaluate(self, params, obs, memory, starts, action):
        return super().evaluate(params, obs, memory, torch.zeros_like(starts), action)


class RemembersBirth(Actor):
    def memory(self, n):
        return super().memory(n) + 0.5


class Unclipped(Actor):
    def env_action(self, action):
        return 9.0 * action


class Gossips(Actor):
    def _features(self, groups, obs):
        return super()._features(groups, obs - obs.mean(-2, keepdim=True))


class SameParameters(Actor):
    def init(self, key):
        return super().init(random.key(0))


class SameNoise(Actor):
    def noise(self, key, steps, n, *more):
        return super().noise(random.key(0), steps, n, *more)


class DeadPolicy(Actor):
    """NAPPO 4.1.6: no gradient reaches the action head."""

    def evaluate(self, params, obs, memory, starts, action):
        logp, entropy, *rest = super().evaluate(params, obs, memory, starts, action)
        return logp.detach(), entropy.detach(), *rest


class Vertical(Actor):
    def evaluate(self, params, obs, memory, starts, action):
        logp, *rest = super().evaluate(params, obs, memory, starts, action)
        return logp + (0.0 * params.vector.sum()).sqrt(), *rest


class Wide(Actor):
    def act(self, params, obs, memory, noise):
        action, env_action, logp, memory = super().act(params, obs, memory, noise)
        return action, env_action, logp[:, None], memory


# -- storages -------------------------------------------------------------------------------------------------------


class Tampered(GAE):
    """An estimate from flags that are not the rollout's."""

    def flags(self, terminated, truncated):
        return terminated, truncated

    def estimate(self, weights, steps, logp, value, next_value):
        terminated, truncated = self.flags(steps.terminated, steps.truncated)
        steps = dataclasses.replace(steps, terminated=terminated, truncated=truncated)
        return super().estimate(weights, steps, logp, value, next_value)


class TimeLimitIsTheEnd(Tampered):
    def flags(self, terminated, truncated):
        return terminated | truncated, truncated


class TheEndIsATimeLimit(Tampered):
    def flags(self, terminated, truncated):
        return torch.zeros_like(terminated), truncated | terminated


class RolloutEndIsTheEnd(Tampered):
    def flags(self, terminated, truncated):
        last = torch.arange(len(terminated))[:, None] == len(terminated) - 1
        return terminated | last, truncated


class RunsOn(Tampered):
    def flags(self, terminated, truncated):
        return terminated, torch.zeros_like(truncated)


class BootstrapsFromTheReset(GAE):
    def prepare(self, state, actor, weights):
        steps = state.rollout.steps
        seen = torch.cat([steps.obs[1:], steps.next_obs[-1:]])
        rollout = dataclasses.replace(state.rollout, steps=dataclasses.replace(steps, next_obs=seen))
        return super().prepare(RolloutState(rollout), actor, weights)


class UsesOneTwice(GAE):
    def order(self, actor, plan, envs, key, valid=()):
        index = super().order(actor, plan, envs, key, valid)
        return torch.cat([index[:, :1], index[:, :-1]], 1) if index.shape[1] > 1 else index * 0


class ScalesObservations(GAE):
    def prepare(self, state, actor, weights):
        data = super().prepare(state, actor, weights)
        return dataclasses.replace(data, obs=2.0 * data.obs)


class Overwrites(GAE):
    def append(self, state, rollout):
        return RolloutState(rollout)


class AlwaysReady(GAE):
    def ready(self, state, plan, envs):
        return True


class NeverShuffles(GAE):
    def order(self, actor, plan, envs, key, valid=()):
        return super().order(actor, plan, envs, random.key(0), valid)


class TakesAnyPlan(GAE):
    def check(self, plan, actor, envs):
        pass


class ScalesInPlace(GAE):
    def prepare(self, state, actor, weights):
        state.rollout.steps.reward.mul_(0.5)
        return super().prepare(state, actor, weights)


# -- algorithms -----------------------------------------------------------------------------------------------------


class Uphill(fnrl.PPO):
    def grad(self, actor, weights, batch, noise):
        grads, aux = super().grad(actor, weights, batch, noise)
        return -grads, aux


class ForgetsABatch(fnrl.PPO):
    def grad(self, actor, weights, batch, noise):
        grads, aux = super().grad(actor, weights, batch, noise)
        return torch.cat([torch.zeros(1), grads[1:]]), aux


class LooksDownhill(fnrl.PPO):
    """Its loss is right; the gradient that autograd finds is another's."""

    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return 2.0 * loss.detach() - loss, aux


class PerSample(fnrl.PPO):
    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss, Aux({**aux.info, "ratio": batch.logp}, ())


class Drops(fnrl.PPO):
    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss * torch.rand(()), aux


class NeverStops(fnrl.PPO):
    def apply(self, state, grads, info):
        after, told = super().apply(state, grads, {**info, "approx_kl": torch.zeros(())})
        return after, {**told, "approx_kl": info["approx_kl"]}


class MovesWhenStopped(fnrl.PPO):
    """The parameters stand still, and Adam's clock goes on."""

    def apply(self, state, grads, info):
        after, told = super().apply(state, grads, info)
        _, opt = self.optimiser.update(grads, state.opt, state.weights.params, state.weights.hyper["lr"])
        return dataclasses.replace(after, opt=opt), told


class InPlace(fnrl.PPO):
    def apply(self, state, grads, info):
        grads.clamp_(-1.0, 1.0)
        return super().apply(state, grads, info)


class Ascends(fnrl.PPO):
    def apply(self, state, grads, info):
        return super().apply(state, -grads, info)


class NeverRests(fnrl.PPO):
    def apply(self, state, grads, info):
        rate = state.weights.hyper["lr"].clamp(min=1e-5)
        weights = dataclasses.replace(state.weights, hyper={**state.weights.hyper, "lr": rate})
        return super().apply(dataclasses.replace(state, weights=weights), grads, info)


class Silent(fnrl.PPO):
    def apply(self, state, grads, info):
        after, told = super().apply(state, grads, info)
        return after, {n: x for n, x in told.items() if n != "approx_kl"}


class Divides(fnrl.PPO):
    def loss(self, actor, params, weights, batch, noise):
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss + (0.0 * params.vector[:2].sum()).sqrt(), aux


# -- nodes ----------------------------------------------------------------------------------------------------------


class Moody(fnrl.PPO):
    calls: ClassVar[list[int]] = []

    def loss(self, actor, params, weights, batch, noise):
        self.calls.append(1)
        loss, aux = super().loss(actor, params, weights, batch, noise)
        return loss * (1.0 + 0.01 * len(self.calls)), aux
