"""What a pattern or a method loses against exact attention, on the user's own data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn.analysis._exact import Exact, make_problem, reference_of, within
from sparse_attn.analysis._methods import Method, measure_method
from sparse_attn.patterns import Causal, Cost, Pattern
from sparse_attn.patterns.arguments import index

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 256  # partial sums of a head's figures


@dataclass(frozen=True)
class ApproximationReport:
    """What a method keeps of exact attention (see `approximation_report`).

    Means are over the queries that have a key; of nothing, mass and overlap are 1 and errors 0. A
    method that is not linear in the values has no mass, overlap and share: they are NaN.

    Attributes:
        method: What was measured, in words.
        reference: What it was measured against.
        mass: Mean exact weight on the keys that the method uses, in [0, 1].
        overlap: Mean over queries of Σ_j min(exact, given): 1 less the total variation between
            the two distributions. Equal to mass for patterns.
        error: ‖output − exact‖ / ‖exact‖ over all heads, in the 2-norm.
        largest_error: Largest absolute difference of an element of the output.
        mass_per_head: mass of each head; the next three likewise.
        overlap_per_head: overlap of each head.
        error_per_head: error of each head.
        largest_error_per_head: largest_error of each head.
        share: Pairs that the method uses, as a share of those of the reference.
        cost: `pattern.cost` of a pattern; None for a function.
    """

    method: str
    reference: str
    mass: float
    overlap: float
    error: float
    largest_error: float
    mass_per_head: tuple[float, ...]
    overlap_per_head: tuple[float, ...]
    error_per_head: tuple[float, ...]
    largest_error_per_head: tuple[float, ...]
    share: float
    cost: Cost | None = None

    def __str__(self) -> str:
        columns = (
            ("mass", self.mass_per_head, self.mass),
            ("overlap", self.overlap_per_head, self.overlap),
            ("error", self.error_per_head, self.error),
            ("largest error", self.largest_error_per_head, self.largest_error),
        )
        lines = [f"{self.method} against {self.reference}: {self.share:.2%} of the pairs"]
        lines.append("head  " + "".join(f"{name:>15}" for name, _, _ in columns))
        for head in range(len(self.mass_per_head)):
            numbers = "".join(f"{numbers[head]:15.6g}" for _, numbers, _ in columns)
            lines.append(f"{head:<6}{numbers}")
        lines.append("all   " + "".join(f"{total:15.6g}" for _, _, total in columns))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All figures as a dict that JSON can hold.

        >>> query, key, value = (torch.randn(1, 2, 50, 16) for _ in range(3))
        >>> approximation_report(query, key, value, Window(4)).to_dict()["reference"]
        'Full()'
        """
        return asdict(self)

    def plot(self, ax: Axes | None = None, path: str | Path | None = None) -> Axes:
        """Draw mass, overlap and error of each head with matplotlib.

        Args:
            ax: Axes to draw on; new ones if None.
            path: A picture to write, too.

        Returns:
            The axes.

        >>> query, key, value = (torch.randn(1, 2, 50, 16) for _ in range(3))
        >>> approximation_report(query, key, value, Window(4)).plot().get_xlabel()
        'head'
        """
        from matplotlib import pyplot

        if ax is None:
            _, ax = pyplot.subplots()
        bars = {
            "mass": self.mass_per_head,
            "overlap": self.overlap_per_head,
            "error": self.error_per_head,
        }
        heads = range(len(self.mass_per_head))
        for place, (name, heights) in enumerate(bars.items()):
            left = [head + 0.27 * (place - 1) for head in heads]
            ax.bar(left, heights, 0.25, label=name)
        ax.set(title=f"{self.method}\n{self.share:.1%} of the pairs", xlabel="head")
        ax.set_xticks(list(heads))
        ax.legend()
        if path is not None:
            ax.figure.savefig(path)
        return ax


