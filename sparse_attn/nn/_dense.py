"""Attention by way of its dense weights: for callers who ask for these."""

from __future__ import annotations

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
    query = query * (1 / math.sqrt(query.shape[-1]))
    logits = query @ key.mT
    if masks.bias is not None:
        logits = logits + masks.bias.to(logits.dtype)
    if masks.padding is not None:
        logits = logits.masked_fill(masks.padding[:, None, None], -math.inf)
    if masks.excluded is not None:
        logits = logits.masked_fill(masks.excluded, -math.inf)
    if pattern is not None:
        logits = logits.masked_fill(~_allowed(pattern, logits), -math.inf)
    if extra is not None:
        extra_key, extra_value = extra
        logits = torch.cat((logits, query @ extra_key.mT), -1)
        value = torch.cat((value, extra_value), -2)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    weights = F.softmax(logits.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value, weights


def _allowed(pattern: Pattern, logits: Tensor) -> Tensor:
    """The pattern's mask, (batch or 1, heads or 1, n_q, n_k)."""
    batch, heads, n_q, n_k = logits.shape
    tensors = pattern.tensors(n_q, n_k)
    # Only patterns with tensors can tell examples apart.
    sizes = [batch if tensors else 1, heads if pattern.heads > 1 else 1, n_q, n_k]
    return _dense_mask(pattern.encode(), tensors, sizes, logits.device)


# An op, as a compiler cannot see into the one behind `Pattern.mask`.
@torch.library.custom_op(
    "sparse_attn::_dense_mask",
    mutates_args=(),
    schema="(int[] pattern, Tensor[] tensors, SymInt[] sizes, Device device) -> Tensor",
)
def _dense_mask(
    pattern: Sequence[int], tensors: Sequence[Tensor], sizes: Sequence[int], device: torch.device
) -> Tensor:
    _, heads, n_q, n_k = sizes
    mask = ops._pattern_mask(pattern, tensors, n_q, n_k, heads)
    return mask.to(device).expand(sizes).contiguous()


@_dense_mask.register_fake
def _(pattern, tensors, sizes, device):
    return torch.empty(sizes, dtype=torch.bool, device=device)
