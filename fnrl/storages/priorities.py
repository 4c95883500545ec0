"""Priorities of a ring's rows, and draws in proportion to them: two levels of sums rather than a tree of many.

`priority [M]` holds those of all places, to the power alpha (0 where a row can't be drawn), M a multiple of 128, and
`sums [M / 128]` the sum of each block of 128. With lanes both have `[S]` in front, but for `by_priority`.
"""

import math

import torch
from torch import Tensor

BLOCK = 128  # priorities summed at once


def blocks(reward: Tensor, axis: int, rows: int) -> tuple[Tensor, Tensor]:
    """Priorities of so many rows, and their sums, all 0."""
    blocks = math.ceil(rows * reward.shape[-1] / BLOCK)
    zeros = reward.new_zeros(*reward.shape[:axis], blocks * BLOCK)
    return zeros, zeros.new_zeros(*reward.shape[:axis], blocks)


def write_priority(priority: Tensor, sums: Tensor, index: Tensor, new: Tensor) -> None:
    """Sets the priorities `[B]` of the places `index` `[B]`, in place, and the sums of their blocks; of one that stands
    there twice, the greater.
    """
    index = index.expand(new.shape)
    priority.scatter_(-1, index, 0.0)
    priority.scatter_reduce_(-1, index, new, "amax")
    block = index // BLOCK
    picked = torch.take_along_dim(priority.reshape(*sums.shape, BLOCK), block[..., None], -2)
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
    table = priority.reshape(-1, BLOCK)[block]
    offset = (table.cumsum(-1) <= inside[..., None]).sum(-1).clamp(max=BLOCK - 1)
    last = BLOCK - 1 - (table.flip(-1) > 0.0).int().argmax(-1)
    offset = torch.minimum(offset, last)
    return block * BLOCK + offset, table.gather(-1, offset[..., None]).squeeze(-1) / total
