"""The weights that a function gives, column by column."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_attn.analysis._exact import Exact
from sparse_attn.analysis._progress import shown
from sparse_attn.functional._common import repeat_heads, without_padding

Method = Callable[[Tensor, Tensor, Tensor], Tensor]

# How far the outputs may be from weights times values, relative to them: rounding alone.
_HALF_TOLERANCE, _TOLERANCE = 0.05, 1e-3


def measure_method(
    exact: Exact,
    inputs: tuple[Tensor, Tensor, Tensor],
    method: Method,
    block: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Output, kept mass and overlap of each query, and the share of pairs with a weight."""
    query, key, value = inputs
    given = _call(method, query, key, value)
    output = given.to(exact.output.dtype)
    if not weights:
        unknown = torch.full_like(exact.lse, math.nan)
        return output, unknown, unknown, math.nan
    kept, overlap, used, rebuilt = _sum_columns(exact, inputs, method, block)
    _check_linear(exact, given.dtype, output, rebuilt)
    problem = exact.problem
    batch, heads, _ = problem.shape
    whole = batch * heads * problem.pairs(problem.restricted(exact.reference))
    return output, kept, overlap, used / whole if whole else 1.0


def _sum_columns(
    exact: Exact, inputs: tuple[Tensor, Tensor, Tensor], method: Method, block: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Kept mass and overlap of each query, pairs with a weight, and weights times values."""
    query, key, value = inputs
    problem, counted = exact.problem, exact.counted[..., None]
    known = without_padding(problem.value, problem.key_padding_mask)
    known = repeat_heads(known, query.shape[1])
    kept, overlap = torch.zeros_like(exact.lse), torch.zeros_like(exact.lse)
    used = torch.zeros((), dtype=torch.int64, device=query.device)
    rebuilt = torch.zeros_like(exact.output)
    n_k = key.shape[2]
    for first in shown(range(0, n_k, block), "weights", "block"):
        stop = min(n_k, first + block)
        unit = value.new_zeros(*value.shape[:3], block)  # as wide at the end: methods may mind
        unit[:, :, first:stop].diagonal(0, -2, -1).fill_(1)
        given = _call(method, query, key, unit).to(exact.output.dtype)
        columns = exact.weighted(first, stop, unit.to(exact.output.dtype))[..., : stop - first]
        given = given[..., : stop - first].masked_fill(~counted, 0)
        kept += columns.masked_fill(given == 0, 0).sum(-1)
        overlap += torch.minimum(columns, given).sum(-1)
        used += (given != 0).sum()
        with torch.autocast(query.device.type, enabled=False):
            rebuilt += given @ known[:, :, first:stop]
    # What is over 1 is rounding.
    return kept.clamp(max=1), overlap.clamp(max=1), int(used), rebuilt


def _check_linear(exact: Exact, dtype: torch.dtype, output: Tensor, rebuilt: Tensor) -> None:
    """Raise ValueError if the outputs are not the weights times the values."""
    difference, size = (
        x.masked_fill(~exact.counted[..., None], 0).norm().item()
        for x in (output - rebuilt, output)
    )
    tolerance = _HALF_TOLERANCE if dtype.itemsize < 4 else _TOLERANCE
    if difference > tolerance * size:
        raise ValueError(
            "sparse_attn: expected method to give outputs that are linear in the values, so that "
            "its weights can be found, got outputs that differ from weights times values by "
            f"{difference / size:.2g} of their norm; random numbers, dropout and functions of the "
            "values do that: fix or remove them, or pass weights=False"
        )


def _call(method: Method, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output = method(query, key, value)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"sparse_attn: expected method to return a Tensor, got {type(output).__name__}"
        )
    expected = (*query.shape[:3], value.shape[3])
    if tuple(output.shape) != expected:
        raise ValueError(
            f"sparse_attn: expected method to return a Tensor of shape {expected}, got "
            f"{tuple(output.shape)}"
        )
    return output.detach()
