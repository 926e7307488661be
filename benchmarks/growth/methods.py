"""Attentions whose growth with the length is measured, each with the growth that it should have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peer_setup import Attention, step
from torch import Tensor

from sparse_attn import BigBird, Fixed, Global, Pattern, Strided, Window, attention
from sparse_attn.functional import (
    chunked_lsh_attention,
    linear_attention,
    lsh_attention,
    performer_attention,
    routing_attention,
    topk_attention,
)

HEAD_DIM = 64
REACH = 256  # keys that a window sees on each side
BUCKET = 64  # tokens of a chunk of Reformer
SEED = 0  # of rotations, features and centroids


@dataclass(frozen=True)
class Method:
    """An attention over query, key and value (or query = key and value) of any length."""

    make: Callable[[int], Attention]
    time: float  # the exponents in the length that are expected, of time
    memory: float = 1.0  # and of peak memory
    tolerance: float = 0.1
    pairs: Callable[[int], int] | None = None
    logarithm: bool = False  # time grows as log(n) besides
    square: bool = False  # wants the length to be the square of a multiple of 16
    leaves: int = 3
    longest: int = 2**24

    def length(self, near: float) -> int:
        """A length that the method takes."""
        near = min(near, self.longest)
        return round(math.sqrt(near) / 16) ** 2 * 256 if self.square else round(near / 64) * 64


def _pattern(make: Callable[[int], Pattern], time: float = 1.0, **options) -> Method:
    return Method(
        lambda n: lambda q, k, v: attention(q, k, v, make(n)),
        time,
        pairs=lambda n: make(n).cost(n).pairs,
        **options,
    )


def window(reach: int) -> Method:
    """A window of `reach` keys on each side."""
    return _pattern(lambda n: Window(reach), tolerance=0.05)


def _dilated(n: int) -> Pattern:
    return Window(REACH // 2, dilation=4)


def _with_globals(n: int) -> Pattern:
    return Window(REACH) | Global(range(16))


def _chunked_lsh(n: int) -> Attention:
    return lambda x, v: chunked_lsh_attention(x, v, chunk_length=BUCKET, seed=SEED)


def _lsh(n: int) -> Attention:
    buckets = 2 * round(math.sqrt(n) / 2)
    return lambda q, k, v: lsh_attention(q, k, v, num_buckets=buckets, seed=SEED)


def _routing(n: int) -> Attention:
    clusters = math.isqrt(n)
    generator = torch.Generator().manual_seed(SEED)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routing_attention(q, k, v, centroids, window=clusters)

    centroids = torch.randn(1, clusters, HEAD_DIM, generator=generator)
    return run


def _materialized(n: int) -> Attention:
    # Queries are scaled, not logits: one matrix of pairs less.
    return lambda q, k, v: (q * HEAD_DIM**-0.5 @ k.mT).softmax(-1) @ v


def _masked(n: int) -> Attention:
    mask = torch.ones(n, n, dtype=torch.bool).tril_(REACH).triu_(-REACH)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _square(n: int) -> int:
    return n * n


METHODS = {
    "window": window(REACH),
    "dilated": _pattern(_dilated, tolerance=0.05),
    "window + global": _pattern(_with_globals, tolerance=0.05),
    "BigBird": _pattern(lambda n: BigBird(64), tolerance=0.05),
    "strided, l = √N": _pattern(lambda n: Strided(math.isqrt(n)), 1.5, square=True),
    "fixed, l = √N": _pattern(lambda n: Fixed(math.isqrt(n), 8), 1.5, square=True),
    "LSH, chunks": Method(_chunked_lsh, 1.0, logarithm=True, leaves=2),
    # A query sees its whole bucket: √N keys of √N buckets. The pairs are listed.
    "LSH, buckets": Method(_lsh, 1.5, 1.5),
    "routing, √N clusters": Method(_routing, 1.5, 1.5, square=True),
    "top 64": Method(lambda n: lambda q, k, v: topk_attention(q, k, v, 64), 2.0),
    "linear": Method(lambda n: linear_attention, 1.0),
    "linear, causal": Method(
        lambda n: lambda q, k, v: linear_attention(q, k, v, is_causal=True), 1.0
    ),
    "Performer": Method(lambda n: lambda q, k, v: performer_attention(q, k, v, seed=SEED), 1.0),
    "dense, SDPA": Method(lambda n: F.scaled_dot_product_attention, 2.0, pairs=_square),
    "dense, SDPA with a mask": Method(_masked, 2.0, 2.0, pairs=_square, longest=2**14),
    "dense, materialized": Method(_materialized, 2.0, 2.0, pairs=_square, longest=2**14),
}


def inputs(count: int, heads: int, n: int, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Leaves that want a gradient, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, n, HEAD_DIM)
    leaves = tuple(
        torch.randn(shape, generator=generator, requires_grad=True) for _ in range(count)
    )
    return leaves, torch.randn(shape, generator=generator)


def task(
    method: Method, n: int, data: tuple[tuple[Tensor, ...], Tensor], backward: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """One forward pass, or one forward and backward."""
    leaves, grad = data
    return step(method.make(n), leaves[: method.leaves], grad, backward)
