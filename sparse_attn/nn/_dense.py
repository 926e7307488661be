"""Attention by way of its dense weights: for callers who ask for these."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.nn._masks import Masks
from sparse_attn.patterns import Pattern


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None,
    masks: Masks,
    extra: Sequence[Tensor] | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, n_q, head_dim) and weights (batch, heads, n_q, n_k), after dropout.

    Computed and rounded as torch does, except that a query without keys has output and weights 0
    and that what padded keys hold does not matter.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: As key.
        pattern: All pairs if None.
        masks: What is excluded, and what is added to the logits.
        extra: A key and a value (batch, heads, extra, head_dim) that every query sees; their
            weights come last.
        dropout_p: Probability that a weight is dropped.
    """
    if masks.padding is not None:
        padded = masks.padding[:, None, :, None]
        key, value = key.masked_fill(padded, 0), value.masked_fill(padded, 0)
    bias = _all_as_bias(pattern, masks, query, key)
    if extra is not None:
        key, value = torch.cat((key, extra[0]), 2), torch.cat((value, extra[1]), 2)
        bias = None if bias is None else F.pad(bias, (0, extra[0].shape[2]))
    logits = (query * (1 / math.sqrt(query.shape[-1]))) @ key.mT
    if bias is None:
        weights = F.softmax(logits, -1)
    else:
        empty = (bias == -math.inf).all(-1, keepdim=True)
        # Wide, as the least number of a half type, a common mask, would become −inf.
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.to(wide) + bias.masked_fill(empty, 0).to(wide)
        weights = F.softmax(total, -1).masked_fill(empty, 0)
        weights = weights.to(F.softmax(logits.new_zeros(0), 0).dtype)  # autocast may widen it
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value, weights


def _all_as_bias(
    pattern: Pattern | None, masks: Masks, query: Tensor, key: Tensor
) -> Tensor | None:
    """Pattern and masks as numbers to add, −inf where they exclude a pair, or None."""
    excluded = []
    if masks.padding is not None:
        excluded.append(masks.padding[:, None, None])
    if masks.excluded is not None:
        excluded.append(masks.excluded)
    if pattern is not None:
        excluded.append(~_allowed(pattern, query, key))
    if not excluded:
        return masks.bias
    anywhere = functools.reduce(torch.logical_or, excluded)
    bias = query.new_zeros(()) if masks.bias is None else masks.bias
    return torch.where(anywhere, -math.inf, bias)


def _allowed(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """The pattern's mask, (batch or 1, heads or 1, n_q, n_k)."""
    batch, heads, n_q, _ = query.shape
    n_k = key.shape[2]
    tensors = pattern.tensors(n_q, n_k)
    # Only patterns with tensors can tell examples apart.
    sizes = (batch if tensors else 1, heads if pattern.heads > 1 else 1, n_q, n_k)
    return _dense_mask(pattern.encode(), tensors, *sizes).to(query.device)


# An op, as a compiler cannot see into the one behind `Pattern.mask`.
@torch.library.custom_op(
    "sparse_attn::_dense_mask",
    mutates_args=(),
    schema="(int[] pattern, Tensor[] tensors, SymInt batch, SymInt heads, SymInt n_q, SymInt n_k) "
    "-> Tensor",
)
def _dense_mask(
    pattern: Sequence[int],
    tensors: Sequence[Tensor],
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
) -> Tensor:
    """The mask on the CPU."""
    mask = ops._pattern_mask(pattern, tensors, n_q, n_k, heads)
    return mask.expand(batch, heads, n_q, n_k).contiguous()


@_dense_mask.register_fake
def _(pattern, tensors, batch, heads, n_q, n_k):
    return torch.empty(batch, heads, n_q, n_k, dtype=torch.bool)
