"""What a run of the benchmark writes: JSON, a table in plain text and a chart."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

DIRECTIONS = ("forward", "forward_backward")
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return found.stdout.strip() or None


def _versions() -> dict[str, str | None]:
    versions = {}
    for package in ("torch", "transformers", "local-attention"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def environment() -> dict:
    """The machine and the software that were measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _cell(direction: dict | None) -> str:
    if direction is None:
        return f"{'':>30}"
    if "median_ms" not in direction:
        return f"{direction['status'].split(':')[0][:28]:>30}"
    median, low = direction["median_ms"], direction["min_ms"]
    share, ratio = 100 * direction["share_of_limit"], direction.get("times_ours")
    times = f"{ratio:6.2f}x" if ratio else " " * 7
    return f"{median:9.1f} {low:8.1f} {share:3.0f}% {times}"


def table(report: dict) -> str:
    """The results as text."""
    limits, env, run = report["limits"], report["environment"], report["settings"]
    lines = [
        f"{env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}, "
        f"{run['dtype']}, commit {env['commit']}, {env['date']}",
        f"limits: matrix products {limits['gemm'] / 1e9:.0f} GFLOP/s, exp in cache "
        f"{limits['exp'] / 1e9:.1f} G/s, copy {limits['copy'] / 1e9:.1f} GB/s",
        "median and least milliseconds, share of the limit, time as a multiple of ours",
    ]
    head = "".join(f"{TITLES[direction]:>32}" for direction in DIRECTIONS)
    for case, entry in report["cases"].items():
        lines += ["", f"{case:<26}{head}   ({entry['pairs']} pairs a head)"]
        for peer, found in entry["peers"].items():
            cells = "".join(f"  {_cell(found.get(direction))}" for direction in DIRECTIONS)
            lines.append(f"  {peer:<24}{cells}")
        cells = "".join(f"  {1e3 * entry['limit'][d]:9.1f}{'':21}" for d in DIRECTIONS)
        lines.append(f"  {'limit':<24}{cells}".rstrip())
    if report["ratios"]:
        lines += ["", "cost of dilation and of global tokens (time of the first / of the second)"]
    for name, peers in report["ratios"].items():
        for peer, found in peers.items():
            cells = "".join(f"{TITLES[d]} {found[d]:.2f}  " for d in DIRECTIONS if d in found)
            lines.append(f"  {name:<36} {peer:<18} {cells}".rstrip())
    return "\n".join(lines + _memory_lines(report.get("memory", [])) + _token_lines(report)) + "\n"


def _memory_lines(memory: list[dict]) -> list[str]:
    lines = ["", "extra peak memory, forward + backward"] if memory else []
    for entry in memory:
        if "error" in entry:
            lines.append(f"  {entry['case']:<22}{entry['peer']:<20}{entry['error']}")
            continue
        lines.append(
            f"  {entry['case']:<22}{entry['peer']:<20}{entry['extra_bytes'] / 2**20:9.1f} MiB, "
            f"{entry['extra_percent']:.1f}% of inputs, output and gradients "
            f"({entry['needed_bytes'] / 2**20:.0f} MiB)"
        )
    return lines


def _token_lines(report: dict) -> list[str]:
    found = report["time_per_token"]
    lines = ["", "time per token of ours, as a multiple of the shortest length"] if found else []
    for name, ratios in found.items():
        cells = "  ".join(f"{TITLES[d]} {ratio:.3f}" for d, ratio in ratios.items())
        lines.append(f"  {name:<36} {cells}")
    return lines


def _chart(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    peers = list(dict.fromkeys(peer for entry in cases.values() for peer in entry["peers"]))
    colors = ["#c1272d", *(plt.get_cmap("tab20c")(i) for i in (0, 1, 4, 8, 9, 12, 16, 17, 18))]
    width = 0.86 / max(1, len(peers))
    size = (max(8.0, 2.2 + 2.0 * len(cases)), 8.5)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for p, peer in enumerate(peers):
            for c, entry in enumerate(cases.values()):
                found = entry["peers"].get(peer, {}).get(direction, {})
                if "median_ms" not in found:
                    continue
                x, median = c + (p - (len(peers) - 1) / 2) * width, found["median_ms"]
                spread = [[median - found["min_ms"]], [found["max_ms"] - median]]
                panel.bar(x, median, width, color=colors[p % len(colors)])
                panel.errorbar(x, median, spread, color="#444444", linewidth=0.7, capsize=1.5)
                text = f"{median:.0f}" if median >= 10 else f"{median:.1f}"
                panel.text(x, found["max_ms"] * 1.06, text, ha="center", fontsize=6)
        for c, entry in enumerate(cases.values()):
            limit = 1e3 * entry["limit"][direction]
            panel.hlines(limit, c - 0.45, c + 0.45, color="black", linestyle="--", linewidth=1.2)
        panel.set_yscale("log")
        panel.margins(y=0.12)
        panel.set_ylabel("milliseconds")
        panel.set_title(TITLES[direction])
        panel.grid(axis="y", which="major", alpha=0.3)
        panel.set_axisbelow(True)
    panels[1].set_xticks(range(len(cases)), cases)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=colors[p % len(colors)]) for p in range(len(peers))
    ]
    handles.append(plt.Line2D([], [], color="black", linestyle="--"))
    labels = [*peers, "limit: products, then exp"]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    env, run = report["environment"], report["settings"]
    figure.suptitle(
        f"Batch {run['batch']}, {run['heads']} heads of {run['head_dim']}, {run['dtype']}: medians "
        f"and ranges\n{env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def write(report: dict, path: Path) -> str:
    """Writes `path` (JSON) with a table and a chart beside it, and gives the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    path.with_suffix(".txt").write_text(text)
    _chart(report, path.with_suffix(".png"))
    return text