@torch.no_grad()
def approximation_report(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: Pattern | Method,
    *,
    is_causal: bool | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    reference: Pattern | None = None,
    query_padding_mask: Tensor | None = None,
    queries: int | Sequence[int] | Tensor | None = None,
    block: int | None = None,
    weights: bool = True,
) -> ApproximationReport:
    """What a pattern or a method loses against exact attention, on these inputs.

    With exact weights p = softmax(scale · query · keyᵀ) over the reference's keys, the mass that a
    query keeps is Σ_j p_j over the keys that the method uses. For a pattern it is
    exp(log-sum-exp over the pattern − log-sum-exp over the reference): two fused passes, in memory
    linear in the length. For a function, its weights are what it makes of the columns of a unit
    matrix in place of value, some at a time, as attention is linear in the values: memory grows
    with n_q · block. That is checked; a function that draws at random, drops out or looks at the
    values raises.

    Half types are widened to float32, but for the calls of a function.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads, n_k, head_dim). With n_q ≠ n_k the ends are aligned.
        value: (batch, heads, n_k, value_dim).
        method: A `Pattern`, or a function of query, key and value that returns the output:
            `functools.partial(functional.topk_attention, k=32)`. A function is called with these
            tensors alone: bind everything else to it. What a partial binds of is_causal,
            key_padding_mask and scale holds for exact attention too if it is not given here.
        is_causal: Whether exact attention is over `Causal()` (a pattern that is not causal is then
            intersected with it) or `Full()`; if None, as the pattern is, `Full()` for a function.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        scale: Factor of the products; 1 / √head_dim if None.
        enable_gqa: Let key and value have fewer heads, as in `attention`.
        reference: The pattern that counts as exact instead, such as the wider window that a
            model was trained with.
        query_padding_mask: (batch, n_q) bool, True = leave this query out of the figures; its
            contents do not matter. In self-attention, the key_padding_mask.
        queries: So many queries, evenly spaced, or those of a list or tensor, stand for all: for
            long inputs. A function computes all of them in any case.
        block: Columns of the unit matrix at a time; as many as value has if None, which any
            function should take. More are faster.
        weights: False compares only the outputs of a function, and takes functions that are not
            linear in the values.

    Returns:
        An `ApproximationReport`; `print` shows a table with a row for each head.

    Raises:
        TypeError: An argument has the wrong type or dtype, or method is no pattern or function, or
            does not return a tensor.
        ValueError: A shape, device or value does not fit, or method returns another shape, or its
            outputs are not linear in the values.

    >>> query, key, value = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> report = approximation_report(query, key, value, Window(16) | Global([0]))
    >>> len(report.mass_per_head), 0 < report.mass < 1, report.share
    (2, True, 0.3194)
    >>> keys = functools.partial(functional.index_attention, indices=(query @ key.mT).topk(8)[1])
    >>> approximation_report(query, key, value, keys).share
    0.08
    """
    pattern = method if isinstance(method, Pattern) else None
    if pattern is None and not callable(method):
        raise TypeError(
            "sparse_attn: expected method to be a Pattern or a function of query, key and value, "
            f"got {type(method).__name__}"
        )
    bound = method.keywords if isinstance(method, functools.partial) else {}
    if is_causal is None and reference is None:
        is_causal = bound.get("is_causal")
    over = bound.get("pattern", pattern)
    exact_pattern = reference_of(is_causal, reference, over if isinstance(over, Pattern) else None)
    problem = make_problem(
        query,
        key,
        value,
        key_padding_mask=bound.get("key_padding_mask")
        if key_padding_mask is None
        else key_padding_mask,
        query_padding_mask=query_padding_mask,
        scale=bound.get("scale") if scale is None else scale,
        enable_gqa=enable_gqa,
        queries=queries,
    )
    exact = Exact.of(problem, exact_pattern)
    if pattern is not None:
        return report_on(exact, within(Causal(), pattern) if is_causal else pattern)
    block = max(1, value.shape[3]) if block is None else index("block", block, 1)
    figures = measure_method(exact, (query, key, value), method, block, weights)
    return _report(exact, _name(method), *figures)


def report_on(exact: Exact, pattern: Pattern) -> ApproximationReport:
    """The report on a pattern, in one pass over it (two if it leaves the reference)."""
    problem = exact.problem
    output, lse = problem.attend(pattern)
    shared = within(exact.reference, pattern)
    both = lse if shared is pattern else problem.attend(shared, problem.value[..., :0])[1]
    kept = exact.share_of(both)
    # Weights over more keys than the reference's are smaller than the exact ones.
    overlap = kept * torch.where(exact.counted, exact.lse - lse, 0).clamp(max=0).exp()
    share = problem.pairs(pattern) / exact.pairs if exact.pairs else 1.0
    n_q, n_k = problem.sizes
    size = problem.query.shape[3]
    cost = pattern.cost(n_q, n_k, head_dim=size, dtype=problem.query.dtype)
    return _report(exact, repr(pattern), output, kept, overlap, share, cost)


def _report(
    exact: Exact,
    name: str,
    output: Tensor,
    kept: Tensor,
    overlap: Tensor,
    share: float,
    cost: Cost | None = None,
) -> ApproximationReport:
    counted = exact.counted
    numbers = counted.sum((0, 2))
    difference = (output.to(exact.output) - exact.output).masked_fill(~counted[..., None], 0)
    exact_output = exact.output.masked_fill(~counted[..., None], 0)
    lost, whole = (_total(x.double().square()) for x in (difference, exact_output))
    largest = difference.abs().amax((0, 2, 3)) if difference.numel() else lost.new_zeros(lost.shape)
    kept, overlap = (_total(x.double()) for x in (kept, overlap))
    return ApproximationReport(
        method=name,
        reference=repr(exact.reference),
        mass=_mean(kept.sum(), numbers.sum()).item(),
        overlap=_mean(overlap.sum(), numbers.sum()).item(),
        error=_relative(lost.sum(), whole.sum()).item(),
        largest_error=max(largest.tolist(), default=0.0),
        mass_per_head=tuple(_mean(kept, numbers).tolist()),
        overlap_per_head=tuple(_mean(overlap, numbers).tolist()),
        error_per_head=tuple(_relative(lost, whole).tolist()),
        largest_error_per_head=tuple(largest.tolist()),
        share=share,
        cost=cost,
    )


def _total(x: Tensor) -> Tensor:
    """The sum of each head, in an order that does not follow the threads: torch splits only sums
    to a single number among them."""
    of_heads = x.transpose(0, 1).flatten(1)
    columns = torch.nn.functional.pad(of_heads, (0, -of_heads.shape[1] % _COLUMNS))
    return columns.unflatten(1, (-1, _COLUMNS)).sum(1).sum(1)


def _mean(total: Tensor, number: Tensor) -> Tensor:
    return torch.where(number == 0, 1.0, total / number)


def _relative(lost: Tensor, whole: Tensor) -> Tensor:
    return torch.where(lost == 0, 0.0, (lost / whole).sqrt())


def _name(method: Callable) -> str:
    """A function's name, with the arguments that a partial binds."""
    if not isinstance(method, functools.partial):
        return getattr(method, "__name__", None) or type(method).__name__
    bound = [_word(x) for x in method.args]
    bound += [f"{name}={_word(x)}" for name, x in method.keywords.items()]
    return f"{_name(method.func)}({', '.join(bound)})"


def _word(x: object) -> str:
    return f"<{list(x.shape)}>" if isinstance(x, Tensor) else repr(x)
