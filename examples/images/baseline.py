"""The bar to clear: an adaptive histogram of each pixel given its left and upper neighbors."""

import numpy as np
import torch

from images.coding import activity, residuals

# Activities are told apart finely where they are small.
BOUNDS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60)


def _symbols(image: np.ndarray) -> np.ndarray:
    """context * 256 + residual of each pixel, in raster order."""
    pixels = torch.from_numpy(image.astype(np.int64))
    context = np.digitize(activity(pixels).numpy(), BOUNDS)
    return (context * 256 + residuals(pixels).numpy()).ravel()


def _seen_before(values: np.ndarray) -> np.ndarray:
    """For each value, how often it came before in `values`."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = np.searchsorted(ranked, ranked)
    before = np.empty_like(first)
    before[order] = np.arange(len(values)) - first
    return before


def histogram_bits(train: list[np.ndarray], held_out: list[np.ndarray]) -> np.ndarray:
    """Bits of every held-out pixel, (crops, side, side).

    The residuals of JPEG-LS in 11 contexts of activity, counted in `train` and on from there in
    the held-out pixels as they are coded; each byte starts with half a count (Krichevsky and
    Trofimov 1981).
    """
    counts = np.zeros((len(BOUNDS) + 1) * 256)
    for image in train:
        counts += np.bincount(_symbols(image), minlength=len(counts))
    totals = counts.reshape(-1, 256).sum(axis=1)
    symbols = np.concatenate([_symbols(image) for image in held_out])
    contexts = symbols // 256
    hits = counts[symbols] + _seen_before(symbols) + 0.5
    seen = totals[contexts] + _seen_before(contexts) + 128
    return -np.log2(hits / seen).reshape(len(held_out), *held_out[0].shape)
