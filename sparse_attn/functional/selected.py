"""Attention to the keys with the largest logits, or with logits or weights above a threshold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.functional._common import check_inputs, check_options, scale_of, visible
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import KeyLists
from sparse_attn.patterns.arguments import index


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax over the k largest logits of each query (Gupta et al. 2021, Memory-efficient
    Transformers via Top-k Attention, section 2).

    The keys are chosen while they stream by, so the memory is that of the lists, n_q · k. Of equal
    logits that of the lower index counts as larger. A query that sees fewer than k keys attends to
    all of them; k ≥ n_k is dense. Gradients go through the chosen logits; the choice has none.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        k: Keys of a query, at least 1.
        is_causal: Whether a query sees only keys up to its position, i + n_k − n_q.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: Of `attention`: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights,
            sink.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key, value = (torch.randn(1, 4, 1000, 32) for _ in range(3))
    >>> topk_attention(query, key, value, 16, is_causal=True).shape
    torch.Size([1, 4, 1000, 32])
    """
    check_options("topk_attention", options)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    pattern = visible(is_causal)
    k = index("k", k, 1)
    scale = scale_of(scale, query.shape[3])
    if k < key.shape[2]:
        seen = {"key_padding_mask": key_padding_mask, "is_causal": is_causal, "scale": scale}
        seen["enable_gqa"] = options.get("enable_gqa", False)
        pattern = KeyLists(*ops.top_keys(query, key, k, **seen))
    return attention(
        query, key, value, pattern, key_padding_mask=key_padding_mask, scale=scale, **options
    )


def threshold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | None = None,
    *,
    score_threshold: float | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention to the keys whose weight, or whose logit, reaches a threshold.

    With `threshold`, a query attends to the keys whose weight in dense attention is at least that,
    with their weights made to sum to 1 again; 0 is dense. With `score_threshold`, to those whose
    logit, scale · q · k, is. A query none of whose keys reach it gives 0. Gradients go through the
    chosen logits; the choice has none.

    The keys are chosen while they stream by: memory is n_q times the longest list, which the
    weights bound by 1 / threshold. How long it is depends on the data: a device is waited for.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        threshold: A weight in [0, 1]; or
        score_threshold: a logit, any number. Just one of both.
        is_causal: Whether a query sees only keys up to its position, i + n_k − n_q.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: Of `attention`: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights,
            sink.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key, value = (torch.randn(1, 4, 100, 32) for _ in range(3))
    >>> threshold_attention(query, key, value, 0.05).shape
    torch.Size([1, 4, 100, 32])
    >>> output, weights = threshold_attention(query, key, value, 0.05, return_weights=True)
    >>> bool((weights.values > 0.05).all())
    True
    """
    check_options("threshold_attention", options)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    pattern = visible(is_causal)
    check_thresholds(threshold, score_threshold)
    scale = scale_of(scale, query.shape[3])
    if threshold is None or threshold > 0:
        seen = {"key_padding_mask": key_padding_mask, "is_causal": is_causal, "scale": scale}
        seen["enable_gqa"] = options.get("enable_gqa", False)
        bounds = _bounds(query, key, threshold, score_threshold, seen)
        pattern = KeyLists(*ops.keys_above(query, key, bounds, **seen))
    return attention(
        query, key, value, pattern, key_padding_mask=key_padding_mask, scale=scale, **options
    )


def check_thresholds(threshold: object, score_threshold: object) -> None:
    """Raise TypeError or ValueError unless just one of both is a number, the first in [0, 1]."""
    if (threshold is None) == (score_threshold is None):
        raise ValueError(
            "sparse_attn: expected one of threshold and score_threshold, got "
            f"{'none' if threshold is None else 'both'}"
        )
    for name, number in (("threshold", threshold), ("score_threshold", score_threshold)):
        if number is None:
            continue
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__float__"):
            raise TypeError(f"sparse_attn: expected {name} to be a number, got {number!r}")
        if math.isnan(number):
            raise ValueError(f"sparse_attn: expected {name} to be a number, got nan")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"sparse_attn: expected threshold to be in [0, 1], got {threshold}")


def _bounds(
    query: Tensor,
    key: Tensor,
    threshold: float | None,
    score_threshold: float | None,
    seen: dict[str, Any],
) -> Tensor:
    """The least logit of each query that reaches the threshold.

    The log-sum-exp is that of the very logits that are compared, in float64, and the bound is
    rounded to theirs at last: n equal keys reach 1 / n.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if score_threshold is not None:
        return query.new_full(query.shape[:3], score_threshold, dtype=wide)
    lse = ops.keys_logsumexp(query, key, **seen)
    log = math.log(threshold)
    slack = 4 * torch.finfo(torch.float64).eps * (lse.abs() + abs(log))
    return (lse + log - slack).to(wide)


@torch.library.register_fake("sparse_attn::keys_above")
def _keys_above_fake(query, key, bounds, **seen):
    width = torch.library.get_ctx().new_dynamic_size()
    rows = query.shape[:3]
    return (
        query.new_empty((*rows, width), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
    )
