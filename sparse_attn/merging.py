"""Attention over two sets of keys, out of the attention over each."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join what the same queries found in two disjoint sets of keys.

    lse = log(e^lse1 + e^lse2) and out = out1 · e^(lse1 − lse) + out2 · e^(lse2 − lse), as in
    FlashAttention (Dao et al. 2022, section 3.1): one softmax over both sets. A query that saw no
    key in one part (log-sum-exp −inf) takes the other; in neither: output 0, log-sum-exp −inf,
    gradient 0. The parts must be computed without a sink. Differentiable twice, and in forward
    mode.

    Args:
        out1: (…, n_q, value_dim), from `attention(…, return_lse=True)` over the first keys.
        lse1: (…, n_q), natural logarithm; float32 for half types.
        out2: As out1, over the other keys.
        lse2: As lse1.

    Returns:
        The output, as out1, and the log-sum-exp, as lse1, over all keys. Half types are joined in
        the log-sum-exp's dtype.

    Raises:
        TypeError: An argument is no floating-point Tensor, or the dtypes of the parts differ.
        ValueError: The shapes or devices do not fit.

    >>> from sparse_attn import Full, attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> halves = zip(key.split(50, 2), value.split(50, 2))
    >>> parts = [attention(query, k, v, Full(), return_lse=True) for k, v in halves]
    >>> output, lse = merge(*parts[0], *parts[1])
    >>> torch.allclose(output, attention(query, key, value, Full()), atol=1e-5)
    True
    """
    _check(out1=out1, lse1=lse1, out2=out2, lse2=lse2)
    empty1, empty2 = lse1 == -math.inf, lse2 == -math.inf
    # Numbers in place of infinities, before any arithmetic: no gradient becomes 0 · inf.
    finite1, finite2 = lse1.masked_fill(empty1, 0), lse2.masked_fill(empty2, 0)
    share1, share2 = softmax_of_two(finite1 - finite2)
    share1 = share1.masked_fill(empty2, 1).masked_fill(empty1, 0)
    share2 = share2.masked_fill(empty1, 1).masked_fill(empty2, 0)
    wide = torch.promote_types(out1.dtype, lse1.dtype)
    out = _weigh(out1.to(wide), share1, empty1) + _weigh(out2.to(wide), share2, empty2)
    both = torch.logaddexp(finite1, finite2)
    lse = torch.where(empty1, finite2, torch.where(empty2, finite1, both))
    return out.to(out1.dtype), lse.masked_fill(empty1 & empty2, -math.inf)


def softmax_of_two(difference: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of two logits, the first of which is greater by `difference`.

    Both follow from the smaller one, so that derivatives are as precise: that of σ near 1 has 1 − σ
    in it, where nothing is left of a small other share.
    """
    first_leads = difference >= 0
    smaller = torch.sigmoid(torch.where(first_leads, -difference, difference))
    larger = 1 - smaller
    first = torch.where(first_leads, larger, smaller)
    return first, torch.where(first_leads, smaller, larger)


def _weigh(out: Tensor, share: Tensor, empty: Tensor) -> Tensor:
    return out.masked_fill(empty[..., None], 0) * share[..., None]


def _check(**parts: Tensor) -> None:
    for name, part in parts.items():
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"sparse_attn: expected {name} to be a floating Tensor, got {got}")
    out1, lse1, *_ = parts.values()
    if out1.dim() < 2:
        raise ValueError(
            f"sparse_attn: expected out1 of shape (..., n_q, value_dim), got {tuple(out1.shape)}"
        )
    for name, part in parts.items():
        like, shape = (out1, out1.shape) if name.startswith("out") else (lse1, out1.shape[:-1])
        if part.dtype != like.dtype:
            raise TypeError(f"sparse_attn: expected {name} of dtype {like.dtype}, got {part.dtype}")
        if part.shape != shape:
            raise ValueError(
                f"sparse_attn: expected {name} of shape {tuple(shape)}, as out1, got "
                f"{tuple(part.shape)}"
            )
        if part.device != out1.device:
            raise ValueError(
                f"sparse_attn: expected {name} on {out1.device}, as out1, got {part.device}"
            )
