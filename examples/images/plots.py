"""The picture of a run: how the loss fell, and which pixels are hard."""

from pathlib import Path

import numpy as np
from long_text.plots import INK, draw_loss, plt
from long_text.training import History

SHOWN = 3


def save_figure(
    path: Path,
    history: History,
    crops: list[np.ndarray],
    bits: np.ndarray,
    baseline: np.ndarray,
) -> None:
    """Write the PNG: the loss curve; then held-out crops, and bits (crops, side, side) of each
    pixel for the model and for the baseline."""
    figure = plt.figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    draw_loss(left.subplots(), history, baseline.mean(), "adaptive histogram", "pixel")
    shown = range(min(SHOWN, len(crops)))
    right.suptitle("Held out: the image, and the bits of each pixel", color=INK)
    panels = right.subplots(len(shown), 3, squeeze=False)
    for row, i in zip(panels, shown, strict=True):
        row[0].imshow(crops[i], cmap="gray", vmin=0, vmax=255)
        for panel, values, name in ((row[1], bits, "model"), (row[2], baseline, "histogram")):
            drawn = panel.imshow(values[i], cmap="magma", vmin=0, vmax=12)
            panel.set_title(f"{name}: {values[i].mean():.2f}", fontsize=9, color=INK)
        for panel in row:
            panel.set(xticks=[], yticks=[])
    right.colorbar(drawn, ax=panels, shrink=0.8, label="bits")
    figure.savefig(path, dpi=130)
    plt.close(figure)
