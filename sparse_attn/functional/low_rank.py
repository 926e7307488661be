"""Attention to few keys that stand for all, or to keys of lower rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.functional._common import (
    check_inputs,
    check_options,
    in_autocast_dtype,
    scale_of,
    without_padding,
)
from sparse_attn.functional._products import gram, sum_of_products, times
from sparse_attn.functional._spectrum import projector
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full
from sparse_attn.patterns.arguments import index


@in_autocast_dtype
def low_rank_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale · query · K_rᵀ) value, K_r the best approximation of the keys of this rank.

    K_r is the truncated singular value decomposition of the keys of each example and head (Eckart
    and Young 1936), so the products query · K_rᵀ have rank r, and no logit is off by more than
    scale · ‖query‖ · σ_{r + 1}. With V_r the leading right singular vectors, K_r = (key V_r) V_rᵀ:
    heads of size r are what is left to compute. V_r comes from keyᵀ key, in float64. It depends
    on all keys, so there is no causal form.

    The gradient is that of K_r. It is finite where singular values repeat, and right where they do
    so on one side of r; where σ_r = σ_{r + 1} ≠ 0, K_r is not unique and what turns one into the
    other gets none. It can be taken once.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        rank: At least 1. From min(n_k, head_dim) on it is dense attention.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights, sink of
            `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> from sparse_attn.functional import low_rank_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> low_rank_attention(query, key, value, 8).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("low_rank_attention", options)
    gqa = options.get("enable_gqa", False)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=gqa)
    rank = index("rank", rank, 1)
    options |= {"key_padding_mask": key_padding_mask, "scale": scale_of(scale, query.shape[-1])}
    if rank >= min(key.shape[2:]):
        return attention(query, key, value, Full(), **options)
    key = without_padding(key, key_padding_mask)
    basis = projector(gram(key.double()), rank)[1].to(key.dtype)
    group = query.shape[1] // max(key.shape[1], 1)
    query = times(query, basis.repeat_interleave(group, 1))
    return attention(query, times(key, basis), value, Full(), **options)


@in_autocast_dtype
def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_k: Tensor,
    proj_v: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention to k mixtures of the keys: softmax(scale · query · K'ᵀ) V' with K' = proj_kᵀ key,
    V' = proj_vᵀ value (Linformer, Wang et al. 2020, section 4).

    Padded keys and values count as 0 in the mixtures; an example that has nothing but padding
    gives 0. Every mixture holds later keys, so there is no causal form.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        proj_k: (n_k, k), or (heads, n_k, k) for a projection of its own for each head. Of a longer
            one the first n_k rows are taken, so that one projection serves shorter inputs.
        proj_v: The same for the values, with the same k; proj_k if None.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: Those of `low_rank_attention`; dropout, log-sum-exp and weights are over the k
            mixtures. With `enable_gqa`, heads are those of the keys.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit, or a projection is shorter than n_k.

    >>> import torch
    >>> from sparse_attn.functional import linformer_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> linformer_attention(query, key, value, torch.randn(100, 16)).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("linformer_attention", options)
    gqa = options.get("enable_gqa", False)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=gqa)
    _check_projection("proj_k", proj_k, key)
    proj_v = proj_k if proj_v is None else proj_v
    _check_projection("proj_v", proj_v, key)
    if proj_v.shape[-1] != proj_k.shape[-1]:
        raise ValueError(
            f"sparse_attn: expected proj_v with {proj_k.shape[-1]} mixtures, as proj_k, got "
            f"{proj_v.shape[-1]}"
        )
    empty = _without_keys(key, key_padding_mask)
    key = _mixtures(without_padding(key, key_padding_mask), proj_k)
    value = _mixtures(without_padding(value, key_padding_mask), proj_v)
    return attention(
        query,
        key,
        value,
        Full(),
        key_padding_mask=None if empty is None else empty.expand(-1, key.shape[2]),
        scale=scale_of(scale, query.shape[-1]),
        **options,
    )


def _check_projection(name: str, projection: object, key: Tensor) -> None:
    if not isinstance(projection, Tensor):
        raise TypeError(
            f"sparse_attn: expected {name} to be a Tensor, got {type(projection).__name__}"
        )
    if projection.dtype != key.dtype:
        raise TypeError(
            f"sparse_attn: expected {name} of dtype {key.dtype}, as key, got {projection.dtype}"
        )
    if projection.device != key.device:
        raise ValueError(
            f"sparse_attn: expected {name} on device {key.device}, got {projection.device}"
        )
    _, heads, n_k, _ = key.shape
    shape = tuple(projection.shape)
    fits = len(shape) in (2, 3) and shape[:-2] in ((), (1,), (heads,))
    if not fits or shape[-2] < n_k or shape[-1] < 1:
        raise ValueError(
            f"sparse_attn: expected {name} of shape ({n_k}, k) or ({heads}, {n_k}, k), of at least "
            f"{n_k} rows, one for each key, got {shape}"
        )


def _mixtures(x: Tensor, projection: Tensor) -> Tensor:
    """projectionᵀ x for each example and head; half types are summed in float32."""
    batch, heads, n_k, size = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    if projection.dim() == 2:
        projection = projection[None]
    own = max(len(projection), 1)
    shared = heads // own  # heads of a projection: all, or one
    rows = x.to(wide).unflatten(1, (own, shared)).permute(1, 3, 0, 2, 4).flatten(2)
    mixed = sum_of_products(projection[:, :n_k].to(wide), rows)
    mixed = mixed.unflatten(-1, (batch, shared, size)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    return mixed.to(x.dtype)


def _without_keys(key: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
    """(batch, 1), whether an example has no key at all; None if all have."""
    if key.shape[2] == 0:
        return torch.ones(len(key), 1, dtype=torch.bool, device=key.device)
    return None if key_padding_mask is None else key_padding_mask.all(-1, keepdim=True)
