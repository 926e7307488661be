"""Patterns of blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_attn.patterns import words
from sparse_attn.patterns.arguments import index, word
from sparse_attn.patterns.base import Pattern
from sparse_attn.patterns.seeded import Seeded


@dataclass(frozen=True, repr=False)
class LocalBlocks(Pattern):
    """Query i sees key j when both lie in one block: ⌊i / block⌋ = ⌊j / block⌋.

    Args:
        block: Tokens of a block, at least 1.

    Raises:
        TypeError: block is no int.
        ValueError: block is less than 1.

    >>> LocalBlocks(2).mask(4).int()[1].tolist()
    [1, 1, 0, 0]
    """

    block: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", index("block", self.block, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.BLOCK_WINDOW, word(self.block), 0, 0)


@dataclass(frozen=True, repr=False)
class Checkerboard(Pattern):
    """Query i sees key j when ⌊i / block⌋ + ⌊j / block⌋ is even.

    Args:
        block: Tokens of a block, at least 1.

    Raises:
        TypeError: block is no int.
        ValueError: block is less than 1.

    >>> Checkerboard().mask(4).int()[1].tolist()
    [0, 1, 0, 1]
    """

    block: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", index("block", self.block, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.CHECKERBOARD, word(self.block))


@dataclass(frozen=True, repr=False)
class RandomBlocks(Seeded):
    """Each block of queries sees `blocks_per_row` distinct blocks of keys, drawn at random.

    The draw is a function of seed, number of blocks and query block alone (Philox, Salmon et al.
    2011): it is the same for every example, head, device and run, and touches no generator of
    torch, NumPy or Python. `PerHead` with other seeds makes heads differ.

    Args:
        blocks_per_row: Blocks of keys for each block of queries, at least 0; all if there are
            fewer.
        block: Tokens of a block, at least 1.
        seed: Another int gives another draw.

    Raises:
        TypeError: An argument is no int.
        ValueError: An argument is out of range.

    >>> RandomBlocks(2, 16).mask(160).sum(-1).unique().tolist()
    [32]
    """

    blocks_per_row: int
    block: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks_per_row", index("blocks_per_row", self.blocks_per_row, 0))
        object.__setattr__(self, "block", index("block", self.block, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.RANDOM_BLOCKS, word(self.blocks_per_row), word(self.block), self.seed)


@dataclass(frozen=True, repr=False)
class BigBird(Seeded):
    """Blocks see the blocks around them, random ones, and the first and last ones (Zaheer et al.
    2020, section 2), which see everything. A union: a key that several parts allow counts once.

    Args:
        block: Tokens of a block, at least 1.
        random_blocks: Random blocks of keys for each block of queries, at least 0.
        window_blocks: Blocks of the window: ⌊window_blocks / 2⌋ on each side, and the block itself.
        global_blocks: Blocks at each end of the sequence that are global, at least 0.
        seed: Another int gives other random blocks.

    Raises:
        TypeError: An argument is no int.
        ValueError: An argument is out of range.

    >>> BigBird(2, random_blocks=0).mask(10).int()[4].tolist()
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """

    block: int
    random_blocks: int = 3
    window_blocks: int = 3
    global_blocks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", index("block", self.block, 1))
        for name in ("random_blocks", "window_blocks", "global_blocks"):
            object.__setattr__(self, name, index(name, getattr(self, name), 0))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        reach, edge = word(self.window_blocks // 2), word(self.global_blocks)
        return (
            *(words.UNION, 4),
            *(words.BLOCK_WINDOW, word(self.block), reach, reach),
            *RandomBlocks(self.random_blocks, self.block, self.seed).encode(),
            *(words.EDGE_KEYS, word(self.block), edge, edge),
            *(words.EDGE_QUERIES, word(self.block), edge, edge),
        )
