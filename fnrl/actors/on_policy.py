"""The actor of on-policy algorithms: a stochastic policy and a state value."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fnrl import check, random
from fnrl.actors.base import Actor, Groups, fit, taken
from fnrl.component import component, option, setting
from fnrl.distributions import Categorical, Normal
from fnrl.networks import GRU, MLP, Network, Tensors, linear
from fnrl.record import once, record
from fnrl.spaces import Box, Discrete, EnvSpec
from fnrl.types import Params


@record
class Normals:
    """What Box actions are drawn by: standard normals `[..., A]`, and the logarithm of their density `[...]`."""

    z: Tensor
    logp: Tensor


@component
class OnPolicyActorCritic(Actor):
    """Policy `pi(a | s)` and value `V(s)`: separate networks on the observation, or on features that both share.

    `torso` computes shared features, `recurrent` remembers them; without these, policy and value share nothing.
    Discrete actions are categorical; Box actions are Gaussian with a state-independent standard deviation, in
    coordinates where a bounded space spans [-1, 1]: the environment receives the action clipped and scaled to its
    bounds, storage keeps the unclipped one.
    """

    family: ClassVar[str] = "on-policy"

    spec: EnvSpec = option(help="the environment's spaces")
    policy: Network = option(default=MLP(), help="hidden layers of the policy")
    value: Network = option(default=MLP(), help="hidden layers of the value")
    torso: Network | None = option(default=None, help="features shared by policy and value")
    recurrent: GRU | None = option(default=None, help="memory over the shared features")
    log_std: float = setting(default=0.0, low=-20.0, high=2.0, help="initial log standard deviation of Box actions")

    def __post_init__(self) -> None:
        for net in (self.policy, self.value):
            net.width(taken(net, self._shared_shape()))

    # -- parameters, memory, noise ----------------------------------------------------------------------------

    def init(self, key: Tensor) -> Params:
        """Fresh parameters in groups `torso`, `recurrent`, `policy`, `value`; policy head gain 0.01, value head
        gain 1.
        """
        tensors: Tensors = {}

        def add(group: str, more: Tensors) -> None:
            tensors.update({f"{group}.{n}": v for n, v in more.items()})

        keys = random.split(key, 6)
        if self.torso is not None:
            add("torso", self.torso.init(keys[0], taken(self.torso, self._obs_shape())))
        if self.recurrent is not None:
            add("recurrent", self.recurrent.init(keys[1], math.prod(self._torso_shape())))
        for i, (name, net, width, gain) in enumerate(
            (("policy", self.policy, self.actions, 0.01), ("value", self.value, 1, 1.0))
        ):
            at = taken(net, self._shared_shape())
            add(name, net.init(keys[2 + i], at))
            add(f"{name}.head", linear(keys[4 + i], net.width(at), width, gain))
            if name == "policy" and isinstance(self.spec.action, Box):
                add(name, {"log_std": torch.full((width,), float(self.log_std))})
        return Params.of(tensors)

    def memory(self, n: int) -> Tensor:
        """The memory at the start of an episode, `[n, H]`; H is 0 without recurrence."""
        return torch.zeros(n, self.recurrent.size if self.recurrent else 0)

    def noise(self, key: Tensor, steps: int, n: int) -> Tensor | Normals:
        """What `act` needs for `steps` steps of `n` environments, `[T, N, ...]`."""
        action = self.spec.action
        if isinstance(action, Discrete):
            return random.gumbel(key, (steps, n, action.n))
        z = random.normal(key, (steps, n, action.size))
        return Normals(z, Normal(torch.zeros_like(z), torch.zeros_like(z)).log_prob(z))

    # -- acting -------------------------------------------------------------------------------------------------

    def act(
        self, params: Params, obs: Tensor, memory: Tensor, noise: Tensor | Normals | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`action, env_action, logp [N], memory`; the most likely action where noise is None. obs `[N, ...]`, noise
        `[N, ...]`.

        a = mean + std z,   log p(a) = log N(z; 0, 1) - sum_i log std_i: what depends on no observation is ready before.
        """
        x, memory = self._shared(params.groups, obs, memory)
        x = self._policy_out(params.groups, x)
        if isinstance(noise, Normals):
            std, log_stds = _spread(params)
            action, logp = x + std * noise.z, noise.logp - log_stds
        else:
            pi = self._policy(params.groups, x)
            action = pi.mode() if noise is None else pi.sample(noise)
            logp = pi.log_prob(action)
        return action, self.env_action(action), logp, memory

    # -- evaluating ---------------------------------------------------------------------------------------------

    def evaluate(
        self, params: Params, obs: Tensor, memory: Tensor, starts: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`logp, entropy, value [T, B]` of stored actions, and the memory after each step `[T, B, H]`.

        obs `[T, B, ...]`, memory `[B, H]` at the first step, starts `[T, B]`: where an episode begins and memory is
        cleared.
        """
        groups = params.groups
        x, memories = self._unroll(groups, obs, memory, starts)
        pi = self._policy(groups, self._policy_out(groups, x))
        return pi.log_prob(action), pi.entropy(), self._value(groups, x), memories

    def values(self, params: Params, obs: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """`V [T, B]` alone, and the memory after each step."""
        groups = params.groups
        x, memories = self._unroll(groups, obs, memory, starts)
        return self._value(groups, x), memories

    # -- inside -------------------------------------------------------------------------------------------------

    def _shared_shape(self) -> tuple[int, ...]:
        return (self.recurrent.size,) if self.recurrent is not None else self._torso_shape()

    def _shared(self, groups: Groups, obs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self._features(groups, obs)
        if self.recurrent is None:
            return x, memory
        memory = self.recurrent.apply(groups["recurrent"], fit(self.recurrent, x, self._torso_shape()), memory)
        return memory, memory

    def _unroll(self, groups: Groups, obs: Tensor, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        check.shape(starts, *obs.shape[:2])
        x = self._features(groups, obs)
        if self.recurrent is None:
            return x, memory.expand(obs.shape[0], *memory.shape)
        cell, x = groups["recurrent"], fit(self.recurrent, x, self._torso_shape())
        memories = []
        for features, start in zip(x.unbind(0), starts.unbind(0), strict=True):
            memory = self.recurrent.apply(cell, features, torch.where(start[..., None], 0.0, memory))
            memories.append(memory)
        out = torch.stack(memories)
        return out, out

    def _policy_out(self, groups: Groups, x: Tensor) -> Tensor:
        x = self.policy.apply(groups["policy"], fit(self.policy, x, self._shared_shape()))
        return F.linear(x, groups["policy"]["head.weight"], groups["policy"]["head.bias"])

    def _policy(self, groups: Groups, out: Tensor) -> Categorical | Normal:
        if isinstance(self.spec.action, Discrete):
            return Categorical(out)
        return Normal(out, groups["policy"]["log_std"])

    def _value(self, groups: Groups, x: Tensor) -> Tensor:
        x = self.value.apply(groups["value"], fit(self.value, x, self._shared_shape()))
        return F.linear(x, groups["value"]["head.weight"], groups["value"]["head.bias"]).squeeze(-1)


@once
def _spread(params: Params) -> tuple[Tensor, Tensor]:
    """The standard deviations of Box actions `[A]`, and the sum of their logarithms `[]`."""
    log_std = params.groups["policy"]["log_std"]
    return torch.exp(log_std), log_std.sum()
