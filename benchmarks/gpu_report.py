"""What the GPU benchmark writes beside its JSON: a table in Markdown and a chart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plotting import pyplot

OURS = "sparse_attn"
DENSE = ("sdpa_flash", "cudnn")
# An implementation that is further from float64 than this computes something else.
SANE = {"bfloat16": 0.2, "float16": 0.05, "float32": 1e-2}

Key = tuple


def _counts(row: dict) -> bool:
    is_number = isinstance(row["error"], (int, float))
    return row["ms"] is not None and is_number and row["error"] <= SANE[row["dtype"]]


def groups(rows: Iterable[dict]) -> dict[Key, dict[str, dict]]:
    """The rows of each call and direction, by implementation."""
    found: dict = {}
    names = ("case", "length", "head_dim", "batch", "heads", "heads_kv", "dtype", "direction")
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["implementation"]] = row
    return found


def best_peer(group: dict[str, dict]) -> dict | None:
    peers = [row for name, row in group.items() if not name.startswith(OURS) and _counts(row)]
    return min(peers, key=lambda row: row["ms"], default=None)


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["ms"] is None:
        return "failed"
    return f"{row['ms']:.3f}" + ("" if _counts(row) else " (wrong)")


def table(result: dict) -> str:
    """The results as Markdown: milliseconds, useful TFLOP/s of ours, and the best peer's time."""
    found = groups(result["results"])
    names = list(dict.fromkeys(row["implementation"] for row in result["results"]))
    text = [
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}. Milliseconds, "
        "median; useful TFLOP/s; the best peer's time as a multiple of ours.",
    ]
    for direction in ("forward", "backward"):
        head = ["case", "N", "D", *names, "TFLOP/s", "best peer", "its time ÷ ours"]
        rows = [head, ["---"] * len(head)]
        for key, group in found.items():
            if key[-1] != direction:
                continue
            ours, best = group.get(OURS), best_peer(group)
            ours = ours if ours and ours["ms"] is not None else None
            rows.append([
                *map(str, key[:3]),
                *(_cell(group.get(name)) for name in names),
                f"{ours['useful_tflops']:.0f}" if ours else "–",
                best["implementation"] if best else "–",
                f"{best['ms'] / ours['ms']:.2f}" if best and ours else "–",
            ])  # fmt: skip
        if len(rows) > 2:
            text += ["", f"**{direction}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*text, *_failures(result["results"])]) + "\n"


def _failures(rows: list[dict]) -> list[str]:
    found: dict = {}
    for row in rows:
        if row["ms"] is None:
            found.setdefault((row["implementation"], row["error"]), {})[row["case"]] = None
    lines = [f"* {name} ({', '.join(where)}): {error}" for (name, error), where in found.items()]
    return ["", *lines] if lines else []


def lines(title: str, rows: list[dict]) -> str:
    """A few words on one call, for the terminal."""
    text = [title]
    for row in rows:
        name = f"  {row['implementation']:<14} {row['direction']:<9}"
        if row["ms"] is None:
            text.append(f"{name} {row['error']}")
            continue
        text.append(
            f"{name} {row['ms']:9.3f} ms {row['useful_tflops']:7.1f} TFLOP/s "
            f"{row['gb_per_s']:7.0f} GB/s  error {row['error']:.2g}  {row.get('path', '')}"
            if isinstance(row["error"], float)
            else f"{name} {row['ms']:9.3f} ms  error {row['error']}"
        )
    return "\n".join(text)


def chart(result: dict, path: Path) -> None:
    """Useful TFLOP/s of ours and of the best sparse and dense peers, forward and backward."""
    plt = pyplot()
    found = groups(result["results"])
    kinds = {"sparse_attn": "#c1272d", "best sparse peer": "#1f4e8c", "dense": "#aaaaaa"}
    calls = list(dict.fromkeys(key[:-1] for key in found))
    size = (max(8.0, 2.0 + 0.55 * len(calls)), 8.0)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for panel, direction in zip(panels, ("forward", "backward"), strict=True):
        for x, call in enumerate(calls):
            group = found.get((*call, direction), {})
            dense = {name: row for name, row in group.items() if name in DENSE}
            sparse = {name: row for name, row in group.items() if name not in DENSE}
            shown = (group.get(OURS), best_peer(sparse), best_peer(dense))
            for n, (row, color) in enumerate(zip(shown, kinds.values(), strict=True)):
                if row is None or row["ms"] is None:
                    continue
                panel.bar(x + 0.28 * (n - 1), row["useful_tflops"], 0.26, color=color)
                if n > 0 and row["implementation"] not in DENSE:
                    at = (x + 0.28 * (n - 1), row["useful_tflops"])
                    panel.annotate(row["implementation"], at, rotation=90, fontsize=6, ha="center")
        panel.set_ylabel("useful TFLOP/s")
        panel.set_title(direction)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.margins(y=0.15)
    labels = [f"{call[0]}\nN {call[1]}, D {call[2]}" for call in calls]
    panels[1].set_xticks(range(len(calls)), labels, rotation=60, ha="right", fontsize=7)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in kinds.values()]
    figure.legend(handles, kinds, loc="outside upper right", ncols=3, fontsize=8)
    row = result["results"][0]
    figure.suptitle(
        f"{result['device']}, torch {result['torch']}: batch {row['batch']}, {row['heads']} heads, "
        f"{row['dtype']}",
        fontsize=10,
        x=0.02,
        ha="left",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
