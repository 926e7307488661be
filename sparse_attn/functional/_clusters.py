"""Clusters of tokens, in which a token may be several times or not at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.functional._common import repeat_heads
from sparse_attn.functional._gather import Gather, finite_where, of_sets
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full


class Clusters:
    """The tokens that each cluster took.

    Args:
        members: (sets, clusters, width): tokens, each at most once in a cluster.
        length: Of the sequence.

    Attributes:
        gather: (sets, length, size) to (sets, clusters, width, size), and `gather.add` back.
    """

    def __init__(self, members: Tensor, length: int) -> None:
        self.members, self.length = members, length
        flat, width = members.flatten(1), members.shape[2]
        tokens, order = flat.sort(dim=-1, stable=True)
        every = torch.arange(length, device=flat.device).expand(flat.shape[0], -1)
        first = torch.searchsorted(tokens, every.contiguous()) + of_sets(flat.shape[1], flat)
        offsets = torch.cat([first.flatten(), first.new_full((1,), flat.numel())])
        places = (order + of_sets(flat.shape[1], flat)).flatten()
        self.gather = Gather(flat, places, offsets, width, width)

    def join(self, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens found in all their clusters, (sets, length, size) and (sets, length):
        output (sets, clusters, width, size) by lse, the log-sum-exp."""
        tokens = self.members.flatten(1)
        most = lse.new_full((lse.shape[0], self.length), -math.inf)
        most.scatter_reduce_(1, tokens, lse.detach().flatten(1), "amax")
        nothing = most == -math.inf
        most = most.masked_fill(nothing, 0)
        share = (lse - most.gather(1, tokens).view(lse.shape)).exp()[..., None]
        total = self.gather.add(share).masked_fill(nothing[..., None], 1)
        # Shares are few numbers, outputs many: a division of these has three passes over them.
        joined = self.gather.add(output * (share / self.gather(total)))
        return joined.to(output.dtype), (most + total[..., 0].log()).masked_fill(nothing, -math.inf)


def attend_in_clusters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_members: Tensor,
    key_members: Tensor,
    *,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    sink: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries of each cluster to its keys, as dense tiles, joined for each query.

    A pair that several clusters took belongs to the first of them. Members are (batch, heads,
    clusters, width).
    """
    heads = query.shape[:2]
    if query_padding_mask is not None:
        query = finite_where(query_padding_mask, query)
    if key_padding_mask is not None:
        key, value = finite_where(key_padding_mask, key), finite_where(key_padding_mask, value)
    queries = Clusters(query_members.flatten(0, 1), query.shape[2])
    keys = Clusters(key_members.flatten(0, 1), key.shape[2])
    bias = ops._own_pairs(
        queries.members,
        keys.members,
        query.shape[2],
        key.shape[2],
        query_padding_mask,
        key_padding_mask,
        is_causal,
        torch.promote_types(query.dtype, torch.float32),
    )
    options.pop("enable_gqa", None)
    output, lse = attention(
        queries.gather(query.flatten(0, 1)),
        keys.gather(repeat_heads(key, query.shape[1]).flatten(0, 1)),
        keys.gather(repeat_heads(value, query.shape[1]).flatten(0, 1)),
        Full(),
        bias=bias,
        return_lse=True,
        **options,
    )
    output, lse = (x.unflatten(0, heads) for x in queries.join(output, lse))
    if sink is not None:
        output = (output * torch.sigmoid(lse - sink[:, None])[..., None]).to(output.dtype)
    return (output, lse) if return_lse else output
