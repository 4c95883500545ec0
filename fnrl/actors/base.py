"""What actors share: features of raw observations, and the way from an action to the environment's."""

import math
from typing import Any

import torch
from torch import Tensor

from fnrl.networks import GRU, MLP, Network, Tensors
from fnrl.spaces import Box, Discrete, EnvSpec

Groups = dict[str, Tensors]


class Actor:
    """Base of actors: a subclass is a component with a `spec` and a `torso` (a network, or None)."""

    spec: EnvSpec
    torso: Network | None

    def placed(self, hyper: dict[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        """The hyper-parameters of `explored` for environments that stand at `places [N]`, in [0, 1], among
        those of all workers: here the same for all.
        """
        return hyper

    def explored(self, noise: Any, hyper: dict[str, Tensor], anything: bool) -> Any:
        """What was drawn for acting, as it counts with these hyper-parameters: as it is, for who doesn't explore."""
        return noise

    def env_action(self, action: Tensor) -> Tensor:
        """The environment's action: Discrete counted from `start`; Box elements with two bounds clipped to [-1, 1] and
        scaled, those with one counted from 0, or from the bound where 0 lies beyond it; rounded, if it takes integers.
        """
        space = self.spec.action
        if isinstance(space, Discrete):
            return action + space.start if space.start else action
        action = self._scaled(action, space)
        return torch.round(action) if space.integer else action

    def _scaled(self, action: Tensor, space: Box) -> Tensor:
        if space.low == -1.0 and space.high == 1.0:
            action = action.clamp(-1.0, 1.0)
        elif space.low != -math.inf or space.high != math.inf:
            low, high = (b.reshape(-1).to(action.device) for b in space.bounds())
            if space.bounded:
                action = low + (action.clamp(-1.0, 1.0) + 1.0) * 0.5 * (high - low)
            else:
                both = torch.tensor(space.limited, device=action.device)
                span, start = torch.where(both, high - low, 0.0), torch.zeros_like(low).clamp(low, high)
                scaled = low + (action.clamp(-1.0, 1.0) + 1.0) * 0.5 * span
                action = torch.where(both, scaled, start + action)
            action = torch.minimum(torch.maximum(action, low), high)  # rounding can step over a bound
        return action if len(space.shape) == 1 else action.reshape(*action.shape[:-1], *space.shape)

    @property
    def actions(self) -> int:
        """Choices of a Discrete action, components of a Box."""
        action = self.spec.action
        return action.n if isinstance(action, Discrete) else action.size

    def _obs_shape(self) -> tuple[int, ...]:
        obs = self.spec.obs
        return (obs.n,) if isinstance(obs, Discrete) else obs.shape

    def _torso_shape(self) -> tuple[int, ...]:
        shape = self._obs_shape()
        return (self.torso.width(taken(self.torso, shape)),) if self.torso else shape

    def _features(self, groups: Groups, obs: Tensor) -> Tensor:
        """Floats `[..., *torso_shape]` of raw or normalised observations."""
        space = self.spec.obs
        x = obs
        if isinstance(space, Discrete):  # not F.one_hot, which reads its input: it fails under vmap of grad
            x = (obs[..., None] == torch.arange(space.n, device=obs.device)).float()
        if x.dtype == torch.uint8 and isinstance(space, Box):  # from its bounds to [0, 1]
            if (space.low, space.high) == (0.0, 255.0):  # an image
                x = x.float() / 255.0
            else:
                low, high = (b.to(x.device) for b in space.bounds())
                x = (x - low) / (high - low).clamp(min=1.0)
        if self.torso is not None:
            x = self.torso.apply(groups["torso"], fit(self.torso, x, self._obs_shape()))
        return x


def taken(net: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a network takes inputs: dense ones take them flat."""
    return (math.prod(shape),) if isinstance(net, MLP | GRU) else shape


def fit(net: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inputs `[..., *shape]` in the shape that the network takes."""
    return x if len(shape) == len(taken(net, shape)) else x.reshape(*x.shape[: x.dim() - len(shape)], -1)
