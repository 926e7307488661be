"""Checks that the layers share."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

from sparse_attn.patterns.arguments import index


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise unless both are ints and the heads divide the channels among them."""
    embed_dim, num_heads = index("embed_dim", embed_dim, 1), index("num_heads", num_heads, 1)
    if embed_dim % num_heads:
        raise ValueError(
            "sparse_attn: expected embed_dim to be a multiple of num_heads, got "
            f"{embed_dim} and {num_heads}"
        )


def check_dropout(dropout: float) -> None:
    """Raise TypeError or ValueError unless `dropout` is a probability."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"sparse_attn: expected dropout to be a number, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"sparse_attn: expected dropout in [0, 1], got {dropout}")


def check_sequence(name: str, x: Tensor, embed_dim: int) -> None:
    """Raise TypeError or ValueError unless `x` is floating, (batch, length, embed_dim)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"sparse_attn: expected {name} to be a floating-point Tensor, got {got}")
    if x.dim() != 3 or x.shape[-1] != embed_dim:
        raise ValueError(
            f"sparse_attn: expected {name} of shape (batch, length, {embed_dim}), got "
            f"{tuple(x.shape)}"
        )


def check_alike(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless `x` has the dtype and the device of a weight."""
    if x.dtype != weight.dtype:
        raise TypeError(f"sparse_attn: expected {name} of dtype {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"sparse_attn: expected {name} on device {weight.device}, got {x.device}")
