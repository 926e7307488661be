"""Attention over the keys that share a group with the query: a bucket of a hash, or a cluster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn._library import ops
from sparse_attn.functional._clusters import attend_in_clusters
from sparse_attn.functional._common import (
    check_flag,
    check_inputs,
    check_options,
    check_padding,
    repeat_heads,
    visible,
    without_autocast,
    without_padding,
)
from sparse_attn.functional.hashing import bucket_factors, check_rounds, draw_rotations, lsh_buckets
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import KeyLists
from sparse_attn.patterns.arguments import MOST, index


def lsh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_buckets: int,
    num_hashes: int = 1,
    seed: int | torch.Generator | None = 0,
    rotations: Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Any, ...]:
    """Softmax attention over the keys that share the query's bucket in at least one round of
    hashing, once each.

    Buckets are those of `lsh_buckets`, by the directions of queries and keys: keys that a query is
    likely to attend to probably fall into its bucket. No chunks cut buckets apart, as they do in
    Reformer (Kitaev et al. 2020, section 2): `chunked_lsh_attention` is that. Where buckets are of
    about equal size, work and memory grow as num_hashes · length² / num_buckets.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        num_buckets: Buckets of a round: even, or 1 for dense attention.
        num_hashes: Rounds of hashing.
        seed: Of the random rotations: an int gives the same ones at every call and on every device;
            a torch.Generator goes on from where it stands; None takes torch's own.
        rotations: (heads or 1, head_dim, num_hashes, num_buckets / 2) in place of seed.
        is_causal: Let query i see keys up to its position, i + n_k − n_q.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights and sink of
            `attention`.

    Returns:
        As `attention`. A query that shares no bucket with a key gives 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or device does not fit, num_buckets is neither even nor 1, or num_hashes
            is less than 1.

    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> lsh_attention(query, key, value, num_buckets=8, num_hashes=2).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("lsh_attention", options)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    seen = visible(is_causal)
    num_hashes = index("num_hashes", num_hashes, 1, MOST)
    num_buckets = index("num_buckets", num_buckets, 1, MOST)
    options = {**options, "key_padding_mask": key_padding_mask, "scale": scale}
    if num_buckets == 1:
        return attention(query, key, value, seen, **options)
    bucket_factors(num_buckets)
    if rotations is None:
        shape = (query.shape[1], query.shape[3], num_hashes, num_buckets // 2)
        rotations = draw_rotations(seed, shape, query)
    sides = query, repeat_heads(key, query.shape[1])
    buckets = [lsh_buckets(x, rotations, num_buckets) for x in sides]
    check_rounds(buckets[0], num_hashes)
    groups = [part for x in buckets for part in _groups_of_buckets(x, num_buckets)]
    lists = _shared_keys(query, key, groups, key_padding_mask, is_causal)
    return attention(query, key, value, KeyLists(*lists), **options)


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    *,
    window: int,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Any, ...]:
    """Softmax attention within clusters of queries and keys (Roy et al. 2021, section 4).

    Each cluster takes the `window` queries and, ranked apart, the `window` keys with the largest
    dot product with its centroid once both have norm 1; ties go to the lower index. A query sees a
    key that some cluster took with it, once: a token may be in several clusters or in none. Which
    tokens a cluster takes has no gradient, nor have centroids.

    With `is_causal` a query sees only keys up to its position, but which tokens a cluster takes
    depends on all of them, as in the paper.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        centroids: (heads, clusters, head_dim); norms do not matter.
        window: Queries and keys that a cluster takes, at most; from n_q and n_k on, all.
        is_causal: Let query i see keys up to its position, i + n_k − n_q.
        key_padding_mask: (batch, n_k) bool, True = ignore this key: no cluster takes it.
        query_padding_mask: (batch, n_q) bool, True = no cluster takes this query, whose output is
            0. In self-attention pass the key_padding_mask here, too: otherwise padded queries may
            take the places of others.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: dropout_p, dropout_seed, enable_gqa, return_lse, return_weights and sink of
            `attention`. With return_weights a seed drops other pairs than without.

    Returns:
        As `attention`. A query that is in no cluster gives 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or device does not fit, or window is less than 1.

    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> centroids = torch.randn(4, 5, 32)
    >>> routing_attention(query, key, value, centroids, window=20).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("routing_attention", options)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=options.get("enable_gqa", False))
    visible(is_causal)
    window = index("window", window, 1, MOST)
    _check_centroids(centroids, query)
    _check_routed(options, query)
    if query_padding_mask is not None:
        check_padding(query_padding_mask, query, "query_padding_mask")
    sides = ((query, query_padding_mask), (repeat_heads(key, query.shape[1]), key_padding_mask))
    groups = [nearest_tokens(x, centroids, window, hidden) for x, hidden in sides]
    shared = {"key_padding_mask": key_padding_mask, "scale": scale, **options}
    if options.get("return_weights") or 0 in (*query.shape, *value.shape):
        members = [part for x in groups for part in _one_after_another(x)]
        indices, counts = _shared_keys(query, key, members, key_padding_mask, is_causal)
        if query_padding_mask is not None:
            counts = counts.masked_fill(query_padding_mask[:, None], 0)
        return attention(query, key, value, KeyLists(indices, counts), **shared)
    return attend_in_clusters(
        query,
        key,
        value,
        *groups,
        query_padding_mask=query_padding_mask,
        is_causal=is_causal,
        **shared,
    )


def nearest_tokens(x: Tensor, centroids: Tensor, window: int, hidden: Tensor | None) -> Tensor:
    """The `window` tokens nearest to each centroid: (batch, heads, clusters, window), ascending.

    Hidden tokens come last, so that they are taken only where no others are left.
    """
    if x.shape[2] == 0:
        return x.new_empty((*x.shape[:2], centroids.shape[1], 0), dtype=torch.long)
    with torch.no_grad(), without_autocast(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        units = torch.nn.functional.normalize(without_padding(x.detach(), hidden).to(wide), dim=-1)
        centroids = centroids.detach().to(wide)
        if hidden is not None:
            # A further feature, by which they are below all others.
            least = units.new_full((), -torch.finfo(wide).max / 2)
            last = torch.where(hidden, least, 0)[:, None, :, None].expand(-1, x.shape[1], -1, -1)
            units, centroids = torch.cat([units, last], -1), pad(centroids, (0, 1), value=1.0)
        of_examples = centroids.expand(x.shape[0], -1, -1, -1)
        taken, _ = ops.top_keys(of_examples, units, min(window, x.shape[2]), scale=1.0)
        return taken.long()


def _one_after_another(members: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, clusters, taken = members.shape
    offsets = taken * torch.arange(clusters + 1, device=members.device)
    return members.flatten(2), offsets.expand(batch, heads, -1)


def _groups_of_buckets(buckets: Tensor, num_buckets: int) -> tuple[Tensor, Tensor]:
    """The tokens of each bucket, one after another, and where each begins."""
    rounds, length = buckets.shape[2:]
    starts = num_buckets * torch.arange(rounds, device=buckets.device)
    numbers, order = (buckets + starts[:, None]).flatten(2).sort(dim=-1, stable=True)
    ends = torch.arange(rounds * num_buckets + 1, device=buckets.device)
    offsets = torch.searchsorted(numbers, ends.expand(*numbers.shape[:2], -1).contiguous())
    return order % max(length, 1), offsets


def _shared_keys(
    query: Tensor,
    key: Tensor,
    groups: list[Tensor],
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    return ops.shared_keys(
        *groups,
        query.shape[2],
        key.shape[2],
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
    )


def _check_routed(options: dict[str, Any], query: Tensor) -> None:
    """The options that clusters treat by themselves."""
    for name in ("enable_gqa", "return_lse", "return_weights"):
        check_flag(name, options.get(name, False))
    sink = options.get("sink")
    if sink is None:
        return
    if not isinstance(sink, Tensor) or not sink.is_floating_point():
        got = sink.dtype if isinstance(sink, Tensor) else type(sink).__name__
        raise TypeError(f"sparse_attn: expected sink to be a floating-point Tensor, got {got}")
    if tuple(sink.shape) != (query.shape[1],):
        raise ValueError(
            f"sparse_attn: expected sink of shape {(query.shape[1],)}, got {tuple(sink.shape)}"
        )


def _check_centroids(centroids: object, query: Tensor) -> None:
    if not isinstance(centroids, Tensor) or not centroids.is_floating_point():
        got = centroids.dtype if isinstance(centroids, Tensor) else type(centroids).__name__
        raise TypeError(f"sparse_attn: expected centroids to be a floating Tensor, got {got}")
    heads, size = query.shape[1], query.shape[3]
    if centroids.dim() != 3 or (centroids.shape[0], centroids.shape[2]) != (heads, size):
        raise ValueError(
            f"sparse_attn: expected centroids of shape ({heads}, clusters, {size}), got "
            f"{tuple(centroids.shape)}"
        )
    if centroids.shape[1] == 0:
        raise ValueError("sparse_attn: expected centroids of at least 1 cluster, got 0")
    if centroids.device != query.device:
        raise ValueError(
            f"sparse_attn: expected centroids on device {query.device}, got {centroids.device}"
        )


@torch.library.register_fake("sparse_attn::shared_keys")
def _fake_shared_keys(
    query_members,
    query_offsets,
    key_members,
    key_offsets,
    n_q,
    n_k,
    *,
    key_padding_mask=None,
    is_causal=False,
):
    batch, heads, _ = query_members.shape
    longest = torch.library.get_ctx().new_dynamic_size()
    indices = query_members.new_empty((batch, heads, n_q, longest), dtype=torch.int32)
    return indices, query_members.new_empty((batch, heads, n_q), dtype=torch.int32)
