"""The pictures of explain.py."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window

import matplotlib.pyplot as plt
import numpy as np
import torch

from long_text.plots import HELD_OUT, INK

SHOWN_BYTES = 64  # of a rollout, up to the query
MOST_LETTERS = 64  # along an axis, before they overlap


def letters(text: torch.Tensor) -> list[str]:
    """A visible sign for each byte."""
    signs = {10: "↵", 9: "→", 32: "·"}
    return [signs.get(b, chr(b) if 32 < b < 127 else "▯") for b in text.tolist()]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_heads(path: Path, layers: Sequence[torch.Tensor], text: torch.Tensor) -> None:
    """The weights (heads, bytes, bytes) among the bytes of a stretch: a row for each layer."""
    heads, side = len(layers[0]), 3.6
    size = (side * heads, (side + 0.2) * len(layers))
    figure, panels = plt.subplots(
        len(layers), heads, figsize=size, squeeze=False, layout="constrained"
    )
    for number, (weights, row) in enumerate(zip(layers, panels, strict=True)):
        shades = weights.sqrt().numpy()  # square roots: small weights stay visible
        for head, axes in enumerate(row):
            axes.imshow(shades[head], cmap="Blues", vmin=0, vmax=shades.max())
            axes.set_title(f"layer {number + 1}, head {head + 1}", fontsize=10, color=INK)
            axes.set(xlabel="key", ylabel="query")
            if len(text) <= MOST_LETTERS:
                axes.set_xticks(range(len(text)), letters(text), fontsize=4)
                axes.set_yticks(range(len(text)), letters(text), fontsize=4)
                axes.tick_params(length=0, pad=1)
    figure.suptitle("Attention weights at the end of the text (shade: square root)", color=INK)
    _save(figure, path)


def save_distances(path: Path, layers: Sequence[torch.Tensor]) -> None:
    """The mean weight (heads, n) by distance: a panel for each layer, a line for each head."""
    figure, panels = plt.subplots(
        1, len(layers), figsize=(3.6 * len(layers), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for number, (profile, axes) in enumerate(zip(layers, panels[0], strict=True)):
        for head, line in enumerate(profile):
            seen = (~line.isnan()).nonzero().squeeze(1)
            axes.plot(seen + 1, line[seen], marker=".", markersize=3, label=f"head {head + 1}")
        axes.set(xscale="log", yscale="log", xlabel="distance + 1")
        axes.set_title(f"layer {number + 1}", fontsize=10, color=INK)
        axes.grid(color="#e6e6e6")
    panels[0][0].set_ylabel("mean weight")
    panels[0][0].legend(frameon=False)
    _save(figure, path)


def save_shares(path: Path, shares: torch.Tensor, tokens: int) -> None:
    """How much goes to the global bytes, (layers, heads), as bars."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    layers, heads = shares.shape
    width = 0.8 / heads
    for head in range(heads):
        places = np.arange(layers) + (head - (heads - 1) / 2) * width
        axes.bar(places, shares[:, head], width, label=f"head {head + 1}")
    axes.set_xticks(range(layers), [f"layer {layer + 1}" for layer in range(layers)])
    named = {0: "none in this pattern", 1: "the first byte"}.get(
        tokens, f"the first {tokens} bytes"
    )
    axes.set_title(f"Share of the weight on global bytes: {named}", fontsize=10, color=INK)
    axes.set(ylabel="share", ylim=(0, max(0.01, 1.15 * shares.max().item())))
    axes.legend(frameon=False)
    _save(figure, path)


def save_rollout(
    path: Path, rows: torch.Tensor, queries: Sequence[int], text: torch.Tensor
) -> None:
    """For each query the rollout (queries, n) over all bytes, and letter by letter near it."""
    figure, panels = plt.subplots(
        len(queries), 2, figsize=(14, 2.6 * len(queries)), width_ratios=[1, 2.2], squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, query, (whole, near) in zip(rows, queries, panels, strict=True):
        reached = (row > 0).nonzero().squeeze(1)
        whole.plot(query - reached + 1, row[reached], ".", markersize=3, color=HELD_OUT)
        whole.set(xscale="log", yscale="log", xlabel="distance + 1", ylabel="rollout")
        whole.set_title(f"byte {query} draws on {len(reached)} bytes", fontsize=10, color=INK)
        first = max(0, query + 1 - SHOWN_BYTES)
        part = row[first : query + 1]
        near.bar(range(len(part)), part, color=HELD_OUT)
        near.set_xticks(range(len(part)), letters(text[first : query + 1]), fontsize=7)
        near.set(yscale="log")
        near.set_title(f"{part.sum():.0%} of it on these", fontsize=10, color=INK)
    figure.suptitle("Attention rollout: where the information of a byte comes from", color=INK)
    _save(figure, path)
