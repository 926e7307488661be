"""DeepSpeed's sparsity configurations, written anew from their documentation.

Arguments and layouts are those of `deepspeed.ops.sparse_attention`, but that random blocks come
from a generator of the configuration's own. Blocks are rows and columns here; tokens come in with
`make_layout(seq_len)` alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(kw_only=True)
class SparsityConfig:
    """What all have: `table(head, n)` is the (n, n) table of one head."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    attention: str = "bidirectional"
    generator: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    @property
    def one_way(self) -> bool:
        return self.attention == "unidirectional"

    def table(self, head: int, n: int) -> np.ndarray:
        raise NotImplementedError

    def make_layout(self, seq_len: int) -> Tensor:
        """The layout (num_heads, n, n), int64, of a length that is a multiple of the block."""
        if seq_len % self.block:
            raise ValueError(f"expected a multiple of {self.block}, got {seq_len}")
        n = seq_len // self.block
        heads = self.num_heads if self.different_layout_per_head else 1
        layouts = np.stack([self.table(head, n) for head in range(heads)])
        whole = np.broadcast_to(layouts, (self.num_heads, n, n))
        return torch.from_numpy(whole.astype(np.int64))

    def chosen(self, count: int, n: int) -> np.ndarray:
        """`count` random columns in each row; for one way, from those up to the diagonal."""
        table = np.zeros((n, n), bool)
        for row in range(n):
            columns = range(row + 1 if self.one_way else n)
            table[row, self.generator.sample(columns, min(count, len(columns)))] = True
        return table


def band(n: int, window: int) -> np.ndarray:
    """`window // 2` blocks on each side, and the block itself."""
    row, column = np.ogrid[:n, :n]
    return abs(row - column) <= window // 2


def segments(n: int, sizes: list[int]) -> np.ndarray:
    """Blocks of one segment see each other; the last size goes on to the end."""
    number = np.repeat(np.arange(n + len(sizes)), [*sizes, *[sizes[-1]] * n])[:n]
    return number[:, None] == number[None, :]


def spans(starts: list[int], ends: list[int] | None, n: int) -> list[slice]:
    """Global blocks by their starts and ends; each start alone without ends."""
    ends = [start + 1 for start in starts] if ends is None else ends
    pairs = zip(starts, ends, strict=True)
    return [slice(start, min(end, n)) for start, end in pairs if start < n]


@dataclass(kw_only=True)
class DenseSparsityConfig(SparsityConfig):
    """All blocks."""

    def table(self, head: int, n: int) -> np.ndarray:
        return np.full((n, n), True)


@dataclass(kw_only=True)
class FixedSparsityConfig(SparsityConfig):
    """Segments, and the last blocks of each segment as its summary for all (Child et al. 2019).

    Head h takes the (h mod num_different_global_patterns)-th group of blocks from the end of each
    segment as its summary.
    """

    num_local_blocks: int = 4
    num_global_blocks: int = 1
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    def summaries(self, head: int, n: int) -> list[slice]:
        size, width = self.num_local_blocks, self.num_global_blocks
        first = size - (1 + head % self.num_different_global_patterns) * width
        whole = n - n % size
        starts = list(range(first, whole, size))
        if whole < n:  # a short last segment
            starts.append(max(0, min(whole + first, n - width)))
        return [slice(start, start + width) for start in starts]

    def table(self, head: int, n: int) -> np.ndarray:
        table = segments(n, [self.num_local_blocks])
        if self.one_way:
            table = np.tril(table)
        for span in self.summaries(head, n):
            table[span.start if self.one_way else 0 :, span] = True
            if self.horizontal_global_attention:
                table[span] = True
        return table


@dataclass(kw_only=True)
class VariableSparsityConfig(SparsityConfig):
    """Segments of given sizes, given global blocks, and random ones."""

    num_random_blocks: int = 0
    local_window_blocks: list[int] = field(default_factory=lambda: [4])
    global_block_indices: list[int] = field(default_factory=lambda: [0])
    global_block_end_indices: list[int] | None = None
    horizontal_global_attention: bool = False

    def table(self, head: int, n: int) -> np.ndarray:
        table = segments(n, self.local_window_blocks)
        for span in spans(self.global_block_indices, self.global_block_end_indices, n):
            table[:, span] = True
            if self.horizontal_global_attention:
                table[span] = True
        table |= self.chosen(self.num_random_blocks, n)
        return np.tril(table) if self.one_way else table


@dataclass(kw_only=True)
class BigBirdSparsityConfig(SparsityConfig):
    """A window, random blocks, and the first blocks as global ones (Zaheer et al. 2020)."""

    num_random_blocks: int = 1
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1

    def table(self, head: int, n: int) -> np.ndarray:
        table = band(n, self.num_sliding_window_blocks) | self.chosen(self.num_random_blocks, n)
        table[: self.num_global_blocks] = table[:, : self.num_global_blocks] = True
        return np.tril(table) if self.one_way else table


@dataclass(kw_only=True)
class BSLongformerSparsityConfig(SparsityConfig):
    """A window and given global blocks, rows and columns (Beltagy et al. 2020)."""

    num_sliding_window_blocks: int = 3
    global_block_indices: list[int] = field(default_factory=lambda: [0])
    global_block_end_indices: list[int] | None = None

    def table(self, head: int, n: int) -> np.ndarray:
        table = band(n, self.num_sliding_window_blocks)
        for span in spans(self.global_block_indices, self.global_block_end_indices, n):
            table[span] = table[:, span] = True
        return np.tril(table) if self.one_way else table


@dataclass(kw_only=True)
class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A window alone."""

    attention: str = "unidirectional"
    num_sliding_window_blocks: int = 3

    def table(self, head: int, n: int) -> np.ndarray:
        table = band(n, self.num_sliding_window_blocks)
        return np.tril(table) if self.one_way else table
