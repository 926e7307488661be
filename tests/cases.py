"""Every pattern, shape and dtype by name, for the tests and the benchmarks.

To add a pattern: one line in PATTERNS (in DENSE too if its pairs grow with the square of the
length, in OCTAVES if with n log n), and its definition in `reference.py`. Patterns that hold
tensors stand in SIZED.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import reference
import torch
from torch import Tensor

import sparse_attn

# Where the tensors of the tests lie: pytest's --device, also in the processes that tests start.
DEVICE = torch.device(os.environ.get("SPARSE_ATTN_TEST_DEVICE", "cpu"))

# Whether the CUDA kernels serve it: on a GPU, or on the emulator of tests/native.
CUDA_KERNELS = DEVICE.type == "cuda" or torch.ops.sparse_attn._cuda_archs() == ["emulator"]

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
    "strided": "Strided(16)",
    "strided_1": "Strided(1)",
    "strided_7": "Strided(7)",
    "strided_64": "Strided(64)",
    "strided_128": "Strided(128) & Window(1000, 0)",
    "strided_window": "Window(20, 3) & Strided(7)",
    "strided_heads": "PerHead([Window(15, 0), Window(math.inf, 0, dilation=16)])",
    "fixed": "Fixed(16, 2)",
    "fixed_all": "Fixed(5, 5)",
    "fixed_no_summary": "Fixed(100, 0)",
    "fixed_64": "Fixed(64, 1)",
    "fixed_128": "Fixed(128, 40) | Global([0])",
    "local_blocks": "LocalBlocks(16)",
    "local_blocks_1": "LocalBlocks(1)",
    "local_blocks_100": "LocalBlocks(100) & Causal()",
    "local_blocks_dilated": "LocalBlocks(48) | Window(3, dilation=20)",
    "random_blocks": "RandomBlocks(2, 16)",
    "random_blocks_5": "RandomBlocks(3, 5, seed=7)",
    "random_blocks_64": "RandomBlocks(1, 64, seed=2**63 - 1)",
    "random_blocks_causal": "(RandomBlocks(2, 48, seed=1) | LocalBlocks(48)) & Causal()",
    "random_tokens": "RandomTokens(0.1)",
    "random_tokens_window": "RandomTokens(0.03, seed=5) | Window(4)",
    "random_tokens_near": "RandomTokens(0.5, seed=2**40 + 3) & Window(24)",
    "bigbird": "BigBird(16)",
    "bigbird_5": "BigBird(5, random_blocks=1, window_blocks=5, global_blocks=2, seed=3)",
    "bigbird_causal": "BigBird(16, random_blocks=2, seed=1) & Causal()",
    "bigbird_bare": "BigBird(48, random_blocks=0, window_blocks=1, global_blocks=0)",
    "bigbird_100": "BigBird(100, seed=9) & (Causal() | GlobalQueries([-1]))",
    "checkerboard": "Checkerboard()",
    "checkerboard_16": "Checkerboard(16) & Window(40, 0)",
    "checkerboard_100": "Checkerboard(100)",
    "radial": "Radial(5)",
    "radial_0": "Radial(0)",
    "radial_1": "Radial(1) & Causal()",
    "radial_64": "Radial(64)",
    "first_last": "FirstLast(3, 2) | Window(4)",
    "first": "FirstLast(70, 0) & Causal()",
    "last": "FirstLast(0, 1)",
    "blocks_meet": "(RandomBlocks(4, 16) | Window(9)) & (BigBird(7) | Checkerboard(48))",
    "seeds_per_head": "PerHead([BigBird(16, seed=s) for s in range(4)])",
    "strides_per_head": "PerHead([Strided(7), Fixed(7, 2), Strided(64), Fixed(48, 1)])",
    "random_per_head": "PerHead([RandomTokens(0.2, seed=1), RandomBlocks(2, 5, seed=2)])",
}

# Quadratic by definition: an infinite side, all pairs, or a fixed share of them.
DENSE = {
    "window_infinite_left",
    "window_infinite_right",
    "dilated_infinite",
    "full",
    "causal",
    "per_head",
    "strided",
    "strided_1",
    "strided_7",
    "strided_64",
    "strided_heads",
    "fixed",
    "fixed_all",
    "fixed_64",
    "fixed_128",
    "random_tokens",
    "random_tokens_window",
    "checkerboard",
    "checkerboard_100",
    "strides_per_head",
    "random_per_head",
}

# With n log n: as many keys in every octave of distances.
OCTAVES = {"radial", "radial_1", "radial_64"}

# Patterns that hold tensors, whose sizes are those of the call: `n_q`, `n_k`, `heads`, `batch`.
SIZED = {
    "mask": "Mask(bits(n_q, n_k))",
    "mask_sparse": "Mask(bits(n_q, n_k, share=0.02))",
    "mask_heads": "Mask(bits(heads, n_q, n_k))",
    "mask_causal": "Mask(bits(heads, n_q, n_k)) & Causal()",
    "mask_examples": "Mask(bits(batch, heads, n_q, n_k)) | Window(2)",
    "layout": "BlockLayout(bits(blocks(n_q, 16), blocks(n_k, 16)), 16)",
    "layout_5": "BlockLayout(bits(blocks(n_q, 5), blocks(n_k, 5), share=0.2), 5) | Global([0])",
    "layout_heads": "BlockLayout(bits(heads, blocks(n_q, 64), blocks(n_k, 64)), 64) & Causal()",
    "layout_examples": "BlockLayout(bits(batch, 1, blocks(n_q, 48), blocks(n_k, 48)), 48)",
    "layout_all": "BlockLayout(bits(batch, heads, blocks(n_q, 7), blocks(n_k, 7)), 7)",
    "layout_100": "BlockLayout(bits(blocks(n_q, 100), blocks(n_k, 100)), 100) | RandomTokens(0.1)",
    "lists": "KeyLists(numbers(n_q, 5, below=n_k))",
    "lists_counted": (
        "KeyLists(numbers(heads, n_q, 9, below=n_k), numbers(heads, n_q, below=10)) | Window(1)"
    ),
    "lists_causal": "KeyLists(numbers(batch, 1, n_q, 20, below=n_k)) & Causal()",
    "layouts": (
        "BlockLayout(bits(heads, blocks(n_q, 16), blocks(n_k, 16)), 16)"
        " & (Mask(bits(batch, 1, n_q, n_k)) | BigBird(16, seed=2))"
    ),
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


def random(*size: int, seed: int = 0) -> Tensor:
    """Uniform float32 in [0, 1) on DEVICE, drawn on the CPU: the same numbers on every device."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal on DEVICE, drawn on the CPU in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def bits(*size: int, share: float = 0.5) -> Tensor:
    """A bool tensor with about this share of true elements, the same one for the same size."""
    return random(*size) < share


