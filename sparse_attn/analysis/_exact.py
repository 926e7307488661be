"""Exact attention of one call, as what patterns and methods are measured against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.analysis._progress import shown
from sparse_attn.functional._common import check_inputs, scale_of
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import (
    BlockLayout,
    Causal,
    Full,
    GlobalKeys,
    GlobalQueries,
    Pattern,
    check_pattern,
)
from sparse_attn.patterns.arguments import index

#: Keys of one pass over groups of keys, at least: fewer leave tiles half empty.
_KEYS = 64

#: Numbers that such a pass may give, at most, if it has more than one group.
_NUMBERS = 2**25


@dataclass(frozen=True)
class Problem:
    """The tensors of one call of attention, half types widened, and which rows are looked at.

    Attributes:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads_kv, n_k, head_dim).
        value: (batch, heads_kv, n_k, value_dim).
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        query_padding_mask: (batch, n_q) bool, True = leave this query out of all figures.
        scale: Factor of the products.
        rows: The queries that are computed, ascending; all if None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    scale: float
    rows: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(n_q, n_k)."""
        return self.query.shape[2], self.key.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, heads, n_q)."""
        return tuple(self.query.shape[:3])

    def attend(self, pattern: Pattern, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over a pattern; what no row of `rows` has is 0 and −inf."""
        with torch.autocast(self.query.device.type, enabled=False):
            return attention(
                self.query,
                self.key,
                self.value if value is None else value,
                self.restricted(pattern),
                key_padding_mask=self.key_padding_mask,
                scale=self.scale,
                enable_gqa=self.query.shape[1] != self.key.shape[1],
                return_lse=True,
            )

    def restricted(self, pattern: Pattern) -> Pattern:
        """The pattern on `rows`."""
        if self.rows is None:
            return pattern
        n_q, n_k = self.sizes
        return pattern & GlobalQueries([row + n_k - n_q for row in self.rows])

    def pairs(self, pattern: Pattern) -> float:
        """Pairs of a head and example, on the average of those that the pattern tells apart."""
        total, *_, copies = ops._pattern_cost(
            pattern.encode(), pattern.tensors(*self.sizes), *self.sizes
        )
        return total / copies


@dataclass(frozen=True)
class Exact:
    """What attention over the reference gives for a problem.

    Attributes:
        problem: The inputs.
        reference: The pattern that counts as exact.
        output: (batch, heads, n_q, value_dim).
        lse: (batch, heads, n_q), −inf where the reference has no key.
        counted: (batch, heads, n_q) bool: the queries that have keys and count.
        pairs: Of the reference, for a head and example, `rows` or not.
    """

    problem: Problem
    reference: Pattern
    output: Tensor
    lse: Tensor
    counted: Tensor
    pairs: float = field(compare=False)

    @classmethod
    def of(cls, problem: Problem, reference: Pattern) -> Exact:
        """One fused pass over the reference."""
        output, lse = problem.attend(reference)
        counted = lse != -math.inf
        if problem.query_padding_mask is not None:
            counted = counted & ~problem.query_padding_mask[:, None]
        return cls(problem, reference, output, lse, counted, problem.pairs(reference))

    def share_of(self, lse: Tensor) -> Tensor:
        """exp(lse − log-sum-exp of the reference): the exact weight on a set of keys, 0 where the
        query does not count."""
        gap = torch.where(self.counted, lse - self.lse, -math.inf)
        return gap.clamp(max=0).exp()  # what is over 0 is rounding

    def weighted(self, first: int, stop: int, value: Tensor) -> Tensor:
        """The sum of the values of the keys in [first, stop) by their exact weights; 0 where the
        query does not count."""
        n_q, n_k = self.problem.sizes
        # All pairs, but as data: such plans are not kept, and hundreds would crowd out all others.
        everything = torch.ones(1, 1, dtype=torch.bool, device=value.device)
        unkept = BlockLayout(everything, max(n_q, n_k, 1))
        part = self.reference & GlobalKeys(range(first, stop)) & unkept
        output, lse = self.problem.attend(part, value)
        return output.mul_(self.share_of(lse)[..., None])

    def key_groups(self, size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The exact weights, summed over groups of `size` neighboring keys, some groups at a time.

        Yields:
            (groups,) the first key of each, and (batch, heads, n_q, groups): at most 64 groups at a
            time. All together takes about as long as one pass of attention.
        """
        batch, heads_kv, n_k, _ = self.problem.key.shape
        groups = max(1, min(_KEYS // size, _NUMBERS // max(1, self.lse.numel())))
        steps = range(0, n_k, groups * size)
        for first in shown(steps, what, "block"):
            stop = min(n_k, first + groups * size)
            member = self.problem.key.new_zeros(n_k, -(-(stop - first) // size))
            keys = torch.arange(first, stop, device=member.device)
            member[keys, (keys - first) // size] = 1
            value = member.expand(batch, heads_kv, *member.shape)
            yield keys[::size], self.weighted(first, stop, value)

    def received(self) -> Tensor:
        """What each key gets from all queries, heads and examples, (n_k,)."""
        received = self.problem.key.new_empty(self.problem.sizes[1])
        for keys, weights in self.key_groups(1, "keys"):
            received[keys] = weights.sum((0, 1, 2))  # a list of small ones would split the heap
        return received


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    queries: int | Sequence[int] | Tensor | None = None,
) -> Problem:
    """Check the inputs and widen half types; no gradient reaches what is computed from them."""
    check_inputs(query, key, value, key_padding_mask, enable_gqa=enable_gqa)
    if query_padding_mask is not None:
        _check_query_padding(query_padding_mask, query)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = (x.detach().to(wide) for x in (query, key, value))
    if query_padding_mask is not None:  # it may hold anything
        query = query.masked_fill(query_padding_mask[:, None, :, None], 0)
    factor = scale_of(scale, query.shape[3])
    problem = Problem(query, key, value, key_padding_mask, query_padding_mask, factor)
    return problem if queries is None else replace(problem, rows=_rows(queries, *problem.sizes))


def _check_query_padding(mask: object, query: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"sparse_attn: expected query_padding_mask to be a bool Tensor, got {what}")
    if mask.shape != (query.shape[0], query.shape[2]) or mask.device != query.device:
        expected = (query.shape[0], query.shape[2])
        raise ValueError(
            f"sparse_attn: expected query_padding_mask of shape {expected} on {query.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )


def _rows(queries: int | Sequence[int] | Tensor, n_q: int, n_k: int) -> tuple[int, ...]:
    """The rows that `queries` names: so many evenly spaced ones, or those of a list."""
    first = max(0, n_q - n_k)  # rows before it stand at no position
    if isinstance(queries, Tensor):
        queries = queries.tolist()
    if not isinstance(queries, Sequence) or isinstance(queries, str):
        count = min(index("queries", queries, 1), n_q - first)
        step = (n_q - first) / max(count, 1)
        return tuple(first + int((k + 0.5) * step) for k in range(count))
    rows = sorted({index("queries", row, -n_q, n_q - 1) % n_q for row in queries})
    if not rows or rows[0] < first:
        raise ValueError(
            f"sparse_attn: expected queries to name rows of [{first}, {n_q}), got {queries}"
        )
    return tuple(rows)


def reference_of(
    is_causal: bool | None, reference: Pattern | None, pattern: Pattern | None = None
) -> Pattern:
    """What counts as exact: `reference`, else `Causal()` or `Full()`, by `is_causal`, else by
    whether the pattern is causal."""
    if is_causal is not None and not isinstance(is_causal, bool):
        raise TypeError(
            f"sparse_attn: expected is_causal to be True, False or None, got {is_causal!r}"
        )
    if reference is not None:
        check_pattern(reference)
        if is_causal is not None and is_causal != reference.causal:
            raise ValueError(
                f"sparse_attn: expected reference to be causal as is_causal={is_causal} says, got "
                f"{reference}"
            )
        return reference
    if is_causal is None:
        is_causal = pattern is not None and pattern.causal
    return Causal() if is_causal else Full()


def within(reference: Pattern, pattern: Pattern) -> Pattern:
    """The pairs of both, without a join where the reference takes none away."""
    if isinstance(reference, Full) or (isinstance(reference, Causal) and pattern.causal):
        return pattern
    return pattern & reference
