"""The picture of both runs: the losses, and what a step takes."""

from pathlib import Path
from statistics import median

from long_text.plots import BASELINE, HELD_OUT, INK, plt


def save_figure(path: Path, results: dict[str, dict]) -> None:
    """Write the PNG: losses by step on the left, time and memory on the right."""
    figure, panels = plt.subplots(
        1, 3, figsize=(12.5, 4), width_ratios=[2, 1, 1], layout="constrained"
    )
    colors = (BASELINE, HELD_OUT)
    styles = ({"linewidth": 5, "alpha": 0.4}, {"linewidth": 1.5})  # both show where they coincide
    for (attention, result), color, style in zip(results.items(), colors, styles, strict=True):
        steps = range(1, len(result["losses"]) + 1)
        panels[0].plot(steps, result["losses"], color=color, label=attention, **style)
    panels[0].set(xlabel="step", ylabel="cross-entropy, nats")
    panels[0].legend(frameon=False)
    figures = {
        "Seconds of a step, median": [median(result["seconds"]) for result in results.values()],
        "Memory of training, MiB": [
            result["training_memory"] / 2**20 for result in results.values()
        ],
    }
    for axes, (title, values) in zip(panels[1:], figures.items(), strict=True):
        axes.bar_label(axes.bar(list(results), values, color=colors), fmt="%.3g")
        axes.set_title(title, loc="left", color=INK)
    panels[0].set_title("Training loss", loc="left", color=INK)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