def blocks(length: int, block: int) -> int:
    """How many blocks hold a length; the last one may be partial."""
    return -(-length // block)


def numbers(*size: int, below: int) -> Tensor:
    """An int64 tensor of numbers from 0 on, the same one for the same size."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(below, size, generator=generator).to(DEVICE)


TENSORS = {"bits": bits, "blocks": blocks, "numbers": numbers}
NAMESPACE = {"math": math, "inf": math.inf, **TENSORS, **vars(sparse_attn)}
DEFINITIONS = {**TENSORS, **vars(reference)}


def sizes(shape: Shape | None) -> dict[str, int]:
    """The names by which an expression of SIZED asks for the sizes of the call."""
    if shape is None:
        return {}
    n_k = shape.n_q if shape.n_k is None else shape.n_k
    return {"n_q": shape.n_q, "n_k": n_k, "heads": shape.heads, "batch": shape.batch}


def library(expression: str, shape: Shape | None = None) -> sparse_attn.Pattern:
    """The pattern that an expression means to the library; those of SIZED want a shape."""
    return eval(expression, NAMESPACE | sizes(shape))


def definition(expression: str, shape: Shape | None = None) -> reference.Rule | reference.HeadRules:
    """The same expression, read by the reference."""
    return eval(expression, DEFINITIONS | sizes(shape))


def mask(expression: str, n_q: int = 67, n_k: int | None = None, heads: int = 4) -> Tensor:
    """The mask that an expression means to the reference, (heads, n_q, n_k)."""
    shape = Shape(n_q, n_k, heads=heads)
    return torch.from_numpy(definition(expression, shape).mask(n_q, n_k, heads).copy())


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
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.to(DEVICE, dtype) for x in drawn]


def padding(batch: int, n_k: int) -> Tensor:
    """Key padding of another length per example; the second example keeps one key, at most."""
    lengths = [(2 * n_k + 2) // 3, 1, n_k][:batch]
    return torch.arange(n_k, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]


def global_tokens(batch: int, n_k: int, seed: int = 0) -> Tensor:
    """A global mask with other tokens, and other numbers of them, per example."""
    return random(batch, n_k, seed=seed) < torch.linspace(0.05, 0.2, batch, device=DEVICE)[:, None]


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
    batch, heads, n_q, _ = query.shape
    shape = Shape(n_q, key.shape[2], batch=batch, heads=heads)
    meaning = library(expression, shape)

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
        definition(expression, shape), query, key, key_padding_mask, global_mask
    )
    return reference.check(ours, tensors, allowed, scale, lse_gradient)
