"""Patterns fitted to data: the blocks or keys that matter most, by attention or by gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sparse_attn.analysis._blocks import (
    BlockScores,
    attention_mass,
    check_share,
    gradient_importance,
)
from sparse_attn.analysis._samples import read_samples
from sparse_attn.patterns import Pattern
from sparse_attn.patterns.arguments import index


@torch.no_grad()
def fit_pattern(
    samples: Iterable[object],
    block: int,
    density: float,
    *,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Pattern:
    """The layout of blocks, for each head its own, that keeps most of the attention of the samples.

    The exact weights of each block of `block` × `block` tokens are summed over its pairs, the
    examples of a batch, and the samples. Each head keeps the blocks with the largest sums, as
    many as `density` allows, ties going to the earlier block; no other layout of as many blocks in
    which each row has one keeps more. Memory grows with the number of blocks, and with the
    tensors of a sample.

    Args:
        samples: (query, key) or (query, key, value) or dicts, as `record_attention` makes them, all
            with the same heads: `query` (batch, heads, n_q, head_dim), `key` (batch, heads, n_k,
            head_dim), and if wanted `key_padding_mask` (batch, n_k) bool, True = ignore this key,
            `query_padding_mask` (batch, n_q) bool, True = ignore this query, `is_causal`, `scale`,
            `enable_gqa`. They are read once, one by one. The layout is as large as the longest one;
            blocks are counted from the first token, so shorter samples count for the blocks that
            they have.
        block: Tokens of a block, at least 1.
        density: Share of the blocks that a head keeps, in (0, 1]; causal: of those on or below the
            diagonal. Rounded down, but each row of blocks keeps its best one, or, if causal, those
            in which its queries see themselves.
        is_causal: Attention is over `Causal()`. If None, as the samples say; else False.
        scale: Factor of the products; if None, as a sample says, else 1 / √head_dim.
        enable_gqa: Let key have fewer heads than query, as in `attention`.

    Returns:
        A `BlockLayout` with a layout (heads, blocks of queries, blocks of keys); if causal, that
        layout & `Causal()`, as blocks on the diagonal hold later keys.

    Raises:
        TypeError: An argument or a sample has the wrong type or dtype.
        ValueError: There is no sample, or none with a query and a key; density or block is out of
            range; a shape does not fit; or samples differ in their heads, in being causal, or, if
            causal, in n_k − n_q.

    >>> samples = [(torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)) for _ in range(3)]
    >>> pattern = fit_pattern(samples, block=16, density=0.5)
    >>> pattern, pattern.layout.sum((1, 2))
    (BlockLayout(<bool [2, 4, 4]>, 16), tensor([8, 8]))
    """
    block, density = index("block", block, 1), check_share("density", density)
    masses = BlockScores(block)
    for sample in read_samples(samples, is_causal, scale, enable_gqa):
        masses.add(sample, attention_mass)
    return masses.layout(density)


@torch.no_grad()
def gradient_pattern(
    samples: Iterable[object],
    block: int = 1,
    density: float | None = None,
    *,
    keys: int | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Pattern:
    """The pairs, fixed for all inputs, whose weights matter most to the loss of the samples.

    A pair's importance is |w · ∂loss/∂w| for its exact attention weight w: to first order, how much
    the loss changes if the weight is taken away (Molchanov et al. 2017, section 2.2, for
    attention). ∂loss/∂w[b, h, i, j] is grad_output[b, h, i] · value[b, h, j]. Importances are
    summed over the pairs of a block, the examples, and the samples.

    Args:
        samples: (query, key, value, grad_output) or dicts with these, as for `fit_pattern`;
            `record_attention` collects them. value is (batch, heads, n_k, value_dim), grad_output,
            the gradient of the loss with respect to the output, (batch, heads, n_q, value_dim).
        block: Tokens of a block, at least 1. With 1, memory grows with n_q · n_k.
        density: Share of the blocks that a head keeps, as for `fit_pattern`.
        keys: Instead of density: how many keys each query keeps, the most important ones, ties
            to the earlier key; block must be 1.
        is_causal: Attention is over `Causal()`. If None, as the samples say; else False.
        scale: Factor of the products; if None, as a sample says, else 1 / √head_dim.
        enable_gqa: Let key and value have fewer heads than query, as in `attention`.

    Returns:
        With density, a `BlockLayout` with a layout (heads, blocks of queries, blocks of keys); with
        keys, `KeyLists` with indices (heads, n_q, keys). If causal, that & `Causal()`.

    Raises:
        TypeError: An argument or a sample has the wrong type or dtype.
        ValueError: As for `fit_pattern`; or not exactly one of density and keys is given, or a
            sample has no value or grad_output.

    >>> def sample():
    ...     query, key, value = (torch.randn(1, 2, 32, 8, requires_grad=True) for _ in range(3))
    ...     output = attention(query, key, value, Full())
    ...     (grad_output,) = torch.autograd.grad(output.square().sum(), output)
    ...     return query, key, value, grad_output
    >>> gradient_pattern([sample() for _ in range(4)], keys=6)
    KeyLists(<int64 [2, 32, 6]>)
    """
    block = index("block", block, 1)
    if (density is None) == (keys is None):
        raise ValueError("sparse_attn: expected exactly one of density and keys, got both or none")
    if keys is not None and block != 1:
        raise ValueError(f"sparse_attn: expected block to be 1 with keys, got {block}")
    importance = BlockScores(block)
    for sample in read_samples(samples, is_causal, scale, enable_gqa, gradients=True):
        importance.add(sample, gradient_importance)
    if keys is None:
        return importance.layout(check_share("density", density))
    return importance.key_lists(index("keys", keys, 1))
