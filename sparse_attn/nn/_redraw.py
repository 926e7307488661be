"""Attention over random patterns that are drawn anew for each call, example and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn._uncompiled import uncompiled
from sparse_attn.functional import attention
from sparse_attn.patterns import Pattern, PerHead


def check_random(pattern: Pattern) -> None:
    """Raise ValueError unless some of the pattern is random."""
    if pattern.reseeded(1) == pattern:
        raise ValueError(
            "sparse_attn: expected redraw=True with a pattern that is random, such as "
            f"RandomTokens(0.1), got {pattern}"
        )


def redrawn_attention(*tensors: Tensor, **options: Any) -> Tensor:
    """As `attention`, with the random parts of the pattern drawn anew for every example and head.

    Seeds come from torch's generator of the CPU.
    """
    return _by_padding(*tensors, **options)


@uncompiled  # a graph would hold the seeds of its first call
def _by_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    key_padding_mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """All examples at once, or one by one if they have padding of their own."""
    _check_examples(query, key, value, key_padding_mask)
    if key_padding_mask is None or len(query) == 0:
        return _all_at_once(query, key, value, pattern, **options)
    examples = zip(*(x.split(1) for x in (query, key, value, key_padding_mask)), strict=True)
    return torch.cat(
        [
            _all_at_once(*one, pattern, key_padding_mask=padding, **options)
            for *one, padding in examples
        ]
    )


def _all_at_once(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, **options: Any
) -> Tensor:
    """Examples become heads of a single one, because patterns may differ among heads."""
    sizes = query.shape[:2]
    folded = (x.flatten(0, 1)[None] for x in (query, key, value))
    return attention(*folded, _redraw(pattern, *sizes), **options)[0].unflatten(0, sizes)


def _redraw(pattern: Pattern, batch: int, heads: int) -> PerHead:
    """A pattern for every head of every example."""
    of_heads = pattern.patterns if isinstance(pattern, PerHead) else (pattern,)
    if heads % len(of_heads):
        raise ValueError(
            "sparse_attn: expected pattern to list a number of patterns that divides the "
            f"{heads} heads, got {len(of_heads)}"
        )
    group = heads // len(of_heads)
    seeds = torch.randint(2**63 - 1, (max(1, batch), heads), device="cpu").tolist()
    return PerHead(
        [of_heads[head // group].reseeded(s) for row in seeds for head, s in enumerate(row)]
    )


def _check_examples(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
    """What `attention` checks, but could not tell in words of the caller's shapes."""
    for name, x in (("key", key), ("value", value)):
        if len(x) != len(query):
            raise ValueError(
                f"sparse_attn: expected {name} of batch {len(query)}, as query, got {len(x)}"
            )
    if padding is None:
        return
    if not isinstance(padding, Tensor):
        raise TypeError(
            f"sparse_attn: expected key_padding_mask to be a Tensor, got {type(padding).__name__}"
        )
    expected = (len(key), key.shape[2])
    if padding.shape != expected:
        raise ValueError(
            f"sparse_attn: expected key_padding_mask of shape {list(expected)} (batch, keys), "
            f"got {list(padding.shape)}"
        )
