"""The attention layers that are compared, each with about the same number of keys for a query."""

from collections.abc import Callable
from math import isqrt

from torch import nn

from sparse_attn import (
    BigBirdSelfAttention,
    DynamicSparseSelfAttention,
    Full,
    Global,
    LearnedSparseSelfAttention,
    LinearSelfAttention,
    LinformerSelfAttention,
    LowRankSelfAttention,
    NystromSelfAttention,
    PerformerSelfAttention,
    ReformerSelfAttention,
    RoutingSelfAttention,
    SparseSelfAttention,
    Strided,
    TopKSelfAttention,
    Window,
)

BLOCK = 32
SIDE = 64  # keys on each side of a window; keys that the others choose for a query, twice as many

Layer = Callable[[int, int, int], nn.Module]


def _pattern(pattern: Callable) -> Layer:
    return lambda width, heads, length: SparseSelfAttention(width, heads, pattern=pattern(length))


def _layer(kind: type[nn.Module], **options) -> Layer:
    return lambda width, heads, length: kind(width, heads, **options)


# By what each takes: (width, heads, length) to a layer.
METHODS: dict[str, Layer] = {
    "full": _pattern(lambda length: Full()),
    "window": _pattern(lambda length: Window(SIDE)),
    "window + globals": _pattern(lambda length: Window(SIDE) | Global(range(8))),
    "strided": _pattern(lambda length: Strided(isqrt(length))),
    "bigbird": _layer(BigBirdSelfAttention, block=BLOCK),
    "learned window": _layer(LearnedSparseSelfAttention, pattern=Window(SIDE)),
    "top-k": _layer(TopKSelfAttention, k=2 * SIDE),
    "dynamic blocks": _layer(DynamicSparseSelfAttention, keep=2 * SIDE // BLOCK, block=BLOCK),
    "reformer": lambda width, heads, length: ReformerSelfAttention(
        width, heads, num_buckets=2 * -(-length // (2 * SIDE)), num_hashes=2, chunk_length=SIDE
    ),
    "routing": lambda width, heads, length: RoutingSelfAttention(
        width, heads, num_clusters=-(-length // (2 * SIDE)), window=2 * SIDE
    ),
    "linformer": lambda width, heads, length: LinformerSelfAttention(
        width, heads, seq_len=length, k=2 * SIDE
    ),
    "low rank": lambda width, heads, length: LowRankSelfAttention(
        width, heads, rank=width // heads // 2
    ),
    "nystrom": _layer(NystromSelfAttention, num_landmarks=SIDE),
    "performer": _layer(PerformerSelfAttention),
    "linear": _layer(LinearSelfAttention),
}
