"""Attention to the truncated Tucker decomposition of the keys of all heads."""

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
from sparse_attn.functional._products import gram, product, times
from sparse_attn.functional._spectrum import inverse, projector
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full
from sparse_attn.patterns.arguments import index


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
