"""Returns and advantages of a rollout.

Every array is `[T, N, ...]`: T steps of N environments, time first, all of one shape. `next_value[t]` is the value of
the true successor of step t, never of the observation a reset returns: it is `value[t + 1]` inside an episode, and a
number of its own where the episode or the rollout ends. `terminated` says that the successor has no future, `truncated`
that the episode was cut with a future left: both end the accumulation, only the first ends the bootstrap. Coefficients
(`gamma`, `lam`, ...) are floats or 0-d tensors.

Gradients flow through every argument; detach what should not learn.
"""

import torch
from torch import Tensor

Scalar = float | Tensor


def reverse_scan(x: Tensor, decay: Scalar) -> Tensor:
    """Linear recurrence from the last step to the first: `y[t] = x[t] + decay[t] * y[t + 1]`, `y[T] = 0`.

    Computed by recursive doubling (Hillis & Steele, 1986, doi:10.1145/7902.7903), in log2(T) rounds of whole-array
    operations rather than T small ones: entering the round of k, `y[t]` has summed k steps and `d[t]` is their decay.

    Args:
        x: [T, ...].
        decay: a number, or an array that broadcasts to the shape of x.
    """
    steps, k = x.shape[0], 1
    y, d = x, _expand(decay, x)[:-1]
    while k < steps:
        y = torch.cat([y[:-k] + d * y[k:], y[-k:]])
        d = d[:-k] * d[k:]
        k = 2 * k
    return y


def forward_scan(x: Tensor, decay: Scalar) -> Tensor:
    """Linear recurrence from the first step to the last: `y[t] = x[t] + decay[t] * y[t - 1]`, `y[-1] = 0`.

    Args:
        x: [T, ...].
        decay: a number, or an array that broadcasts to the shape of x.
    """
    return reverse_scan(x.flip(0), _expand(decay, x).flip(0)).flip(0)


def gae(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: Scalar, lam: Scalar
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the TD(lambda) targets of the value function.

        delta[t]     = reward[t] + gamma * (1 - terminated[t]) * next_value[t] - value[t]
        advantage[t] = delta[t] + gamma * lam * (1 - terminated[t]) * (1 - truncated[t]) * advantage[t + 1]
        target[t]    = advantage[t] + value[t]

    Source: Schulman et al., https://arxiv.org/abs/1506.02438.

    Args:
        reward, value, next_value: [T, N, ...].
        terminated, truncated: [T, N, ...], bool.

    Returns:
        advantage, target: [T, N, ...].

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(reward=reward, value=value, next_value=next_value, terminated=terminated, truncated=truncated)
    delta = reward + gamma * next_value.masked_fill(terminated, 0.0) - value
    inside = (~(terminated | truncated)).to(delta.dtype)
    advantage = reverse_scan(delta, gamma * lam * inside)
    return advantage, advantage + value


def discounted_returns(
    reward: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: Scalar
) -> Tensor:
    """Discounted sum of the rewards to the episode's end, bootstrapped where the rollout or a time limit cuts it short.

        target[t] = reward[t] + gamma * { 0              if terminated[t]
                                        { next_value[t]  if truncated[t] or t = T - 1
                                        { target[t + 1]  otherwise

    Args:
        reward, next_value: [T, N, ...].
        terminated, truncated: [T, N, ...], bool.

    Returns:
        target: [T, N, ...].

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(reward=reward, next_value=next_value, terminated=terminated, truncated=truncated)
    end = torch.cat([(terminated | truncated)[:-1], torch.ones_like(terminated[-1:])])
    bootstrap = next_value.masked_fill(terminated | ~end, 0.0)
    return reverse_scan(reward + gamma * bootstrap, gamma * (~end).to(reward.dtype))


def vtrace(
    logp: Tensor,
    behaviour_logp: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Scalar,
    lam: Scalar = 1.0,
    clip_rho: Scalar = 1.0,
    clip_c: Scalar = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: the advantages and value targets of the policy `logp`, from steps that `behaviour_logp` took.

        ratio[t]     = exp(logp[t] - behaviour_logp[t])
        rho[t], c[t] = min(clip_rho, ratio[t]), lam * min(clip_c, ratio[t])
        delta[t]     = reward[t] + gamma * (1 - terminated[t]) * next_value[t] - value[t]
        error[t]     = rho[t] * delta[t] + gamma * (1 - terminated[t]) * (1 - truncated[t]) * c[t] * error[t + 1]
        target[t]    = value[t] + error[t]
        advantage[t] = rho[t] * (reward[t] + gamma * (1 - terminated[t]) * q[t] - value[t])

    where `q[t] = lam * target[t + 1] + (1 - lam) * next_value[t]`, or `next_value[t]` alone where the episode or the
    rollout ends. Where the two policies agree, both results are those of `gae`.

    Source: Espeholt et al., https://arxiv.org/abs/1802.01561; lam as in rlax.

    Args:
        logp, behaviour_logp: [T, N, ...], of the actions taken.
        reward, value, next_value: [T, N, ...].
        terminated, truncated: [T, N, ...], bool.

    Returns:
        advantage, target: [T, N, ...].

    Raises:
        ValueError: the arrays differ in shape.
    """
    _same_shape(
        logp=logp,
        behaviour_logp=behaviour_logp,
        reward=reward,
        value=value,
        next_value=next_value,
        terminated=terminated,
        truncated=truncated,
    )
    ratio = torch.exp(logp - behaviour_logp)
    rho = ratio.clamp(max=clip_rho)
    delta = reward + gamma * next_value.masked_fill(terminated, 0.0) - value
    inside = gamma * lam * (~(terminated | truncated)).to(delta.dtype)
    error = reverse_scan(rho * delta, inside * ratio.clamp(max=clip_c))
    next_error = torch.cat([error[1:], torch.zeros_like(error[:1])])
    return rho * (delta + inside * next_error), value + error


def _expand(decay: Scalar, x: Tensor) -> Tensor:
    return torch.as_tensor(decay, dtype=x.dtype, device=x.device).expand_as(x)


def _same_shape(**arrays: Tensor) -> None:
    (first, expected), *rest = ((name, array.shape) for name, array in arrays.items())
    for name, shape in rest:
        if shape != expected:
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(expected)}, the shape of {first}")
