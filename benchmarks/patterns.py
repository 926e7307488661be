"""What each pattern costs: work beyond its own pairs, plans, and time beside dense attention.

    python benchmarks/patterns.py            # overheads and plans of every pattern, about a minute
    python benchmarks/patterns.py --time     # also time beside SDPA with the same mask

Overhead is the work visited divided by the pairs needed, for tiles of 64 x 64, for tiles of 32 x
32, and for the plan that runs, which may have other tiles or put single keys into lists.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import time
from pathlib import Path

import report
import torch
from timing import interleave
from tqdm import tqdm
from workload import make_inputs

import sparse_attn
from sparse_attn import (
    BigBird,
    Checkerboard,
    Fixed,
    Global,
    LocalBlocks,
    Pattern,
    Radial,
    RandomBlocks,
    RandomTokens,
    Strided,
    Window,
)

LONG = 2**20
QUADRATIC = (Checkerboard, RandomTokens)  # not planned for a million tokens


def patterns(n: int) -> list[Pattern]:
    """Every pattern at the parameters that its paper or its users take."""
    return [
        Window(256),
        Window(128, dilation=2),
        Window(128, dilation=4),
        Window(128, dilation=8),
        Window(256) | Global(range(16)),
        Window(256) | Global(range(0, n, n // 16)),
        Strided(128),
        Fixed(128, 8),
        LocalBlocks(256),
        LocalBlocks(100),
        RandomBlocks(3, 64),
        BigBird(64),
        Radial(512),
        Radial(1),
        Checkerboard(1),
        Checkerboard(64),
        RandomTokens(0.05),
        Window(64) | RandomTokens(0.01) | Global([0]),
    ]


def label(pattern: Pattern) -> str:
    """The expression, with long lists of tokens cut."""
    return re.sub(r"\[(-?\d+), (-?\d+)(, -?\d+){2,}\]", r"[\1, \2, ...]", repr(pattern))


def describe(pattern: Pattern, n: int) -> dict:
    """Overheads and the plan at one length."""
    sparse_attn.clear_plan_cache()
    start = time.perf_counter()
    cost = pattern.cost(n)
    seconds = time.perf_counter() - start
    tiles = re.search(r"tiles (\d+ x \d+)", pattern.plan(n))
    return {
        "keys_per_query": cost.pairs / n,
        "overhead_64": pattern.cost(n, tile=(64, 64)).overhead,
        "overhead_32": pattern.cost(n, tile=(32, 32)).overhead,
        "overhead": cost.overhead,
        "tiles": tiles.group(1),
        "lists": "lists of" in pattern.plan(n),
        "plan_ms": 1e3 * seconds,
        "plan_mib": sparse_attn.plan_info(pattern, n)["bytes"] / 2**20,
    }


def describe_long(pattern: Pattern) -> dict:
    """The plan of a million tokens."""
    sparse_attn.clear_plan_cache()
    start = time.perf_counter()
    size = sparse_attn.plan_info(pattern, LONG)["bytes"]
    return {"plan_ms": 1e3 * (time.perf_counter() - start), "plan_mib": size / 2**20}


def timed_tasks(pattern: Pattern, inputs: tuple[torch.Tensor, ...]) -> dict:
    """Forward, and forward + backward, ours and dense attention with the same mask."""
    query, key, value, grad = inputs
    mask = pattern.mask(query.shape[2])
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return sparse_attn.attention(*tensors, pattern)

    def dense(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)

    tasks = {}
    for name, function in (("ours", ours), ("sdpa_mask", dense)):
        error = (function(query, key, value) - dense(query, key, value)).abs().max().item()
        if error > 1e-4:
            raise AssertionError(f"{label(pattern)}: {name} differs by {error:.1e}")
        tasks[name, "forward"] = lambda f=function: f(query, key, value)
        tasks[name, "forward_backward"] = lambda f=function: torch.autograd.grad(
            f(*leaves), leaves, grad
        )
    return tasks


def add_times(found: dict[str, dict], args: argparse.Namespace) -> None:
    """Times of ours and of dense attention, all patterns taking turns."""
    inputs = make_inputs(args.timed_length, 8, torch.float32, args.seed)
    tasks = {
        (label(pattern), *key): task
        for pattern in patterns(args.timed_length)
        for key, task in timed_tasks(pattern, inputs).items()
    }
    samples = interleave(tasks, args.rounds, args.seconds, args.seed)
    for (name, peer, direction), sample in samples.items():
        found.setdefault(name, {}).setdefault("times", {}).setdefault(direction, {})[peer] = (
            sample.summary()
        )


def table(results: dict) -> str:
    """The results as a Markdown table."""
    n = results["length"]
    head = ["pattern", "keys a query", "64 × 64", "32 × 32", "plan that runs", "tiles", "plan, ms"]
    rows = [[*head, f"plan of {LONG}: ms / MiB"]]
    rows.append(["---"] * len(rows[0]))
    timed = results["timed_length"]
    for name, found in results["patterns"].items():
        if "overhead" not in found:
            continue
        tiles = found["tiles"].replace("x", "×") + (", lists" if found["lists"] else "")
        long = found.get("long")
        rows.append([
            f"`{name.replace('|', chr(92) + '|')}`",
            f"{found['keys_per_query']:.0f}",
            *(f"{found[key]:.2f}" for key in ("overhead_64", "overhead_32")),
            f"**{found['overhead']:.2f}**",
            tiles,
            f"{found['plan_ms']:.1f}",
            f"{long['plan_ms']:.0f} / {long['plan_mib']:.1f}" if long else "–",
        ])  # fmt: skip
    text = f"Overhead at {n} tokens:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    times = {
        name: found["times"] for name, found in results["patterns"].items() if "times" in found
    }
    if not times:
        return text + "\n"
    rows = [["pattern", "forward, ms", "dense ÷ ours", "forward + backward, ms", "dense ÷ ours"]]
    rows.append(["---"] * len(rows[0]))
    for name, directions in times.items():
        cells = []
        for direction in ("forward", "forward_backward"):
            ours, dense = (directions[direction][p]["median_ms"] for p in ("ours", "sdpa_mask"))
            cells += [f"{ours:.1f}", f"{dense / ours:.1f}"]
        rows.append([f"`{name.replace('|', chr(92) + '|')}`", *cells])
    heading = f"\n\nTime at {timed} tokens, 8 heads of 64, float32:\n\n"
    return text + heading + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=16384, help="of the overheads")
    parser.add_argument("--time", action="store_true", help="also time every pattern")
    parser.add_argument("--timed-length", type=int, default=4096, metavar="N")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.5, help="on each task")
    parser.add_argument("--seed", type=int, default=0)
    name = f"patterns_{datetime.date.today().isoformat()}.json"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / name)
    args = parser.parse_args()

    found: dict[str, dict] = {}
    for pattern in tqdm(patterns(args.length), desc="plans", unit="pattern"):
        entry = describe(pattern, args.length)
        if not isinstance(pattern, QUADRATIC) and "RandomTokens" not in repr(pattern):
            entry["long"] = describe_long(pattern)
        found[label(pattern)] = entry
    if args.time:
        add_times(found, args)
    results = {
        "environment": report.environment(),
        "length": args.length,
        "timed_length": args.timed_length,
        "patterns": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
