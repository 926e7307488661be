"""Which pattern to take within a budget."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparse_attn.analysis._blocks import check_share
from sparse_attn.analysis._candidates import Candidates
from sparse_attn.analysis._exact import Exact, make_problem, reference_of, within
from sparse_attn.analysis._progress import shown
from sparse_attn.analysis._samples import Sample, read_samples
from sparse_attn.analysis.report import ApproximationReport, report_on
from sparse_attn.patterns import Causal, Cost, Pattern, PerHead, Window, check_pattern

#: What the whole budget must gain in score over a pattern that costs nothing.
_PRICE = 0.05

#: Characters of a pattern in a table, at most.
_WIDTH = 72


@dataclass(frozen=True)
class Recommendation:
    """One pattern that `recommend_pattern` tried.

    Attributes:
        pattern: The pattern; intersected with `Causal()` if that was asked for.
        report: What it loses, head by head.
        share: Its cost, as a share of that of exact attention.
        score: (mass + 1 − error) / 2 − 0.05 · share / budget, with errors above 1 taken as 1.
    """

    pattern: Pattern
    report: ApproximationReport
    share: float
    score: float

    @property
    def mass(self) -> float:
        """Mean exact weight on the keys that it keeps."""
        return self.report.mass

    @property
    def error(self) -> float:
        """Of the output, relative, in the 2-norm."""
        return self.report.error

    @property
    def cost(self) -> Cost:
        """`pattern.cost`; its overhead is the work beyond the pairs, as a factor."""
        return self.report.cost

    def __str__(self) -> str:
        numbers = f"{self.score:9.4f}{self.mass:9.4f}{self.error:9.4f}{self.share:9.2%}"
        name = textwrap.shorten(self.report.method, _WIDTH, placeholder=" …")
        return f"{numbers}{self.cost.overhead:9.2f}  {name}"


class Recommendations(list):
    """Patterns, the best first: a list of `Recommendation` that prints as a table."""

    def __str__(self) -> str:
        head = "".join(f"{name:>9}" for name in ("score", "mass", "error", "cost", "overhead"))
        return "\n".join([f"{head}  pattern", *map(str, self)])


@torch.no_grad()
def recommend_pattern(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: float,
    candidates: Iterable[Pattern] | None = None,
    *,
    is_causal: bool = False,
    samples: Iterable[object] | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_padding_mask: Tensor | None = None,
    queries: int | Sequence[int] | Tensor | None = None,
) -> Recommendations:
    """The patterns that lose least on these inputs at no more than a share of the dense cost.

    Each candidate is measured as by `approximation_report`. Without candidates, patterns of every
    kind are tried, as large as the budget allows: windows, dilated windows, windows with the first
    keys or those that get most attention, `Radial`, `LocalBlocks`, `BigBird`, `Checkerboard`, if
    causal also `Strided` and `Fixed`, layouts of blocks fitted to these inputs (`fit_pattern`),
    and at last, for each head the best of all these.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim).
        value: (batch, heads, n_k, value_dim).
        budget: Largest cost, in (0, 1], as a share of that of `Full()`, or `Causal()` if causal:
            of FLOPs, which is of allowed pairs. What differs among heads counts with its mean.
        candidates: Patterns to choose from, the default ones if None. Those that cost more than
            the budget are left out.
        is_causal: Whether exact attention is over `Causal()`; candidates are intersected with it.
        samples: What layouts of blocks are fitted to, as for `fit_pattern`, of as many queries and
            keys. If None, these inputs themselves, on which what is fitted to them looks better
            than on others.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        enable_gqa: Let key and value have fewer heads, as in `attention`.
        query_padding_mask: (batch, n_q) bool, True = leave this query out of the figures.
        queries: So many queries, evenly spaced, or those of a list, stand for all: for long inputs.

    Returns:
        `Recommendations`: a list of `Recommendation`, the best score first, ties to the cheaper,
        then to the earlier candidate. The score is (mass + 1 − error) / 2 less up to 0.05 for the
        cost, so that of two patterns that keep the same the cheaper one wins.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit, there is no query or key, or no
            candidate is within the budget.

    >>> query, key, value = (torch.randn(1, 2, 200, 16) for _ in range(3))
    >>> best = recommend_pattern(query, key, value, 0.2, [Window(8), Window(15), Window(99)])
    >>> sorted(result.pattern.left for result in best)
    [8, 15]
    """
    budget = check_share("budget", budget)
    if not isinstance(is_causal, bool):
        raise TypeError(f"sparse_attn: expected is_causal to be True or False, got {is_causal!r}")
    problem = make_problem(
        query,
        key,
        value,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        queries=queries,
    )
    if query.numel() == 0 or key.numel() == 0:
        raise ValueError(
            f"sparse_attn: expected query and key with at least one token, got {problem.sizes}"
        )
    patterns = None if candidates is None else _check_candidates(candidates, is_causal)
    exact = Exact.of(problem, reference_of(is_causal, None))
    most = budget * exact.pairs * (1 + 1e-9)  # a share that was computed may be rounded
    if patterns is None:
        fitted_to = partial(_read, exact, None if samples is None else list(samples), is_causal)
        patterns = list(Candidates(exact, most, fitted_to)) or [Window(0)]
    patterns = _affordable(exact, patterns, most)
    reports = [report_on(exact, pattern) for pattern in shown(patterns, "patterns", "pattern")]
    if candidates is None:
        mixed = _best_per_head(exact, patterns, reports, most)
        patterns, reports = [*patterns, *mixed], [*reports, *mixed.values()]
    rated = [_rate(p, r, budget) for p, r in zip(patterns, reports, strict=True)]
    return Recommendations(sorted(rated, key=lambda r: (-r.score, r.share)))


def _read(exact: Exact, samples: list[object] | None, is_causal: bool) -> Iterable[Sample]:
    """The samples; the problem itself, all its queries, if there are none."""
    if samples is not None:
        return read_samples(samples, is_causal, None, False)
    if exact.problem.rows is not None:
        exact = Exact.of(replace(exact.problem, rows=None), exact.reference)
    return [Sample(exact)]


def _check_candidates(candidates: Iterable[Pattern], is_causal: bool) -> list[Pattern]:
    if isinstance(candidates, (Pattern, str)) or not isinstance(candidates, Iterable):
        raise TypeError(
            "sparse_attn: expected candidates to be a sequence of patterns, got "
            f"{type(candidates).__name__}"
        )
    patterns = list(candidates)
    for pattern in patterns:
        check_pattern(pattern)
    if not patterns:
        raise ValueError("sparse_attn: expected candidates to hold at least one pattern, got none")
    return [within(Causal(), pattern) if is_causal else pattern for pattern in patterns]


def _affordable(exact: Exact, patterns: list[Pattern], most: float) -> list[Pattern]:
    pairs = [exact.problem.pairs(pattern) for pattern in patterns]
    if min(pairs) > most:
        cheapest = patterns[pairs.index(min(pairs))]
        raise ValueError(
            f"sparse_attn: expected candidates within a budget of {most / exact.pairs:.3g} of the "
            f"dense cost, got none; the cheapest, {cheapest}, takes {min(pairs) / exact.pairs:.3g}"
        )
    return [pattern for pattern, n in zip(patterns, pairs, strict=True) if n <= most]


def _quality(mass: float, error: float) -> float:
    return (mass + 1 - min(error, 1.0)) / 2


def _rate(pattern: Pattern, report: ApproximationReport, budget: float) -> Recommendation:
    score = _quality(report.mass, report.error) - _PRICE * report.share / budget
    return Recommendation(pattern, report, report.share, score)


def _best_per_head(
    exact: Exact, patterns: list[Pattern], reports: list[ApproximationReport], most: float
) -> dict[Pattern, ApproximationReport]:
    """For each head the pattern that is best for it; none if one is best for all."""
    heads = range(exact.problem.shape[1])
    best = [
        max(
            range(len(patterns)),
            key=lambda p, head=head: _quality(
                reports[p].mass_per_head[head], reports[p].error_per_head[head]
            ),
        )
        for head in heads
    ]
    if len(set(best)) == 1:
        return {}
    pattern = PerHead([patterns[number] for number in best])
    # Layouts differ among heads in their pairs: a head may take more than the budget.
    if exact.problem.pairs(pattern) > most:
        return {}
    return {pattern: report_on(exact, pattern)}
