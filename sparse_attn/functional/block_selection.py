"""Attention to the blocks of keys that fit a block of queries best."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn.functional._common import check_inputs, check_options, visible
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import BlockLayout, Causal
from sparse_attn.patterns.arguments import index


def block_topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    keep: int | float,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    pool: str = "mean",
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of each block of queries over the blocks of keys that `choose_blocks` gives it.

    The choice itself has no gradient; the attention over the chosen blocks has. Memory is linear
    in the length, and a bit for each pair of blocks.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        block: Tokens of a block; the last one may be shorter.
        keep: Blocks of keys for each block of queries, or the share of them, a float in (0, 1].
        is_causal: Intersect with `Causal()`.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None. A negative one does not turn the
            choice round.
        pool: "mean" or "max": how the tokens of a block become the vector that stands for it.
        **options: Of `attention`: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights,
            sink.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key, value = (torch.randn(1, 4, 1000, 32) for _ in range(3))
    >>> block_topk_attention(query, key, value, block=64, keep=4, is_causal=True).shape
    torch.Size([1, 4, 1000, 32])
    """
    check_options("block_topk_attention", options)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    chosen = choose_blocks(
        query,
        key,
        block=block,
        keep=keep,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        pool=pool,
    )
    pattern = chosen & Causal() if is_causal else chosen
    return attention(
        query, key, value, pattern, key_padding_mask=key_padding_mask, scale=scale, **options
    )


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    keep: int | float,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    pool: str = "mean",
) -> BlockLayout:
    """The blocks of keys whose pooled keys have the largest product with a block's pooled query.

    Ties go to the lower block. Padded tokens do not count, and blocks of nothing else are never
    chosen. Where a query stands at a padded place (n_q = n_k), it does not count either, unless its
    block has no others.

    With `is_causal`, blocks that lie wholly in the future are never chosen; those that hold the
    positions of the queries always are, as the first of the `keep`; and the first query of a block
    stands for it: a mean would let later tokens choose what earlier ones see.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim), or with a number of heads that divides the query's.
        block: Tokens of a block, at least 1; the last one may be shorter.
        keep: Blocks of keys for each block of queries, at least 1; or a float in (0, 1], the share
            of those that it may see, rounded up.
        is_causal: Whether a query sees only keys up to its position, i + n_k − n_q.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        pool: "mean" or "max" over the tokens of a block.

    Returns:
        A `BlockLayout` with a layout (batch, heads, ⌈n_q / block⌉, ⌈n_k / block⌉).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> query, key = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 8, 8)
    >>> key[:, :, 4:6] = 2
    >>> choose_blocks(query, key, block=2, keep=1).layout.int()
    tensor([[[[0, 0, 1, 0],
              [0, 0, 1, 0]]]], dtype=torch.int32)
    """
    check_inputs(query, key, key, key_padding_mask, enable_gqa=True)
    visible(is_causal)
    block = index("block", block, 1)
    _check_keep(keep)
    if pool not in ("mean", "max"):
        raise ValueError(f'sparse_attn: expected pool to be "mean" or "max", got {pool!r}')
    n_q, n_k = query.shape[2], key.shape[2]
    padding = key.new_zeros(key.shape[0], n_k, dtype=torch.bool)
    padding = padding if key_padding_mask is None else key_padding_mask
    padded_queries = padding if n_q == n_k else padding.new_zeros(query.shape[0], n_q)
    # In float64, so that blocks of equal tokens tie however the sums are ordered.
    queries = _split(query.double(), block), _counted(padded_queries, block)
    queries = queries[0], queries[1] | ~queries[1].any(-2, keepdim=True)
    keys = _split(key.double(), block), _counted(padding, block)
    pooled_query = _first(*queries) if is_causal else _pool(*queries, pool)
    pooled_key = _pool(*keys, pool).repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (pooled_query @ pooled_key.mT).to(wide)

    allowed = keys[1].any(3).squeeze(3)[:, :, None].expand(scores.shape)
    if is_causal:
        future, diagonal = _positions(n_q, n_k, block, query.device)
        allowed = allowed & ~future
        scores = scores.masked_fill(diagonal, math.inf)
    scores = scores.masked_fill(~allowed, -math.inf)
    kept = _count(keep, allowed)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    layout = torch.zeros_like(allowed).scatter(-1, order, ranks < kept)
    if is_causal:
        layout = layout | diagonal
    return BlockLayout(layout & allowed, block)


def _check_keep(keep: object) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(
            f"sparse_attn: expected keep to be a number of blocks or a share, got {keep!r}"
        )
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"sparse_attn: expected keep to be at least 1 block, got {keep}")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"sparse_attn: expected keep to be a share in (0, 1], got {keep}")


def _count(keep: int | float, allowed: Tensor) -> int | Tensor:
    """How many blocks a row keeps; 0.55 of 100 is 55, whatever the product rounds to."""
    if isinstance(keep, int):
        return min(keep, allowed.shape[-1])
    return (keep * allowed.sum(-1, keepdim=True, dtype=torch.float64) - 1e-9).ceil()


def _split(rows: Tensor, block: int) -> Tensor:
    """(…, length, size) to (…, blocks, block, size), filled up with zeros."""
    missing = -rows.shape[-2] % block
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(-2, (-1, block))


def _counted(padding: Tensor, block: int) -> Tensor:
    """(batch, 1, blocks, block, 1): the tokens that are not padded."""
    return _split(~padding[:, None, :, None], block)


def _pool(blocks: Tensor, counted: Tensor, pool: str) -> Tensor:
    """Over the tokens that count; a block without any gives 0."""
    some = counted.any(-2)
    if pool == "max":
        return blocks.masked_fill(~counted, -math.inf).amax(-2).masked_fill(~some, 0.0)
    total = blocks.masked_fill(~counted, 0.0).sum(-2)
    return total / counted.sum(-2).clamp(min=1)


def _first(blocks: Tensor, counted: Tensor) -> Tensor:
    """The first token of each block that counts, the very first if none does."""
    first = counted.byte().argmax(-2, keepdim=True)
    return blocks.take_along_dim(first, -2).squeeze(-2)


def _positions(n_q: int, n_k: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks of keys begin after the last query of a block, and which hold its queries."""
    first = torch.arange(0, n_q, block, device=device)[:, None] + (n_k - n_q)
    last = (first + block - 1).clamp(max=n_k - 1)
    begin = torch.arange(0, n_k, block, device=device)
    return begin > last, (begin <= last) & (begin + block > first)
