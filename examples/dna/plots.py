"""The picture of a run: how the loss fell, and what context is worth."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from long_text.plots import BASELINE, HELD_OUT, INK, draw_loss, plt
from long_text.training import History

POINTS = 24


def context_curve(bits: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Bases of context, on a logarithmic scale, and the mean of `bits` (windows, length) there."""
    length = bits.shape[1]
    edges = np.unique(np.geomspace(1, length, points + 1).round().astype(int))
    edges[0] = 0
    pieces = list(pairwise(edges))
    middles = np.array([(start + stop) / 2 for start, stop in pieces])
    return middles, np.array([bits[:, start:stop].mean() for start, stop in pieces])


def save_figure(
    path: Path, history: History, bits: np.ndarray, baseline: np.ndarray, name: str
) -> None:
    """Write the PNG: the loss curve; then the bits of held-out bases (windows, length) by how much
    context the model has had, and those of the baseline `name` at the same places."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    draw_loss(left, history, baseline.mean(), name, "base")
    left.set_ylim(min(baseline.mean(), bits.mean()) - 0.06, 2.03)
    for values, label, color in ((bits, "model", HELD_OUT), (baseline, name, BASELINE)):
        right.plot(*context_curve(values), "o-", markersize=3, color=color, label=label)
    right.set(xscale="log", xlabel="bases before, in the sequence", ylabel="bits per base")
    right.set_title("Held out, by the context that the model has", loc="left", color=INK)
    right.grid(axis="y", color="#e6e6e6")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
