"""The masks of torch.nn.MultiheadAttention, as this library takes them."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """What `key_padding_mask` and `attn_mask` say."""

    padding: Tensor | None  # (batch, n_k) bool, True = ignore this key
    excluded: Tensor | None  # (batch or 1, heads or 1, n_q, n_k) bool, True = ignore this pair
    bias: Tensor | None  # (batch or 1, heads or 1, n_q, n_k), added to the logits


def check_types(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """Raise AssertionError unless masks are bool or floating, and warn unless both are alike."""
    given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    dtypes = {name: mask.dtype for name, mask in given.items() if mask is not None}
    for name, dtype in dtypes.items():
        if dtype != torch.bool and not dtype.is_floating_point:
            raise AssertionError(
                f"sparse_attn: only bool and floating types of {name} are supported, got {dtype}"
            )
    if len(set(dtypes.values())) > 1:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type "
            f"for both instead of {' and '.join(map(str, dtypes.values()))}.",
            stacklevel=3,
        )


def read_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
) -> Masks:
    """Read the masks of a call with these sizes.

    Args:
        key_padding_mask: (batch, n_k), or (n_k) of unbatched input.
        attn_mask: (n_q, n_k) or (batch · heads, n_q, n_k).

    Raises:
        RuntimeError: attn_mask has another shape.
        AssertionError: key_padding_mask has another shape.
    """
    excluded = bias = padding = None
    if attn_mask is not None:
        attn_mask = _per_head(attn_mask, batch, heads, n_q, n_k)
        excluded, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        for at, size in enumerate((batch, n_k)):
            if padding.shape[at] != size:
                raise AssertionError(
                    f"sparse_attn: Expected key_padded_mask.shape[{at}] to be {size}, but got "
                    f"{padding.shape[at]}"
                )
        if padding.dtype != torch.bool:
            padding, added = padding == -math.inf, padding
            # Without memory: every query has the same row.
            added = added.masked_fill(padding, 0)[:, None, None].expand(-1, -1, n_q, -1)
            bias = added if bias is None else bias + added
    return Masks(padding, excluded, bias)


def _per_head(attn_mask: Tensor, batch: int, heads: int, n_q: int, n_k: int) -> Tensor:
    """(1 or batch, 1 or heads, n_q, n_k)."""
    dims = attn_mask.dim()
    expected = (n_q, n_k) if dims == 2 else (batch * heads, n_q, n_k)
    if attn_mask.shape != expected:
        raise RuntimeError(
            f"The shape of the {dims}D attn_mask is {attn_mask.shape}, but should be {expected}."
        )
    return attn_mask[None, None] if dims == 2 else attn_mask.unflatten(0, (batch, heads))
