"""The picture of all runs: accuracy against time, and how each loss fell."""

from pathlib import Path
from statistics import median

from long_text.plots import INK, plt


def save_figure(path: Path, results: dict[str, dict], chance: float) -> None:
    """Write the PNG: accuracy by time of a step, its dots as large as the memory; the losses."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13.5, 5.5), width_ratios=[1.2, 1], layout="constrained"
    )
    colors = plt.get_cmap("tab20").colors
    most = max(result["training_memory"] for result in results.values())
    for (method, result), color in zip(results.items(), colors, strict=False):
        milliseconds, right_share = 1e3 * median(result["seconds"]), 100 * result["accuracy"]
        area = 30 + 300 * result["training_memory"] / max(1, most)
        left.scatter(milliseconds, right_share, s=area, color=color, alpha=0.8, linewidth=0)
        left.annotate(
            method, (milliseconds, right_share), xytext=(6, 6), textcoords="offset points",
            fontsize=9, color=INK,
        )  # fmt: skip
        right.plot(range(1, len(result["losses"]) + 1), result["losses"], color=color, label=method)
    left.axhline(100 * chance, color=INK, linewidth=0.8, linestyle=":")
    left.set(xlabel="milliseconds of a step, median", ylabel="questions answered right, %")
    left.set_xscale("log")
    left.set_title("Accuracy and time; area: memory", loc="left", color=INK)
    right.set(xlabel="step", ylabel="cross-entropy, nats")
    right.set_title("Training loss", loc="left", color=INK)
    right.legend(frameon=False, fontsize=8, ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
