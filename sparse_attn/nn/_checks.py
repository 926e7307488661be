"""Checks that the layers share."""

from __future__ import annotations

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
    """Raise ValueError unless `dropout` is a probability."""
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"sparse_attn: expected dropout in [0, 1], got {dropout}")


def check_sequence(name: str, x: Tensor, embed_dim: int) -> None:
    """Raise ValueError unless `x` is (batch, length, embed_dim)."""
    if x.dim() != 3 or x.shape[-1] != embed_dim:
        raise ValueError(
            f"sparse_attn: expected {name} of shape (batch, length, {embed_dim}), got "
            f"{tuple(x.shape)}"
        )
