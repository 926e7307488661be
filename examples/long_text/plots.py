"""The picture of a run: how the loss fell, and what each layer looks at."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from long_text.model import Config
from long_text.training import CLIPPED_NORM, History

INK, TRAIN, HELD_OUT, BASELINE = "#2b2b2b", "#9db7d5", "#1f4e8c", "#c8553d"
COLORS = {
    "full": INK,
    "window": "#56b4e9",
    "longformer": "#0072b2",
    "strided": "#009e73",
    "fixed": "#e69f00",
    "bigbird": "#cc79a7",
}
DRAWN_TOKENS, DRAWN_WINDOW = 48, 6


def _smooth(values: list[float], width: int) -> np.ndarray:
    """The mean of the last `width` values at each place (of fewer at the start)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_loss(axes, history: History, baseline: float, name: str, unit: str) -> None:
    """The loss over the steps in bits per `unit`, and the bar to clear, which `name` names."""
    steps = np.arange(1, len(history.train) + 1)
    axes.plot(steps, history.train, color=TRAIN, linewidth=0.7, alpha=0.6)
    smooth = _smooth(history.train, max(1, len(steps) // 20))
    axes.plot(steps, smooth, color=TRAIN, linewidth=2, label="training (running mean)")
    if history.held_out:
        places, bits = zip(*history.held_out, strict=True)
        axes.plot(places, bits, "o-", color=HELD_OUT, markersize=4, label="held-out")
        axes.annotate(
            f"{bits[-1]:.2f}",
            (places[-1], bits[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=HELD_OUT,
            backgroundcolor="white",
        )
    label = f"{name}, {baseline:.2f}"
    axes.axhline(baseline, color=BASELINE, linestyle="--", linewidth=1.4, label=label)
    axes.set(xlabel="step", ylabel=f"bits per {unit}", xlim=(0, len(steps) * 1.03))
    lowest = min(baseline, *history.train)
    axes.set_ylim(max(0, lowest - 0.3), max(4.5, baseline + 1, smooth[-1] + 0.5))
    axes.set_title("Loss", loc="left", color=INK)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_patterns(figure, config: Config) -> None:
    """A square for each of up to four layers, with a window small enough to see."""
    last = range(max(1, config.layers - 3), config.layers)
    figure.suptitle(
        f"Attention pattern, drawn with a window of {DRAWN_WINDOW} instead of {config.window}",
        x=0.02,
        ha="left",
        color=INK,
    )
    squares = figure.subplots(2, 2).flatten()
    for square, layer in zip(squares, [0, *last], strict=False):
        mask = config.pattern(layer, DRAWN_WINDOW).mask(DRAWN_TOKENS).numpy()
        square.imshow(mask, cmap=ListedColormap(["#f4f6f9", HELD_OUT]), vmin=0, vmax=1)
        dilated = config.attention == "longformer"
        title = f"layer {layer + 1}" + f": dilation {config.dilations[layer]}" * dilated
        square.set_title(title, fontsize=10, color=INK)
        square.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
        square.spines[:].set_color("#c9ced6")
    for square in squares[len(last) + 1 :]:
        square.set_axis_off()


def save_figure(path: Path, history: History, baseline: float, config: Config) -> None:
    """Write the PNG: the loss curve on the left, the layers' patterns on the right."""
    figure = plt.figure(figsize=(12.5, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1])
    draw_loss(left.subplots(), history, baseline, "two bytes of context", "byte")
    if config.attention == "full":
        right.suptitle("Full causal attention", color=INK)
    else:
        _draw_patterns(right, config)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_comparison(path: Path, results: dict[str, dict], baseline: float) -> None:
    """Write the PNG of `--compare`: loss on the left, gradient norms on the right.

    `results` are those of `long_text.compare.measure` by attention, `baseline` is in bits per byte.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    seen = [baseline]
    for kind, result in results.items():
        norms, width = result["gradient_norms"], max(1, len(result["train"]) // 10)
        losses = _smooth(result["train"], width)
        steps = np.arange(1, len(losses) + 1)
        seen.extend(losses[len(losses) // 4 :])  # the first quarter falls from 8 bits
        label = f"{kind}: {result['bits']:.3f} held out, {result['seconds']:.0f} s"
        left.plot(steps, losses, color=COLORS[kind], label=label)
        right.plot(steps, norms, color=COLORS[kind], linewidth=0.5, alpha=0.3)
        right.plot(steps, _smooth(norms, width), color=COLORS[kind])
    label = f"two bytes of context: {baseline:.3f} held out"
    left.axhline(baseline, color=BASELINE, linestyle="--", linewidth=1.4, label=label)
    right.axhline(CLIPPED_NORM, color="#c9ced6", linestyle="--", linewidth=1)
    left.set_ylim(min(seen) - 0.1, max(seen) + 0.3)
    left.set(xlabel="step", ylabel="bits per byte, running mean")
    right.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    left.set_title("Training loss", loc="left", color=INK)
    right.set_title(f"Gradient norm, clipped at {CLIPPED_NORM:g}", loc="left", color=INK)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(axis="y", color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
