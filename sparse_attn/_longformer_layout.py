"""Attention weights in the layouts of Hugging Face's Longformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.patterns import Global, GlobalKeys, GlobalQueries, Pattern, PerHead
from sparse_attn.patterns.base import Intersection, Union
from sparse_attn.tables import slot_windows

if TYPE_CHECKING:
    from sparse_attn.sparse_weights import SparseWeights


def of_local_queries(weights: SparseWeights) -> Tensor:
    """`SparseWeights.to_longformer`."""
    if weights.pattern is None:
        raise ValueError("sparse_attn: expected weights with a pattern for to_longformer()")
    batch, heads, n_q, n_k = weights.shape
    sides = slot_windows("to_longformer()", weights.pattern)
    side = max(max(left, right) for left, right, _ in sides)
    dilation = weights._of_heads([step for _, _, step in sides])
    is_key, is_query = _global_tokens(weights)
    if weights.key_padding_mask is not None:
        is_query = is_query | weights.key_padding_mask[:, None]
    number = _most(is_key)
    width = number + 2 * side + 1

    row = weights._rows()
    head, distance = row // max(1, n_q), weights._distance(row)
    step = dilation[head % max(1, heads)]
    column = head * n_k + weights.col_indices
    is_global = is_key.flatten()[column]
    in_window = (distance % step == 0) & (distance.abs() <= side * step)
    kept = ~_at_queries(is_query, n_q).flatten()[row]
    if (kept & ~is_global & ~in_window).any():
        raise ValueError(
            "sparse_attn: expected a pattern of one window and global tokens for "
            f"to_longformer(), got {weights.pattern!r}"
        )
    rank = (is_key.cumsum(-1) - 1).flatten()[column]
    place = torch.where(is_global, rank, number + side + distance // step)
    shape = torch.Size((batch, heads, n_q, width))
    return weights._scattered(row * width + place, shape, kept.nonzero().squeeze(1))


def of_global_queries(weights: SparseWeights) -> Tensor:
    """`SparseWeights.to_longformer_global`."""
    batch, heads, n_q, n_k = weights.shape
    if weights.pattern is None or n_q != n_k:
        raise ValueError(
            "sparse_attn: expected weights with a pattern and n_q = n_k for "
            f"to_longformer_global(), got {weights!r}"
        )
    _, is_query = _global_tokens(weights)
    number, row = _most(is_query), weights._rows()
    kept = is_query.flatten()[row].nonzero().squeeze(1)
    column = row // max(1, n_q) * n_k + weights.col_indices
    rank = (is_query.cumsum(-1) - 1).flatten()[row]
    return weights._scattered(column * number + rank, torch.Size((batch, heads, n_k, number)), kept)


def _global_tokens(weights: SparseWeights) -> tuple[Tensor, Tensor]:
    """(batch, heads, n_k) masks: keys that all see, queries that see all; padding is neither."""
    batch, heads, _, n_k = weights.shape
    pattern = weights.pattern
    patterns = pattern.patterns if isinstance(pattern, PerHead) else [pattern]
    masks = torch.zeros(2, len(patterns), n_k, dtype=torch.bool)
    for number, one in enumerate(patterns):
        for part in _token_parts(one):
            if not isinstance(part, GlobalQueries):
                masks[0, number, list(part.tokens)] = True
            if not isinstance(part, GlobalKeys):
                masks[1, number, list(part.tokens)] = True
    masks = masks.to(weights.device).repeat_interleave(heads // len(patterns), 1)[:, None]
    is_key, is_query = masks.expand(2, batch, heads, n_k)
    if weights.global_mask is not None:
        is_key, is_query = (x | weights.global_mask[:, None] for x in (is_key, is_query))
    if weights.key_padding_mask is not None:
        is_key, is_query = (x & ~weights.key_padding_mask[:, None] for x in (is_key, is_query))
    return is_key, is_query


def _most(tokens: Tensor) -> int:
    """The largest number of tokens of a head."""
    return int(tokens.sum(-1).amax()) if tokens.numel() else 0


def _at_queries(of_tokens: Tensor, n_q: int) -> Tensor:
    """A mask of tokens for the queries that stand at their positions."""
    n_k = of_tokens.shape[-1]
    return torch.nn.functional.pad(of_tokens, (max(0, n_q - n_k), 0))[..., -n_q or n_k :]


def _token_parts(pattern: Pattern) -> Iterator[Global | GlobalKeys | GlobalQueries]:
    if isinstance(pattern, (Global, GlobalKeys, GlobalQueries)):
        yield pattern
    elif isinstance(pattern, (Union, Intersection)):
        for part in pattern.parts:
            yield from _token_parts(part)
