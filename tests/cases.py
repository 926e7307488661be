"""Every pattern, shape and dtype by name, for the tests and the benchmarks.

To add a pattern: one line in PATTERNS (in DENSE too if its pairs grow with the square of the
length), and its definition in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import reference
import torch
from torch import Tensor

import sparse_attn

# Expressions, so that the library and the reference each read them with their own names.
# They hold for every length >= 1 and for 4 heads.
PATTERNS = {
    "window": "Window(16)",
    "window_self": "Window(0)",
    "window_asymmetric": "Window(20, 3)",
    "window_causal": "Window(24, 0)",
    "window_future": "Window(0, 9)",
    "window_infinite_left": "Window(math.inf, 0)",
    "window_infinite_right": "Window(3, math.inf)",
    "dilated_2": "Window(6, dilation=2)",
    "dilated_5": "Window(4, 9, dilation=5)",
    "dilated_causal": "Window(5, 0, dilation=7)",
    "dilated_infinite": "Window(math.inf, 0, dilation=3)",
    "global": "Global([0, -1])",
    "global_keys": "GlobalKeys([0, -1])",
    "global_queries": "GlobalQueries([0, -1])",
    "full": "Full()",
    "causal": "Causal()",
    "window_global": "Window(16) | Global([0, -1])",
    "dilated_global": "Window(5, dilation=3) | Global([0])",
    "causal_global": "(Window(16, 0) | Global([0])) & Causal()",
    "causal_dilated_global": "(Window(8, 0, dilation=4) | Global([0])) & Causal()",
    "two_dilations": "Window(8) | Window(8, dilation=4)",
    "overlapping": "Window(12) | Window(3, 30) | GlobalKeys([0]) | Global([0, -1])",
    "intersection": "Window(40) & Window(20, 5, dilation=2)",
    "empty_rows": "GlobalKeys([0]) & Window(5)",
    "nested": "(Window(4) | Global([0])) & (Causal() | GlobalKeys([-1]))",
    "per_head": "PerHead([Window(8), Window(4, dilation=2), Window(3, 0) | Global([0]), Causal()])",
    "per_head_groups": "PerHead([Window(8), Window(8, dilation=4)])",
    "per_head_sparse": "PerHead([Window(8) | Global([0]), Window(9, 0, dilation=3)])",
}

# Quadratic by definition: an infinite side or all pairs.
DENSE = {
    "window_infinite_left",
    "window_infinite_right",
    "dilated_infinite",
    "full",
    "causal",
    "per_head",
}


class Shape(NamedTuple):
    """Sizes of one call; `value_dim` None means `head_dim`, `n_k` None means `n_q`."""

    n_q: int = 131
    n_k: int | None = None
    head_dim: int = 64
    value_dim: int | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int | None = None


SHAPES = {
    "base": Shape(),
    "tiles": Shape(n_q=128),
    "prime": Shape(n_q=257),
    "short": Shape(n_q=5),
    "one": Shape(n_q=1),
    "more_keys": Shape(n_q=70, n_k=131),
    "more_queries": Shape(n_q=131, n_k=70),
    "decode": Shape(n_q=1, n_k=131),
    "narrow_value": Shape(value_dim=40),
    "wide_value": Shape(head_dim=32, value_dim=96),
    "gqa": Shape(kv_heads=2),
    "mqa": Shape(kv_heads=1),
}

HEAD_DIMS = (1, 7, 32, 40, 64, 80, 96, 128, 200, 256, 300)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


NAMESPACE = {"math": math, "inf": math.inf, **vars(sparse_attn)}


def library(expression: str) -> sparse_attn.Pattern:
    """The pattern that an expression means to the library."""
    return eval(expression, NAMESPACE)


def definition(expression: str) -> reference.Rule | reference.HeadRules:
    """The same expression, read by the reference."""
    return eval(expression, {**vars(reference)})


def pattern(name: str) -> sparse_attn.Pattern:
    """The library's pattern of a named case."""
    return library(PATTERNS[name])


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Query, key and value of a shape, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    n_k = shape.n_q if shape.n_k is None else shape.n_k
    kv_heads = shape.kv_heads or shape.heads
    value_dim = shape.head_dim if shape.value_dim is None else shape.value_dim
    sizes = (
        (shape.batch, shape.heads, shape.n_q, shape.head_dim),
        (shape.batch, kv_heads, n_k, shape.head_dim),
        (shape.batch, kv_heads, n_k, value_dim),
    )
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def padding(batch: int, n_k: int) -> Tensor:
    """Key padding of another length per example; the second example keeps one key, at most."""
    lengths = [(2 * n_k + 2) // 3, 1, n_k][:batch]
    return torch.arange(n_k) >= torch.tensor(lengths)[:, None]


def global_tokens(batch: int, n_k: int, seed: int = 0) -> Tensor:
    """A global mask with other tokens, and other numbers of them, per example."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.05, 0.2, batch)[:, None]
    return torch.rand(batch, n_k, generator=generator) < share


def check(
    expression: str,
    tensors: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    scale: float | None = None,
    lse_gradient: bool = True,
) -> dict[str, Tensor]:
    """Hold one call of `sparse_attn.attention`, forward and backward, to the error budget."""
    query, key, _ = tensors
    meaning = library(expression)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_attn.attention(
            query,
            key,
            value,
            meaning,
            key_padding_mask=key_padding_mask,
            global_mask=global_mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_lse=True,
        )

    allowed = reference.allowed_pairs(
        definition(expression), query, key, key_padding_mask, global_mask
    )
    return reference.check(ours, tensors, allowed, scale, lse_gradient)
