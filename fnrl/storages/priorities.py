"""Priorities of a ring's rows, and draws in proportion to them: two levels of sums rather than a tree of many.

`priority [M]` holds those of all places, to the power alpha (0 where a row can't be drawn), M a multiple of 128, and
`sums [M / 128]` the sum of each block of 128. With lanes both have `[S]` in front, but for `by_priority`.
"""

import math

import torch
from torch import Tensor

_BLOCK = 128  # priorities summed at once


def no_priorities(reward: Tensor, axis: int, rows: int) -> tuple[Tensor, Tensor]:
    """`priority, sums` of so many rows, all 0."""
    count = math.ceil(rows * reward.shape[-1] / _BLOCK)
    zeros = reward.new_zeros(*reward.shape[:axis], count * _BLOCK)
    return zeros, zeros.new_zeros(*reward.shape[:axis], count)


def as_many(priority: Tensor, sums: Tensor, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`new` priorities and sums, with those there were copied in, as far as they go."""
    out, out_sums = new
    there = min(out.shape[-1], priority.shape[-1]) // _BLOCK * _BLOCK
    out[..., :there] = priority[..., :there]
    if sums.shape[-1] * _BLOCK == priority.shape[-1]:
        out_sums[..., : there // _BLOCK] = sums[..., : there // _BLOCK]
    else:  # of blocks of another size
        out_sums.copy_(out.reshape(*out_sums.shape, _BLOCK).sum(-1))
    return new


def write_priority(priority: Tensor, sums: Tensor, index: Tensor, new: Tensor) -> None:
    """Sets the priorities `[B]` of the places `index` `[B]`, in place, and the sums of their blocks; of one that stands
    there twice, the greater.
    """
    index = index.expand(new.shape)
    priority.scatter_(-1, index, 0.0)
    priority.scatter_reduce_(-1, index, new, "amax")
    block = index // _BLOCK
    picked = torch.take_along_dim(priority.reshape(*sums.shape, _BLOCK), block[..., None], -2)
    sums.scatter_(-1, block, picked.sum(-1))


def by_priority(priority: Tensor, sums: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Places `[K, B]` drawn in proportion to `priority [M]`, stratified over each batch, and their probabilities."""
    batch = uniform.shape[-1]
    ends = sums.cumsum(0)
    total = ends[-1]
    aim = (torch.arange(batch, device=uniform.device) + uniform) / batch * total
    # rounding can carry an aim to the very end, past the last block and place that hold anything: then it is those
    last_block = (torch.arange(len(sums), device=sums.device) * (sums > 0.0)).amax()
    block = torch.minimum(torch.searchsorted(ends, aim, right=True), last_block)
    inside = (aim - (ends - sums)[block]).clamp(min=0.0)
    table = priority.reshape(-1, _BLOCK)[block]
    offset = (table.cumsum(-1) <= inside[..., None]).sum(-1).clamp(max=_BLOCK - 1)
    last = _BLOCK - 1 - (table.flip(-1) > 0.0).int().argmax(-1)
    offset = torch.minimum(offset, last)
    return block * _BLOCK + offset, table.gather(-1, offset[..., None]).squeeze(-1) / total
