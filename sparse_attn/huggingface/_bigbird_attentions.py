"""The attentions that BigBird of transformers returns, as it arranges them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

#: What is added to the logits of masked pairs.
_PENALTY = -10000.0


def dense_attentions(
    query: Tensor,
    key: Tensor,
    drawn: np.ndarray,
    from_mask: Tensor | None,
    to_mask: Tensor | None,
    block: int,
) -> Tensor:
    """(batch, heads, length, length): what a visible pair weighs once.

    Rows of blocks that are seen several times sum to less than 1, since the other times are
    missing. Padded queries have weights too: all see the first and last block, those of the second
    and the last but one their neighbors, and what they have drawn is 0.
    """
    batch, heads, length, head_dim = query.shape
    blocks = length // block
    ones = query.new_ones(batch, blocks, block)
    sees = ones if from_mask is None else from_mask.to(ones).view_as(ones)
    seen = ones if to_mask is None else to_mask.to(ones).view_as(ones)
    query = (query / head_dim**0.5).unflatten(2, (blocks, block))
    key = key.unflatten(2, (blocks, block))

    ends = query[:, :, [0, -1]].flatten(2, 3) @ key.flatten(2, 3).mT
    ends = (ends + (1 - seen).mul(_PENALTY).flatten(1)[:, None, None]).softmax(-1)
    ends = ends.view(batch, heads, 2, block, blocks, block)

    slots, twice, of_real_queries = _slots(torch.from_numpy(drawn).to(query.device), heads)
    every_head = torch.arange(heads, device=query.device)[:, None, None]
    logits = torch.einsum("bhiqd,bhiskd->bhiqsk", query[:, :, 1:-1], key[:, every_head, slots])
    real = sees[:, None, 1:-1, :, None, None]
    allowed = torch.where(of_real_queries, real, 1.0) * seen[:, slots][:, :, :, None]
    logits = (logits + (1 - allowed) * _PENALTY).masked_fill(twice, -torch.inf)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)

    places = slots[None, :, :, None, :, None].expand_as(weights)
    inner = weights.new_zeros(batch, heads, blocks - 2, block, blocks, block)
    inner = inner.scatter_add(4, places[..., :5, :], weights[..., :5, :])
    # What is drawn is written over what is there.
    inner = inner.scatter(4, places[..., 5:, :], weights[..., 5:, :])
    return torch.cat([ends[:, :, :1], inner, ends[:, :, 1:]], 2).view(batch, heads, length, length)


def _slots(drawn: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each block but the first and the last sees, in order: the first
    block, the left neighbor, itself, the right one, the last block, and those drawn.

    Returns:
        The blocks (heads, blocks − 2, slots); then, (blocks − 2, 1, slots, 1) bool, the slots that
        are there already, and those that padded queries do not see.
    """
    last = drawn.shape[1] + 1
    i = torch.arange(1, last, device=drawn.device)
    fixed = torch.stack([0 * i, i - 1, i, i + 1, 0 * i + last], -1)
    slots = torch.cat([fixed.expand(heads, -1, -1), drawn.expand(heads, -1, -1)], -1)
    slot = torch.arange(slots.shape[-1], device=drawn.device)
    second, last_but_one = (i == 1)[:, None], (i == last - 1)[:, None]
    twice = (second & (slot == 1)) | (last_but_one & (slot == 3))
    neighbors = (slot >= 1) & (slot <= 3)
    of_real_queries = (slot >= 5) | (neighbors & ~second & ~last_but_one)
    return slots, twice[:, None, :, None], of_real_queries[:, None, :, None]
