"""What a run of `cpu_attention.py` writes: JSON, a table in plain text and charts.

python benchmarks/report.py FILE.json             # the table again
python benchmarks/report.py FILE.json --readme    # the tables of the README, as Markdown
python benchmarks/report.py FILE.json --charts    # draws the charts again
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import charts
import torch
from record import DIRECTIONS, LOOPS, OURS, TITLES, by_problem, name_of


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


def _cell(row: dict) -> str:
    if "median_ms" not in row:
        return f"{row['status'].split(':')[0][:46]:>46}"
    times = f"{row['times_ours']:6.2f}x" if "times_ours" in row else " " * 7
    peak = f"{row['peak_mib']:7.0f}" if "peak_mib" in row else " " * 7
    shares = f"{100 * row['share_of_limit']:5.0f}%{100 * row['share_of_float32_limit']:5.0f}%"
    return f"{row['median_ms']:9.1f}{row['min_ms']:9.1f}{shares} {times} {peak}"


def _problem_lines(peers: dict) -> list[str]:
    first = next(iter(peers.values()))
    row = first[DIRECTIONS[0]]
    heads = f"{row['heads']} heads of {row['head_dim']}, {row['threads']} threads"
    title = f"{name_of(row)}, {row['dtype']}, {heads}, {row['pairs']} pairs a head"
    lines = ["", title, " " * 20 + "".join(f"{TITLES[d]:>48}" for d in DIRECTIONS)]
    without = []
    for peer, found in peers.items():
        if all(found[d].get("status", "").startswith("none") for d in DIRECTIONS):
            without.append(peer)
            continue
        cells = "".join(f"  {_cell(found[d])}" for d in DIRECTIONS)
        lines.append(f"  {peer:<18}{cells}".rstrip())
    if without:
        lines.append(f"  none: {', '.join(without)}")
    cells = "".join(f"  {first[d]['limit_ms']:9.1f}{'':37}" for d in DIRECTIONS)
    return [*lines, f"  {'limit':<18}{cells}".rstrip()]


def _limit_line(limit: dict) -> str:
    return (
        f"limits, {limit['dtype']}, {limit['threads']} threads: matrix products "
        f"{limit['gemm'] / 1e9:.0f} GFLOP/s, exp in cache {limit['exp'] / 1e9:.1f} G/s, copy "
        f"{limit['copy'] / 1e9:.1f} GB/s"
    )


def _label(row: dict) -> str:
    """Peer, direction and what is not usual of a derived entry."""
    heads = f"{row['heads']} x {row['head_dim']}"
    usual = f"{row['dtype']}, {heads}, {row['threads']} threads"
    return f"{row['peer']:<18}{TITLES[row['direction']]:<20}{usual}"


def _derived_lines(report: dict) -> list[str]:
    lines = []
    if report["costs"]:
        lines += ["", "time as a multiple of that of the plain window"]
    for row in report["costs"]:
        lines.append(f"  {row['ratio']:5.2f}  {name_of(row) + ' / ' + row['of']:<34}{_label(row)}")
    if report["speed_up"]:
        lines += ["", "time on one thread as a multiple of that on several"]
    for row in report["speed_up"]:
        lines.append(f"  {row['speed_up']:5.2f}  {name_of(row):<34}{_label(row)}")
    if report["growth"]:
        lines += ["", "exponents of the time"]
    for row in report["growth"]:
        what = f"{row['case']} in N" if "case" in row else f"windows in w, N {row['length']}"
        what += f", {row['from']} to {row['to']}"
        lines.append(f"  {row['exponent']:5.2f}  {what:<34}{_label(row)}")
    return lines


def _wanted(found: dict) -> str:
    sign = "≤" if found["at_most"] else "≥"
    return f"{sign} {found['wanted']:g} {found['unit']}"


def _measured(found: dict) -> str:
    digits = 1 if found["unit"] == "%" else 2
    return f"{found['measured']:.{digits}f} {found['unit']}"


def _target_lines(report: dict) -> list[str]:
    lines = ["", "targets"] if report["targets"] else []
    for found in report["targets"]:
        lines.append(
            f"  {'reached' if found['reached'] else 'missed':<9}{found['target']:<42}"
            f"{TITLES[found['direction']]:<20}{_wanted(found):>10}{_measured(found):>10}"
        )
    return lines


def table(report: dict) -> str:
    """The results as text."""
    env = report["environment"]
    lines = [
        f"{env['cpu']}, torch {env['versions']['torch']}, commit {env['commit']}, {env['date']}",
        *(_limit_line(limit) for limit in report["limits"]),
        "median and least milliseconds, share of the limit and of that for float32, time as a "
        "multiple of ours, MiB at the peak beyond the inputs",
    ]
    for peers in by_problem(report["results"]).values():
        lines += _problem_lines(peers)
    return "\n".join([*lines, *_derived_lines(report), *_target_lines(report)]) + "\n"


#: Cases and peers of the README, with what they are called there.
README_CASES = {
    "window256": "window ±256",
    "window256_global16": "and 16 global tokens",
    "dilated4": "every 4th key, 257 keys",
    "causal256": "causal, 256 back",
    "bigbird64": "BigBird",
    "strided": "strided, l = 64",
}
README_PEERS = {
    OURS: "**sparse_attn**",
    LOOPS[0]: "loop over chunks of queries, stock torch",
    LOOPS[1]: "the same with its backward written by hand",
    "chunked_bmm": "all chunks at once, stock torch",
    "flex_attention": "FlexAttention, compiled",
    "local_attention": "local-attention",
    "longformer": "Hugging Face Longformer, attention alone",
    "bigbird": "Hugging Face BigBird, attention alone",
    "sdpa_mask": "SDPA with the mask",
    "sdpa_dense": "SDPA, dense",
}


def _both(found: dict | None, text: Callable[[dict], str]) -> str:
    """Forward and forward + backward in one cell."""
    cells = [text(row) if "median_ms" in row else "none" for row in (found or {}).values()]
    return "–" if set(cells) <= {"none"} else " / ".join(cells)


def _milliseconds(row: dict) -> str:
    return f"{row['median_ms']:.{1 if row['median_ms'] < 20 else 0}f}"


def readme(report: dict) -> str:
    """The tables of the README: times of the usual problem, and targets."""
    threads = max(row["threads"] for row in report["results"])
    usual = {"length": 4096, "head_dim": 64, "heads": 8, "dtype": "float32", "threads": threads}
    rows = [row for row in report["results"] if all(row[k] == v for k, v in usual.items())]
    cases = {key[0]: peers for key, peers in by_problem(rows).items() if OURS in peers}
    shown = {case: title for case, title in README_CASES.items() if case in cases}
    lines = [["forward / forward + backward, ms", *shown.values()], ["---"] * (len(shown) + 1)]
    for peer, title in README_PEERS.items():
        cells = [_both(cases[case].get(peer), _milliseconds) for case in shown]
        lines.append([title, *(f"**{c}**" if peer == OURS else c for c in cells)])
        if peer != OURS:
            continue
        for what, text in (
            ("share of the limit", lambda row: f"{100 * row['share_of_limit']:.0f} %"),
            ("MiB beyond the inputs", lambda row: f"{row.get('peak_mib', math.nan):.0f}"),
        ):
            lines.append([what, *(_both(cases[case][OURS], text) for case in shown)])
    lines = [line for line in lines if set(line[1:]) != {"–"}]
    targets: dict = {}
    for found in report["targets"]:
        cell = f"{_measured(found)} ({_wanted(found)}{'' if found['reached'] else ', missed'})"
        targets.setdefault(found["target"], {})[found["direction"]] = cell
    second = [["target", *TITLES.values()], ["---"] * 3]
    second += [[name, *(cells.get(d, "–") for d in DIRECTIONS)] for name, cells in targets.items()]
    return "\n".join([*map(_markdown, lines), "", *map(_markdown, second)]) + "\n"


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(report: dict, path: Path) -> str:
    """Writes `path` (JSON) with a table and charts beside it, and gives the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    path.with_suffix(".txt").write_text(text)
    charts.draw(report, path)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--readme", action="store_true", help="Markdown for the README")
    parser.add_argument("--charts", action="store_true", help="draws the charts beside the file")
    args = parser.parse_args()
    report = json.loads(args.file.read_text())
    print(readme(report) if args.readme else table(report), end="")
    if args.charts:
        charts.draw(report, args.file)


if __name__ == "__main__":
    main()
