"""Which rows each rank sends to which, and where those that it receives are put."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.distributed.shards import Needs, Run, runs_of


@dataclass(frozen=True)
class Route:
    """The rows of one exchange, as one rank sees it.

    Attributes:
        what: What is exchanged, for messages.
        sent: For each rank the rows of our tensors that it gets, ascending.
        received: For each rank the rows of the result that it fills, ascending.
        length: Rows of the result; those that nobody fills are 0.
        tokens: For each rank the tokens that come from it, for messages.
        sent_tokens: For each rank those that go to it.
    """

    what: str
    sent: tuple[Tensor, ...]
    received: tuple[Tensor, ...]
    length: int
    tokens: tuple[Tensor, ...]
    sent_tokens: tuple[Tensor, ...]

    def on(self, device: torch.device) -> Route:
        """The same with its rows on a device."""
        sent, received = (
            tuple(rows.to(device) for rows in lists) for lists in (self.sent, self.received)
        )
        return dataclasses.replace(self, sent=sent, received=received)

    def named(self, rank: int, *, goes_out: bool) -> str:
        """What comes from a rank, or goes to it."""
        tokens = (self.sent_tokens if goes_out else self.tokens)[rank]
        runs = [f"{a}..{b - 1}" for a, b in runs_of(tokens)]
        more = f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
        way = "for" if goes_out else "from"
        return f"{self.what} of tokens {', '.join(runs[:3])}{more} {way} rank {rank}"


@dataclass(frozen=True)
class KeyBuffer:
    """Where received keys stand: runs (place, start, stop), in `length` places."""

    runs: tuple[tuple[int, int, int], ...]
    length: int


def lay_keys(
    tokens: Tensor, queries: Sequence[Run], sizes: tuple[int, int], step: int
) -> KeyBuffer:
    """One key after the other, with gaps that keep residue classes modulo `step` together: there a
    dilated window costs what the undilated one does.
    """
    runs = runs_of(tokens)
    n_q, n_k = sizes
    rows = sum(stop - start for start, stop in queries)
    place, laid = 0, []
    for begin, end in runs:
        place += (begin - place - runs[0][0]) % step
        laid.append((place, begin, end))
        place += end - begin
    if runs:
        place += (queries[0][0] + n_k - n_q + rows - runs[0][0] - place) % step
    if place > 2 * len(tokens) + 64:
        return lay_keys(tokens, queries, sizes, 1)
    return KeyBuffer(tuple(laid), place)


def places_of(buffer: KeyBuffer, tokens: Tensor) -> Tensor:
    """The places of tokens that are in the buffer."""
    if not buffer.runs:
        return tokens[:0]
    place, begin, _ = torch.tensor(buffer.runs).T.contiguous()
    run = torch.searchsorted(begin, tokens, right=True) - 1
    return tokens - begin[run] + place[run]


def key_route(needs: Needs, rank: int, queries: Sequence[Run]) -> tuple[Route, KeyBuffer]:
    """Keys and values that a rank sends, and that it receives for some queries."""
    shards, mine = needs.shards, needs.keys[rank]
    start, _ = shards.key_run(rank)
    buffer = lay_keys(torch.cat(mine), queries, shards.sizes, needs.step)
    sent = tuple(needs.keys[other][rank] - start for other in range(shards.ranks))
    received = tuple(places_of(buffer, tokens) for tokens in mine)
    route = Route(
        "keys and values",
        sent,
        received,
        buffer.length,
        mine,
        tuple(of_rank[rank] for of_rank in needs.keys),
    )
    return route, buffer


def query_route(needs: Needs, rank: int) -> Route:
    """Global queries that a rank sends to the keys, and those that come to its own."""
    others = range(needs.shards.ranks)
    start, _ = needs.shards.query_run(rank)
    sent = tuple(needs.queries[rank][other] - start for other in others)
    coming = tuple(needs.queries[other][rank] for other in others)
    received = _one_after_the_other(coming)
    going = needs.queries[rank]
    return Route("global queries", sent, received, _total(coming), coming, going)


def result_route(needs: Needs, rank: int) -> Route:
    """What a rank found for the queries of others, and what others found for its own."""
    others = range(needs.shards.ranks)
    computed = tuple(needs.queries[other][rank] for other in others)
    coming = tuple(needs.queries[rank][other] for other in others)
    return Route(
        "results of global queries",
        _one_after_the_other(computed),
        _one_after_the_other(coming),
        _total(coming),
        coming,
        computed,
    )


def _total(lists: tuple[Tensor, ...]) -> int:
    return sum(len(one) for one in lists)


def _one_after_the_other(lists: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.arange(_total(lists)).split([len(one) for one in lists])
