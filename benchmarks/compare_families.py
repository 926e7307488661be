"""The methods beyond fixed patterns, beside the packages that they are known from.

Forward, and forward with backward, of attention over given heads, without projections: Performer
and linear attention, Reformer's chunks, Routing's clusters, Linformer, Nyströmformer, the k largest
logits. All run interleaved, and medians are compared. Packages that are missing are left out:

    pip install performer-pytorch reformer-pytorch routing-transformer linformer nystrom-attention
    python benchmarks/compare_families.py --threads 1         # about 5 minutes
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import report
import torch
from families import OURS, Call, clustered, linear, low_rank, selection
from plotting import pyplot
from timing import Samples, interleave

FAMILIES = {
    family.__name__.split(".")[-1]: family for family in (linear, clustered, low_rank, selection)
}
Task = tuple[str, str, str]  # case, direction, by whom


def run(call: Call, backward: bool) -> None:
    """One step, with the gradients of all leaves or without any."""
    compute, leaves = call
    with torch.set_grad_enabled(backward):
        output = compute()
    if backward:
        torch.autograd.grad(output, leaves, torch.ones_like(output))


def make_tasks(args: argparse.Namespace) -> dict[Task, Callable[[], object]]:
    """Everything that is timed."""
    torch.manual_seed(args.seed)
    return {
        (case, direction, who): partial(run, call, direction != "forward")
        for family in args.families
        for case, calls in FAMILIES[family].calls(args).items()
        for who, call in calls.items()
        for direction in report.DIRECTIONS
    }


def summarize(times: dict[Task, Samples]) -> dict:
    """By case, direction and who computes it; beside the times how many times ours they take."""
    found: dict = {}
    for (case, direction, who), samples in times.items():
        ratio = samples.median / times[case, direction, OURS].median
        entry = found.setdefault(case, {}).setdefault(direction, {})
        entry[who] = samples.summary() | {"ratio": ratio}
    return found


def print_table(found: dict) -> None:
    """Milliseconds and ratios."""
    for case, directions in found.items():
        for direction, by_whom in directions.items():
            for who, entry in by_whom.items():
                print(
                    f"{case:26} {report.TITLES[direction]:20} {who:20} "
                    f"{entry['median_ms']:8.1f} ms {entry['ratio']:6.2f} x"
                )


def draw(found: dict, title: str, path: Path) -> None:
    """How many times our time the others take, a bar for each."""
    plt = pyplot()
    rows = [
        (f"{case}: {who}", [found[case][d][who]["ratio"] for d in report.DIRECTIONS])
        for case, directions in reversed(found.items())
        for who in directions[report.DIRECTIONS[0]]
        if who != OURS
    ]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    for i, direction in enumerate(report.DIRECTIONS):
        places = [row + 0.2 - 0.4 * i for row in range(len(rows))]
        bars = axes.barh(
            places, [r[i] for _, r in rows], 0.38, label=report.TITLES[direction],
            color=("#e8a3a6", "#c1272d")[i],
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as long as sparse_attn", title=title)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    for name, default, meaning in (
        ("batch", 1, "examples"),
        ("heads", 8, "attention heads"),
        ("length", 4096, "tokens"),
        ("head-dim", 64, "channels of a head"),
        ("chunk", 64, "tokens of Reformer's chunks"),
        ("window", 128, "tokens of a cluster"),
        ("mixtures", 256, "Linformer's keys, Nyströmformer's landmarks"),
        ("rounds", 6, "turns in which all are timed"),
        ("threads", torch.get_num_threads(), "CPU threads"),
        ("seed", 0, "of all numbers"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    add("--k", type=int, nargs="+", default=[16, 64], help="keys of a query (default: 16 64)")
    add("--seconds", type=float, default=4.0, help="spent on each (default: 4)")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def main() -> None:
    """The command line."""
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    found = summarize(interleave(make_tasks(args), args.rounds, args.seconds, args.seed))
    print_table(found)
    result = {
        "environment": report.environment(),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "times": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"families_{args.threads}_threads_{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    title = f"{args.length} tokens, {args.heads} heads of {args.head_dim}, {args.threads} threads"
    draw(found, title, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
