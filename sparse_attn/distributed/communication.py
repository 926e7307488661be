"""What context parallelism sends, counted before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_attn.distributed.shards import Needs, Shards, find_needs
from sparse_attn.functional._common import check_dtype, check_flag
from sparse_attn.patterns import Pattern
from sparse_attn.patterns.arguments import index


@dataclass(frozen=True)
class Communication:
    """Bytes that each rank sends and receives in one call (see `Pattern.communication`).

    Attributes:
        sent: For each rank, in the forward pass.
        received: For each rank, in the forward pass.
        sent_backward: For each rank, in the backward pass: the gradients of what was received.
        received_backward: For each rank, in the backward pass.
        keys: Tokens whose keys and values each rank receives.
        queries: Queries of others that each rank computes over its own keys.
        all_keys: Whether some rank needs all keys, which is an all-gather.
        all_gather: What the busiest rank would receive in the forward pass if all ranks gathered
            all keys and values, as torch's context parallelism does; as much again backward.
        ring: What a rank would receive in the forward pass of ring attention, which sends all keys
            and values around; twice as much backward, with their gradients.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    sent_backward: tuple[int, ...]
    received_backward: tuple[int, ...]
    keys: tuple[int, ...]
    queries: tuple[int, ...]
    all_keys: bool
    all_gather: int
    ring: int


@dataclass(frozen=True)
class Rows:
    """Bytes of one token, in all examples and heads."""

    key: int  # and value
    query: int
    result: int  # output and log-sum-exp
    padding: int  # of a key
    mask: int  # of global tokens, which all ranks gather


def communication(
    pattern: Pattern,
    n: int | tuple[int, ...],
    ranks: int | None,
    *,
    batch: int,
    heads: int,
    heads_kv: int | None,
    head_dim: int,
    value_dim: int | None,
    dtype: torch.dtype,
    key_padding_mask: bool,
    global_mask: bool,
) -> Communication:
    """See `Pattern.communication`."""
    check_flag("key_padding_mask", key_padding_mask)
    check_flag("global_mask", global_mask)
    if dtype is None:
        raise TypeError("sparse_attn: expected dtype to be a floating-point dtype, got None")
    check_dtype(dtype)
    lengths = _lengths(n, ranks)
    batch, heads = index("batch", batch, 1), index("heads", heads, 1)
    heads_kv = heads if heads_kv is None else index("heads_kv", heads_kv, 1)
    head_dim = index("head_dim", head_dim, 1)
    if heads % heads_kv:
        raise ValueError(f"sparse_attn: expected heads_kv to divide heads, {heads}, got {heads_kv}")
    if heads % pattern.heads:
        raise ValueError(
            f"sparse_attn: expected heads to be a multiple of the pattern's {pattern.heads}, got "
            f"{heads}"
        )
    value_dim = head_dim if value_dim is None else index("value_dim", value_dim, 0)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    rows = Rows(
        key=batch * heads_kv * (head_dim + value_dim) * dtype.itemsize,
        query=batch * heads * head_dim * dtype.itemsize,
        result=batch * heads * (value_dim * dtype.itemsize + wide),
        padding=batch * key_padding_mask,
        mask=batch * global_mask,
    )
    needs = find_needs(pattern, Shards(lengths, lengths), heads_kv / (2 * heads))
    return _counted(needs, rows)


def _lengths(n: int | tuple[int, ...], ranks: int | None) -> tuple[int, ...]:
    """Those of the shards; a number is split as evenly as can be, the first ones being longer."""
    if isinstance(n, tuple):
        if not n:
            raise ValueError("sparse_attn: expected n to list at least one shard, got none")
        lengths = tuple(index("n", length, 0) for length in n)
        if ranks not in (None, len(lengths)):
            raise ValueError(
                f"sparse_attn: expected ranks to be {len(lengths)}, the number of shards in n, got "
                f"{ranks}"
            )
        return lengths
    n, ranks = index("n", n, 1), index("ranks", ranks, 1)
    return tuple(n // ranks + (rank < n % ranks) for rank in range(ranks))


def _counted(needs: Needs, rows: Rows) -> Communication:
    of_ranks = range(needs.shards.ranks)

    def keys(source: int, to: int) -> int:
        return needs.key_counts[to][source] * rows.key

    def queries(source: int, to: int) -> int:
        return len(needs.queries[source][to]) * rows.query

    def results(source: int, to: int) -> int:
        return len(needs.queries[to][source]) * rows.result

    def forward(source: int, to: int) -> int:
        return keys(source, to) + queries(source, to) + results(source, to)

    def total(amount: Callable[[int, int], int]) -> tuple[int, ...]:
        """For each rank the sum over what it has to do with the others."""
        return tuple(sum(amount(rank, other) for other in of_ranks) for rank in of_ranks)

    def masks(source: int, to: int) -> int:
        gathered = 0 if source == to else max(needs.shards.keys) * rows.mask
        return needs.key_counts[to][source] * rows.padding + gathered

    sent, received = total(forward), total(lambda rank, other: forward(other, rank))
    lengths = needs.shards.keys
    others = sum(lengths) - min(lengths)
    return Communication(
        sent=tuple(map(sum, zip(sent, total(masks), strict=True))),
        received=tuple(
            map(sum, zip(received, total(lambda rank, other: masks(other, rank)), strict=True))
        ),
        # Gradients go the way back; masks have none.
        sent_backward=received,
        received_backward=sent,
        keys=tuple(map(sum, needs.key_counts)),
        queries=total(lambda rank, other: len(needs.queries[other][rank])),
        all_keys=needs.all_keys,
        all_gather=others * rows.key,
        ring=(needs.shards.ranks - 1) * max(lengths) * rows.key,
    )
