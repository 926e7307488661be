"""Who needs what from whom, when a sequence is sharded: found from the pattern and the lengths of
the shards alone, so that every rank knows what every other one asks for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.patterns import Causal, Global, Pattern, PerHead, words

#: Consecutive tokens: from start up to stop.
Run = tuple[int, int]


@dataclass(frozen=True)
class Shards:
    """How queries and keys are spread over the ranks: those of rank r follow those of r − 1."""

    queries: tuple[int, ...]  # lengths
    keys: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.queries)

    @property
    def sizes(self) -> tuple[int, int]:
        """n_q and n_k of the whole."""
        return sum(self.queries), sum(self.keys)

    def query_run(self, rank: int) -> Run:
        start = sum(self.queries[:rank])
        return start, start + self.queries[rank]

    def key_run(self, rank: int) -> Run:
        start = sum(self.keys[:rank])
        return start, start + self.keys[rank]


@dataclass(frozen=True)
class Needs:
    """What crosses between the ranks in one call.

    Attributes:
        shards: The lengths.
        keys: keys[r][s] are the tokens of rank s whose keys rank r needs, ascending, where one of
            them is the rank that asks; there may be as many as tokens times ranks.
        key_counts: How many they are, for all pairs of ranks.
        queries: queries[r][s] are the queries of rank r that rank s computes over its own keys,
            because they see (nearly) all of them.
        blind: Those queries of each rank, which no keys are sent for.
        step: What all dilations of the pattern divide.
        far: The queries of the rank that asks that see keys of others. Gaps are multiples of the
            step, which keeps residue classes together.
    """

    shards: Shards
    keys: tuple[tuple[Tensor, ...], ...]
    key_counts: tuple[tuple[int, ...], ...]
    queries: tuple[tuple[Tensor, ...], ...]
    blind: tuple[Tensor, ...]
    step: int
    far: tuple[Run, ...]

    @property
    def all_keys(self) -> bool:
        """Whether some rank needs every key of the others: an all-gather."""
        _, n_k = self.shards.sizes
        received = map(sum, self.key_counts)
        others = (n_k - own for own in self.shards.keys)
        return any(got == rest > 0 for got, rest in zip(received, others, strict=True))


def runs_of(tokens: Tensor) -> list[Run]:
    """Ascending tokens as runs.

    >>> runs_of(torch.tensor([0, 1, 2, 7, 9, 10]))
    [(0, 3), (7, 8), (9, 11)]
    """
    if len(tokens) == 0:
        return []
    breaks = (tokens.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(tokens)]
    return [(int(tokens[a]), int(tokens[b - 1]) + 1) for a, b in itertools.pairwise(edges)]


def part_words(
    pattern: Pattern,
    sizes: tuple[int, int],
    queries: Sequence[Run],
    keys: Sequence[tuple[int, int, int]],
    blind: Sequence[Run] = (),
) -> tuple[int, ...]:
    """The pattern as some queries and keys see it: csrc/patterns/part.h. Runs of keys begin with
    the place of their first one.
    """
    lists = (n for part in (queries, keys, blind) for n in (len(part), *itertools.chain(*part)))
    return (words.PART, *sizes, *lists, *pattern.encode())


def with_global_tokens(pattern: Pattern, tokens: Sequence[int]) -> Pattern:
    """What `global_mask` makes of a pattern, for tokens that are global in any example."""
    if not tokens:
        return pattern
    if isinstance(pattern, PerHead):
        return PerHead([with_global_tokens(one, tokens) for one in pattern.patterns])
    both = pattern | Global(list(tokens))
    return both & Causal() if pattern.causal else both


def find_needs(
    pattern: Pattern, shards: Shards, routed_share: float, rank: int | None = None
) -> Needs:
    """What the ranks need of each other.

    Args:
        pattern: With global tokens, if the call has any.
        shards: The lengths.
        routed_share: Global queries go to the keys, instead of the keys to them, if they are at
            most so many for each key.
        rank: Who asks; None wants the counts alone.
    """
    find = _find_needs if pattern.tensors(*shards.sizes) else _cached_needs
    return find(pattern, shards, routed_share, rank)


def _find_needs(pattern: Pattern, shards: Shards, routed_share: float, rank: int | None) -> Needs:
    n_q, n_k = shards.sizes
    call = (pattern.encode(), pattern.tensors(n_q, n_k), n_q, n_k)
    routed = ops._pattern_global_queries(*call)
    if len(routed) > routed_share * n_k:
        routed = routed[:0]
    blind = tuple(_within(routed, shards.query_run(r)) for r in range(shards.ranks))
    of_ranks = range(shards.ranks)
    step = ops._pattern_step(*call)
    keys, counts = [], []
    for r in of_ranks:
        tokens = _keys_for(pattern, shards, r, blind[r])
        counts.append(tuple(map(len, tokens)))
        keys.append(tuple(t if rank in (r, s) else t[:0].clone() for s, t in enumerate(tokens)))
    return Needs(
        shards=shards,
        keys=tuple(keys),
        key_counts=tuple(counts),
        queries=tuple(
            tuple(_queries_for(pattern, shards, blind[r], r, s) for s in of_ranks) for r in of_ranks
        ),
        blind=blind,
        step=step,
        far=() if rank is None else _far_queries(pattern, shards, rank, blind[rank], keys, step),
    )


_cached_needs = functools.lru_cache(maxsize=256)(_find_needs)


def _within(tokens: Tensor, run: Run) -> Tensor:
    return tokens[(tokens >= run[0]) & (tokens < run[1])]


def _seen(pattern: Pattern, shards: Shards, words_of_part: tuple[int, ...], n_q: int, n_k: int):
    return ops._pattern_seen(words_of_part, pattern.tensors(*shards.sizes), n_q, n_k)


def _keys_for(pattern: Pattern, shards: Shards, rank: int, blind: Tensor) -> tuple[Tensor, ...]:
    """Of each rank the tokens that the queries of `rank` see; none of its own."""
    _, n_k = shards.sizes
    start, stop = shards.query_run(rank)
    seen = torch.zeros(n_k, dtype=torch.bool)
    if stop > start and n_k > 0:
        part = part_words(pattern, shards.sizes, [(start, stop)], [(0, 0, n_k)], runs_of(blind))
        _, seen = _seen(pattern, shards, part, stop - start, n_k)
    tokens = []
    for other in range(shards.ranks):
        begin, end = shards.key_run(other)
        here = seen[begin:end].nonzero().flatten() + begin
        tokens.append(here[:0] if other == rank else here)
    return tuple(tokens)


def _far_queries(pattern, shards: Shards, rank: int, blind: Tensor, keys, step: int):
    """See `Needs.far`; all queries of the rank if most of them do."""
    start, stop = shards.query_run(rank)
    tokens = torch.cat(keys[rank])
    if len(tokens) == 0:
        return ()
    placed, place = [], 0
    for begin, end in runs_of(tokens):
        placed.append((place, begin, end))
        place += end - begin
    part = part_words(pattern, shards.sizes, [(start, stop)], placed, runs_of(blind))
    seen, _ = _seen(pattern, shards, part, stop - start, len(tokens))
    runs: list[Run] = []
    for begin, end in runs_of(seen.nonzero().flatten() + start):
        gap = (begin - runs[-1][1]) // step * step if runs else -1
        if gap == 0:
            runs[-1] = (runs[-1][0], end)
            continue
        if gap > 0:
            runs[-1] = (runs[-1][0], begin - gap)
        runs.append((begin, end))
    chosen = sum(end - begin for begin, end in runs)
    return tuple(runs) if 2 * chosen < stop - start else ((start, stop),)


def _queries_for(
    pattern: Pattern, shards: Shards, queries: Tensor, owner: int, rank: int
) -> Tensor:
    """Of some queries of `owner` those that see a key of `rank`."""
    begin, end = shards.key_run(rank)
    if owner == rank or begin == end or len(queries) == 0:
        return queries[:0]
    part = part_words(pattern, shards.sizes, runs_of(queries), [(0, begin, end)])
    seen, _ = _seen(pattern, shards, part, len(queries), end - begin)
    return queries[seen]
