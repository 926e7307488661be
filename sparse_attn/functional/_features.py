"""What the functions of linear attention and the state of their decoding share: how inputs are
prepared, feature maps, sums of products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn._uncompiled import constant
from sparse_attn.functional._common import (
    autocast_is_on,
    check_inputs,
    repeat_heads,
    without_padding,
)

FeatureMap = Callable[[Tensor], Tensor]

#: What features of the softmax kernel are relative to: see the op positive_features.
ROW, RUNNING = 0, 2

#: Added to features, by kernel.
KERNEL_EPS = {"softmax": 1e-4, "relu": 1e-3}


class Inputs(NamedTuple):
    """Tensors in the dtype of the sums, and the dtype of the result."""

    query: Tensor
    key: Tensor
    value: Tensor  # with a last column of ones, for the normaliser
    dtype: torch.dtype


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    enable_gqa: bool,
) -> Inputs:
    """Check the inputs, widen half types, and clear padded keys and values, whatever they hold."""
    if (
        isinstance(query, Tensor)
        and autocast_is_on(query.device.type)
        and query.dtype != torch.float64
    ):
        to = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in (query, key, value)
        )
    check_inputs(query, key, value, key_padding_mask, enable_gqa=enable_gqa)
    dtype = query.dtype
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "sparse_attn: expected query of dtype float64, float32, bfloat16 or float16, got "
            f"{dtype}"
        )
    query, key, value = (x.to(sum_dtype(dtype)) for x in (query, key, value))
    value = F.pad(value, (0, 1), value=1.0)
    key, value = (without_padding(x, key_padding_mask) for x in (key, value))
    return Inputs(query, key, value, dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def elu_plus_one(x: Tensor) -> Tensor:
    """Of operations that round alike in every place: torch's elu does not, so that its last bits
    depend on how threads share a tensor."""
    return F.relu(x) + x.clamp(max=0).exp()


def apply_map(feature_map: FeatureMap, name: str, x: Tensor) -> Tensor:
    """The features of `x`, checked."""
    features = feature_map(x)
    if not isinstance(features, Tensor):
        raise TypeError(
            f"sparse_attn: expected feature_map to give a Tensor, got {type(features).__name__}"
        )
    if features.shape[:-1] != x.shape[:-1] or features.dim() != 4 or features.shape[-1] == 0:
        raise ValueError(
            f"sparse_attn: expected feature_map to give features of {name} of shape "
            f"{(*x.shape[:-1], 'm')}, got {tuple(features.shape)}"
        )
    return features.to(x.dtype)


def map_features(
    feature_map: FeatureMap, query: Tensor, key: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features of query and key, those of padded keys 0."""
    of_query, of_key = apply_map(feature_map, "query", query), apply_map(feature_map, "key", key)
    if of_query.shape[-1] != of_key.shape[-1]:
        raise ValueError(
            "sparse_attn: expected feature_map to give as many features of key as of query, "
            f"{of_query.shape[-1]}, got {of_key.shape[-1]}"
        )
    return of_query, without_padding(of_key, key_padding_mask)


def all_products(query: Tensor, sums: Tensor) -> Tensor:
    """query · sums, for heads of the query in groups."""
    heads, heads_kv = query.shape[1], sums.shape[1]
    if heads == heads_kv:
        return ops.sum_products(query, sums)
    rows = query.unflatten(1, (heads_kv, heads // heads_kv))
    products = ops.sum_products(rows.flatten(2, 3), sums)
    return products.unflatten(2, rows.shape[2:4]).flatten(1, 2)


def causal_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Σ (query[i] · key[j]) value[j] over the keys up to the query's own, of heads in groups."""
    heads = query.shape[1]
    return ops.causal_products(query, repeat_heads(key, heads), repeat_heads(value, heads))


def normalise(sums: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The sums of values divided by the last column, that of the weights, and eps; 0 without
    keys."""
    values, weight = sums.split([sums.shape[-1] - 1, 1], -1)
    weight = weight + eps if eps else weight
    return (values / weight.masked_fill(weight == 0, 1)).to(dtype)


def check_eps(eps: float) -> float:
    # Of a layer it may be symbolic under torch.compile: then it has no __float__.
    if not isinstance(eps, (float, int)) and (
        isinstance(eps, Tensor) or not hasattr(eps, "__float__")
    ):
        raise TypeError(f"sparse_attn: expected eps to be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"sparse_attn: expected eps to be finite and at least 0, got {eps}")
    return float(eps)


# ---- random projections -------------------------------------------------------------------------


def default_num_features(head_dim: int) -> int:
    """D ln D, as of Choromanski et al."""
    return max(1, int(head_dim * math.log(head_dim)))


def draw_orthogonal(shape: tuple[int, ...], norms: str, generator: torch.Generator) -> Tensor:
    """Rows of (…, features, size), in blocks of `size` orthogonal ones; float64, on the CPU."""
    count, size = shape[-2:]
    blocks = -(-count // size)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    square = torch.randn(*shape[:-2], blocks, size, size, **options)
    q, r = torch.linalg.qr(square)
    # Signs that make Q uniform over the orthogonal matrices (Mezzadri 2007).
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    rows = q.mT.flatten(-3, -2)[..., :count, :]
    if norms == "sqrt":
        return rows * math.sqrt(size)
    return rows * torch.randn(*shape, **options).norm(dim=-1, keepdim=True)


@lru_cache(maxsize=64)
def _drawn(shape: tuple[int, ...], norms: str, seed: int) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return draw_orthogonal(shape, norms, torch.Generator("cpu").manual_seed(seed))


@constant
def drawn(
    shape: tuple[int, ...], norms: str, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rows that a seed gives, the same on every device."""
    return _drawn(shape, norms, seed).to(device=device, dtype=dtype, copy=True)
