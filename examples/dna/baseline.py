"""The bar to clear: a Markov model of the bases before each base."""

from functools import partial

import numpy as np

from dna.data import complement

ORDERS = range(12)
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


def words(bases: np.ndarray, size: int) -> np.ndarray:
    """The number of the word of `size` bases that ends at each base; those missing count as 0."""
    codes = np.zeros(len(bases), np.int64)
    for back in range(min(size, len(bases))):
        codes[back:] += bases[: len(bases) - back].astype(np.int64) << 2 * back
    return codes


def _lean(shorter: np.ndarray, hits: np.ndarray, seen: np.ndarray, strength: float) -> np.ndarray:
    return (hits + strength * shorter) / (seen + strength)


def _bits(p: np.ndarray) -> np.ndarray:
    return -np.log2(p)


def markov_bits(
    train: np.ndarray, held_out: np.ndarray, orders: range = ORDERS
) -> tuple[int, np.ndarray]:
    """The best order, and the bits of every held-out base under it.

    Words of both strands of `train` are counted. Each order leans on the one below, p = (hits +
    s * p_shorter) / (seen + s), and both s and the order are those that serve `held_out` best: this
    favors the baseline.
    """
    strands = (train, complement(train))
    whole = np.concatenate([train[-len(orders) :], held_out])
    best, p = (0, np.full(len(held_out), 2.0)), np.full(len(held_out), 1 / 4)
    for order in orders:
        counts = sum(
            np.bincount(words(strand, order + 1), minlength=4 ** (order + 1)) for strand in strands
        ).reshape(-1, 4)
        context, base = np.divmod(words(whole, order + 1)[-len(held_out) :], 4)
        lean = partial(_lean, p, counts[context, base], counts.sum(axis=1)[context])
        p = min((lean(strength) for strength in STRENGTHS), key=lambda q: _bits(q).mean())
        if _bits(p).mean() < best[1].mean():
            best = order, _bits(p)
    return best
