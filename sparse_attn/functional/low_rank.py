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
from sparse_attn.functional._products import gram, product, sum_of_products, times
from sparse_attn.functional._spectrum import inverse, projector
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
def tucker_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: tuple[int, int, int],
    *,
    iterations: int = 0,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention with the keys of each example, as a tensor (heads, keys, features), replaced by
    their truncated Tucker decomposition: heads share what they have in common.

    The tensor is projected onto the leading singular vectors of its unfolding along each mode: the
    truncated higher-order singular value decomposition (De Lathauwer, De Moor and Vandewalle 2000,
    section 4). Sweeps of higher-order orthogonal iteration (part II of the same work) then fit each
    mode to the projections of the others.

    All of it follows from the products of features of all heads, in float64: memory O(n_k) +
    O((heads · head_dim)²), for each example. Gradients go through the projections, as in
    `low_rank_attention`.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        ranks: Along heads, keys and features, each at least 1. Ranks beyond what a mode has keep
            all of it; if all do, it is dense attention.
        iterations: Sweeps of higher-order orthogonal iteration, at least 0.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: Those of `low_rank_attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> from sparse_attn.functional import tucker_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> tucker_attention(query, key, value, (2, 40, 16), iterations=2).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("tucker_attention", options)
    gqa = options.get("enable_gqa", False)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=gqa)
    ranks = _check_ranks(ranks)
    iterations = index("iterations", iterations, 0)
    options |= {"key_padding_mask": key_padding_mask, "scale": scale_of(scale, query.shape[-1])}
    _, heads, n_k, size = key.shape
    full = (heads, min(n_k, heads * size), size)
    if all(rank >= most for rank, most in zip(ranks, full, strict=True)):
        return attention(query, key, value, Full(), **options)
    key = without_padding(key, key_padding_mask)
    rows = key.transpose(1, 2).flatten(2).double()
    matrix, basis = _tucker(gram(rows), heads, ranks, iterations)
    fitted = times(rows, matrix).unflatten(-1, (heads, -1)).transpose(1, 2)
    query = times(query, basis[:, None].to(query.dtype))
    return attention(query, fitted.to(key.dtype), value, Full(), **options)


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


def _check_ranks(ranks: object) -> list[int]:
    if not isinstance(ranks, (tuple, list)):
        raise TypeError(f"sparse_attn: expected ranks to be (heads, keys, features), got {ranks!r}")
    if len(ranks) != 3:
        raise ValueError(
            f"sparse_attn: expected ranks of heads, keys and features, 3 of them, got {len(ranks)}"
        )
    return [index("ranks", rank, 1) for rank in ranks]


def _tucker(
    of_rows: Tensor, heads: int, ranks: list[int], iterations: int
) -> tuple[Tensor, Tensor]:
    """What keys as rows of all heads' features are multiplied by, and the basis of the features.

    With M the keys as rows, (n_k, heads · features), `of_rows` is Mᵀ M. Projecting the modes of
    heads and features multiplies M by projectors from the right, and so does projecting the keys:
    the best approximation of M of lower rank is M W Wᵀ, W the leading eigenvectors of Mᵀ M.
    """
    rank_heads, rank_keys, rank_features = ranks
    if iterations:  # a mode that is fitted to the others has no more dimensions than they have
        rank_keys = min(rank_keys, rank_heads * rank_features)
        rank_features = min(rank_features, rank_heads * rank_keys)
        rank_heads = min(rank_heads, rank_features * rank_keys)

    def of_heads(products: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Leading singular vectors along heads, with the features projected."""
        summed = torch.einsum("bhdge,bde->bhge", products, features).sum(-1)
        return projector(summed, rank_heads)

    def of_features(products: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        summed = torch.einsum("bhdge,bhg->bdge", products, heads).sum(-2)
        return projector(summed, rank_features)

    def modes(products: Tensor) -> Tensor:
        return products.unflatten(-2, (heads, -1)).unflatten(-1, (heads, -1))

    products = modes(of_rows)
    all_heads, all_features = (torch.eye(n).to(of_rows)[None] for n in products.shape[1:3])
    project_heads, basis_heads = of_heads(products, all_features.expand(len(of_rows), -1, -1))
    project_features, basis = of_features(products, all_heads.expand(len(of_rows), -1, -1))
    project_keys = projector(of_rows, rank_keys)[0]
    for _ in range(iterations):
        others = _kronecker(basis_heads, basis)
        along = product(of_rows, others)
        inner = product(others.mT, along)
        fitted = modes(product(product(along, inverse(inner, rank_keys)), along.mT))
        project_heads, basis_heads = of_heads(fitted, project_features)
        project_features, basis = of_features(fitted, project_heads)
    if iterations:
        others = _kronecker(basis_heads, basis)
        inner = product(product(others.mT, of_rows), others)
        project_keys = product(product(others, projector(inner, rank_keys)[0]), others.mT)
    return product(project_keys, _kronecker(project_heads, basis)), basis


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bhi,bdj->bhdij", a, b).flatten(3).flatten(1, 2)


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
