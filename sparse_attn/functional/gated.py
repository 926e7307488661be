"""Attention whose products are gated, or whose pairs or gates the content chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_attn.functional._common import check_inputs, visible, without_padding
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full, Mask, Pattern
from sparse_attn.tables import BlockBias, SlotBias


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | SlotBias | BlockBias,
    *,
    pattern: Pattern | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale · (query · keyᵀ ⊙ gate)) value over the pattern.

    A gate of 0 makes a logit 0, it does not exclude the key. For a learned gate pass
    `torch.sigmoid(parameter)`; see `LearnedSparseSelfAttention`.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        gate: (batch or 1, heads or 1, n_q, n_k), for each pair; (heads, slots) or (heads, n_q,
            slots), for the slots of the pattern's window; a `SlotBias` or a `BlockBias`. Pairs off
            the slots have a gate of 1.
        pattern: A `Pattern`; all pairs if None.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: The others of `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> from sparse_attn import Window
    >>> from sparse_attn.functional import gated_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> gate = torch.sigmoid(torch.zeros(4, 33, requires_grad=True))
    >>> gated_attention(query, key, value, gate, pattern=Window(16)).shape
    torch.Size([2, 4, 100, 32])
    """
    if gate is None:
        raise TypeError(
            "sparse_attn: expected gate to be a Tensor, a SlotBias or a BlockBias, got None"
        )
    return attention(
        query,
        key,
        value,
        Full() if pattern is None else pattern,
        gate=gate,
        key_padding_mask=key_padding_mask,
        scale=scale,
        **options,
    )


def dynamic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    generate: Callable[[Tensor, Tensor, Tensor], Tensor | Pattern | SlotBias | BlockBias],
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over the pairs, or with the gate, that a function makes of the content.

    Gradients reach a gate and what made it. Nothing differentiates the choice of pairs. A gate or a
    mask of (batch, heads, n_q, n_k) is as large as it is; the memory of a `BlockLayout` or a
    `KeyLists`, and of a gate with one row or one column for all, is linear in the length.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        generate: Called as `generate(query, key, value)`, where padded keys and values are 0. It
            returns a bool tensor (True = allowed) or a floating one (a gate, as in
            `gated_attention`), either broadcastable to (batch, heads, n_q, n_k); or a `Pattern`,
            such as `BlockLayout(layout, block)`, whose tensors may differ among examples and heads;
            or a `BlockBias`, a gate for blocks.
        is_causal: Whether queries see only keys up to their own position (the ends are aligned).
            What `generate` looks at is its own affair.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: The others of `attention`, but for `gate`.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype, or `generate` is not callable or returns
            something else.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> from sparse_attn.functional import dynamic_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> similar = lambda query, key, value: query @ key.mT > 0
    >>> dynamic_attention(query, key, value, similar).shape
    torch.Size([2, 4, 100, 32])
    """
    seen = visible(is_causal)
    if not callable(generate):
        raise TypeError(f"sparse_attn: expected generate to be callable, got {generate!r}")
    if "gate" in options:
        raise TypeError("sparse_attn: expected the gate to come from generate, got gate")
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    key, value = (without_padding(x, key_padding_mask) for x in (key, value))
    made = generate(query, key, value)
    options |= {"key_padding_mask": key_padding_mask, "scale": scale}
    if isinstance(made, Pattern):
        return attention(query, key, value, made & seen if is_causal else made, **options)
    if isinstance(made, BlockBias):
        return attention(query, key, value, seen, gate=made, **options)
    if not isinstance(made, Tensor) or not (made.dtype == torch.bool or made.is_floating_point()):
        what = made.dtype if isinstance(made, Tensor) else type(made).__name__
        raise TypeError(
            "sparse_attn: expected generate to return a bool or floating Tensor, a BlockLayout or "
            f"another Pattern, or a BlockBias, got {what}"
        )
    made = _of_pairs(made, query, key)
    if made.dtype == torch.bool:
        pattern = Mask(made.expand(*made.shape[:2], query.shape[2], key.shape[2]))
        return attention(query, key, value, pattern & seen if is_causal else pattern, **options)
    if made.shape[2:] == (query.shape[2], key.shape[2]):
        return attention(query, key, value, seen, gate=made, **options)
    query, key, value = _gate_tokens(query, key, value, made)
    return attention(query, key, value, seen, **options)


def _of_pairs(made: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """With four dimensions, each of them 1 or that of the pairs."""
    pairs = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - made.dim()) + tuple(made.shape)
    fits = len(shape) == 4 and all(n in (1, of) for n, of in zip(shape, pairs, strict=True))
    if not fits:
        raise ValueError(
            f"sparse_attn: expected generate to return a tensor broadcastable to {pairs}, got one "
            f"of shape {tuple(made.shape)}"
        )
    return made.reshape(shape)


def _gate_tokens(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A gate that is the same for all keys, or for all queries, is a factor of the others: no table
    of the pairs is made, nor a gradient of one.
    """
    if gate.shape[3] == 1:
        return (query * gate).to(query.dtype), key, value
    if gate.shape[1] > key.shape[1]:  # grouped queries whose gates differ
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return query, (key * gate.mT).to(key.dtype), value
