"""Philox4x32-10 in NumPy: random words that are a function of a counter and a key alone.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key between rounds
LOW = 0xFFFFFFFF


def philox(counter: Sequence[np.ndarray | int], key: tuple[int, int]) -> np.ndarray:
    """The four words of each counter.

    Args:
        counter: four words, arrays or ints that broadcast to one shape; the low 32 bits count.
        key: two words.

    Returns:
        (4, ...) uint64, each below 2^32.
    """
    words = np.broadcast_arrays(*(np.asarray(word, np.int64) & LOW for word in counter))
    a, b, c, d = (word.astype(np.uint64) for word in words)
    shift, low = np.uint64(32), np.uint64(LOW)
    for number in range(ROUNDS):
        key0, key1 = (np.uint64(k + number * w & LOW) for k, w in zip(key, WEYL, strict=True))
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b = (second >> shift) ^ b ^ key0, second & low
        c, d = (first >> shift) ^ d ^ key1, first & low
    return np.stack([a, b, c, d])


def seed_key(seed: int) -> tuple[int, int]:
    """The key that a 64-bit seed stands for: its low word, its high word."""
    return seed & LOW, seed >> 32 & LOW


def distinct(count: int, size: int, row: int, seed: int) -> set[int]:
    """min(count, size) distinct numbers below `size`, drawn for a row by Floyd's algorithm.

    Bentley and Floyd, "A sample of brilliance" (CACM 1987): every subset is equally likely.
    """
    chosen: set[int] = set()
    first = max(0, size - count)
    for last in range(first, size):
        words = philox((last - first, row, 0, 2), seed_key(seed))
        number = (int(words[0]) | int(words[1]) << 32) * (last + 1) >> 64
        chosen.add(last if number in chosen else number)
    return chosen
