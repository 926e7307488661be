"""The charts of growth and of the longest sequences."""

from __future__ import annotations

from pathlib import Path

from plotting import pyplot
from record import DIRECTIONS, TITLES


def _machine(result: dict) -> str:
    env = result["environment"]
    return f"{env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}"


def _lines(panel, curves: dict[str, tuple], colors) -> None:
    """A line of points for each name: (x, y, exponent)."""
    for i, (name, (x, y, slope)) in enumerate(curves.items()):
        marker = "osD^v"[i // 10 % 5]
        label = name if slope is None else f"{name}: {slope:.2f}"
        panel.plot(x, y, marker + "-", color=colors(i % 10), label=label, ms=4)
    panel.set(xscale="log", yscale="log")
    panel.grid(alpha=0.3, which="both")
    panel.legend(frameon=False, fontsize=7, title="exponent", title_fontsize=8)


def _times(entry: dict, over: str, direction: str) -> tuple:
    """Milliseconds over the numbers of that name."""
    found = entry["time"][direction]
    return entry[over], [sample["median_ms"] for sample in found["samples"]], found["exponent"]


def draw_growth(result: dict, path: Path) -> None:
    """Time and memory over the length, and a window's time over its reach, all logarithmic."""
    plt = pyplot()
    colors, methods = plt.get_cmap("tab10"), result["methods"]
    figure, panels = plt.subplots(2, 2, figsize=(13, 11), layout="constrained")
    for panel, direction in zip(panels[0], DIRECTIONS, strict=True):
        curves = {name: _times(entry, "lengths", direction) for name, entry in methods.items()}
        _lines(panel, curves, colors)
        panel.set(xlabel="tokens", ylabel="milliseconds", title=f"time, {TITLES[direction]}")
    direction = DIRECTIONS[1]
    memory = {
        name: (
            entry["memory"]["lengths"],
            [peak / 2**20 for peak in entry["memory"][direction]["peak_bytes"]],
            entry["memory"][direction]["exponent"],
        )
        for name, entry in methods.items()
    }
    _lines(panels[1][0], memory, colors)
    title = f"peak memory beyond the inputs, {TITLES[direction]}"
    panels[1][0].set(xlabel="tokens", ylabel="MiB", title=title)
    _draw_reaches(panels[1][1], result.get("reaches"), colors)
    figure.suptitle(f"One head of 64, float32; {_machine(result)}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_reaches(panel, found: dict | None, colors) -> None:
    if found is None:
        panel.axis("off")
        return
    curves = {TITLES[d]: _times(found, "reaches", d) for d in DIRECTIONS}
    _lines(panel, curves, colors)
    title = f"time of a window of {found['length']} tokens"
    panel.set(xlabel="keys on each side", ylabel="milliseconds", title=title)


def draw_longest(result: dict, path: Path) -> None:
    """A bar for each method and budget."""
    plt = pyplot()
    budgets, found = result["budgets"], result["longest"]
    names = list(reversed(found))
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(13, 1.6 + 0.42 * len(names)), sharey=True, layout="constrained"
    )
    for panel, (budget, title) in zip(panels, budgets.items(), strict=True):
        longest = [found[name][budget]["length"] for name in names]
        dense = found.get("dense, materialized", {}).get(budget, {}).get("length")
        labels = [
            f"{'≥ ' if found[name][budget]['limited'] else ''}{n:,}".replace(",", " ")
            + (f" ({n / dense:.1f} x)" if dense else "")
            for name, n in zip(names, longest, strict=True)
        ]
        colors = ["#9a9a9a" if name.startswith("dense") else "#c1272d" for name in names]
        bars = panel.barh(names, longest, 0.7, color=colors)
        panel.bar_label(bars, labels=labels, padding=3, fontsize=8)
        panel.set(xscale="log", xlabel="tokens", title=title)
        panel.margins(x=0.35)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Longest sequence that trains, one head of 64, float32; {_machine(result)}", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
