"""Checks that the layers share."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

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
    _check_real("dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"sparse_attn: expected dropout in [0, 1], got {dropout}")


def check_number(name: str, number: float, least: float = -math.inf) -> None:
    """Raise TypeError or ValueError unless `number` is finite, as a float, and at least `least`."""
    _check_real(name, number)
    try:
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite or number < least:
        wanted = "finite" if least == -math.inf else f"a finite number of at least {least:g}"
        raise ValueError(f"sparse_attn: expected {name} to be {wanted}, got {number}")


def _check_real(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"sparse_attn: expected {name} to be a number, got {number!r}")


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


def check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    """Raise TypeError or ValueError unless a mask is (batch, length) of `x`, or none; or, where
    nothing has to wait for it, if it is one that is added to logits.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"sparse_attn: expected {name} to be a Tensor, got {type(mask).__name__}")
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"sparse_attn: expected {name} of shape {tuple(x.shape[:2])} (batch, length), got "
            f"{tuple(mask.shape)}"
        )
    if mask.device.type == "cpu" and mask.is_floating_point() and _is_added(mask):
        raise ValueError(
            f"sparse_attn: expected {name} of 1 and 0, got negative numbers or NaN, as in a mask "
            "that is added to logits"
        )


def _is_added(mask: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        return not bool((mask >= 0).all())
    except RuntimeError:  # a transform or a fake tensor, which show no numbers
        return False


def through(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """module(x). Raise TypeError or ValueError if `x` has not the dtype or the device of its
    weight.
    """
    try:
        return module(x)
    except RuntimeError:
        # Only now: what stands in a module's place may take other dtypes than its weight's.
        _check_alike(name, x, getattr(module, "weight", None))
        raise


def _check_alike(name: str, x: Tensor, weight: object) -> None:
    if not isinstance(weight, Tensor):
        return
    if x.dtype != weight.dtype:
        raise TypeError(f"sparse_attn: expected {name} of dtype {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"sparse_attn: expected {name} on device {weight.device}, got {x.device}")
