"""The longest sequence that trains within a budget of memory, and within one of time.

A step is one forward and backward of attention over one head. It runs in a process of its own,
whose peak of resident memory beyond its libraries is the memory of the step: inputs, output,
gradients and all that is between. Lengths double until neither budget holds, then the interval is
halved; there are sixteen lengths from a power of two to the next. What was measured is written at
once, and a run that was broken off goes on from there (--fresh begins again).

The time is the least of three steps. A step that takes longer than --patience is broken off: dense
attention without a mask needs little memory and would take hours to fill it. A window's memory
grows as heads · length, that of materialized attention as heads · length²: the ratio of their
lengths grows with the budget, as the root of budget over heads.

    python benchmarks/longest_sequence.py                       # about 10 minutes
    python benchmarks/longest_sequence.py --memory 4 --time 5   # GiB, seconds
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import report
import torch
from growth import chart
from growth.child import Worker
from growth.methods import METHODS
from tqdm import tqdm

NAMES = (
    "window",
    "dilated",
    "BigBird",
    "strided, l = √N",
    "LSH, chunks",
    "linear",
    "dense, SDPA",
    "dense, SDPA with a mask",
    "dense, materialized",
)
DENSE, TARGET = "dense, materialized", 30.0
STEPS = 16  # lengths from a power of two to the next
FIRST = 10 * STEPS  # 1024 tokens
# A step may allocate so many times the budget of memory before it is broken off.
CEILING = 4


def tokens(index: int) -> int:
    """The length number `index`: a multiple of 64, sixteen to a doubling."""
    return round(2 ** (index / STEPS) / 64) * 64


class Lengths:
    """The measurements of one method, made when asked for and kept in the file."""

    def __init__(self, name: str, args: argparse.Namespace, known: dict, save: Callable):
        self._known, self._save = known, save
        self._patience, self._limit = 1.5 * args.time, args.patience
        ceiling = int(CEILING * args.memory * 2**30)
        self._worker = Worker(name, 1, args.threads, args.seed, ceiling)

    def __enter__(self) -> Lengths:
        self._worker.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.__exit__(*error)

    def at(self, index: int) -> dict:
        """Peak bytes and seconds of a step, or an error."""
        n = tokens(index)
        if str(n) not in self._known:
            self._known[str(n)] = self._worker.measure(n, True, 2, self._patience, self._limit)
            self._save()
        return self._known[str(n)]


def longest(lengths: Lengths, fits: Callable[[dict], bool], shown: tqdm) -> int:
    """The largest index whose measurement fits; all below it are taken to fit as well."""

    def holds(index: int) -> bool:
        shown.set_postfix_str(f"{tokens(index)} tokens")
        return fits(lengths.at(index))

    low, high = FIRST - STEPS, FIRST
    while holds(high):
        low, high = high, high + STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def budgets(args: argparse.Namespace) -> dict[str, tuple[str, Callable[[dict], bool]]]:
    """What each budget is and whether a measurement is within it."""
    bound = args.memory * 2**30
    return {
        "memory": (f"within {args.memory:g} GiB", lambda m: m.get("peak", bound + 1) <= bound),
        "time": (
            f"within {args.time:g} s a step",
            lambda m: m.get("seconds", args.time + 1) <= args.time,
        ),
    }


def search(args: argparse.Namespace, measured: dict, save: Callable) -> dict:
    """The longest sequences of every method."""
    found: dict = {}
    with tqdm(total=2 * len(args.methods), unit="search") as shown:
        for name in args.methods:
            shown.set_description(name)
            found[name] = {}
            with Lengths(name, args, measured.setdefault(name, {}), save) as lengths:
                for budget, (_, fits) in budgets(args).items():
                    index = longest(lengths, fits, shown)
                    # Broken off for the other one: this budget might have held.
                    other = {"memory": "out of time", "time": "out of memory"}[budget]
                    limited = lengths.at(index + 1).get("error") == other
                    found[name][budget] = {"length": tokens(index), "limited": limited}
                    shown.update()
    return found


def table(result: dict) -> str:
    """The lengths, as multiples of materialized attention's, and the target."""
    found, titles = result["longest"], result["budgets"]
    lines = [
        f"{'longest sequence, one head of 64':<34}" + "".join(f"{t:>28}" for t in titles.values())
    ]
    for name, entry in found.items():
        cells = ""
        for budget in titles:
            n, limited = entry[budget]["length"], entry[budget]["limited"]
            dense = found.get(DENSE, {}).get(budget, {}).get("length")
            ratio = f"({n / dense:5.1f} x)" if dense else ""
            cells += f"{('>= ' if limited else '') + str(n):>18} {ratio:>9}"
        lines.append(f"{name:<34}{cells}")
    if {DENSE, "window"} <= found.keys():
        ratio = found["window"]["memory"]["length"] / found[DENSE]["memory"]["length"]
        word = "reached" if ratio >= TARGET else "MISSED"
        lines.append(f"a window by memory: {ratio:.1f} x, at least {TARGET:g} x wanted: {word}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(NAMES), metavar="NAME",
        help=f"of {', '.join(METHODS)}")  # fmt: skip
    add("--memory", type=float, default=1.0, help="GiB of a step (1)")
    add("--time", type=float, default=2.0, help="seconds of a step (2)")
    add("--patience", type=float, default=30.0, help="seconds until a step is broken off (30)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--fresh", action="store_true", help="forget what an earlier run measured")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "longest_sequence.json",
        help="JSON; a chart is written beside it")  # fmt: skip
    return parser.parse_args()


def earlier(path: Path, settings: dict) -> dict:
    """The measurements of an earlier run of the same code with the same settings."""
    if not path.exists():
        return {}
    written = json.loads(path.read_text())
    return written["measured"] if written["settings"] == settings else {}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    environment = report.environment()
    settings = {"heads": 1, "head_dim": 64, **{key: environment[key] for key in ("cpu", "commit")}}
    settings |= {
        key: getattr(args, key) for key in ("memory", "time", "patience", "threads", "seed")
    }
    result: dict = {
        "environment": environment,
        "settings": settings,
        "budgets": {budget: title for budget, (title, _) in budgets(args).items()},
        "measured": {} if args.fresh else earlier(args.out, settings),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    result["longest"] = search(args, result["measured"], save)
    save()
    chart.draw_longest(result, args.out.with_suffix(".png"))
    print(table(result))
    print(f"wrote {args.out} and, beside it, the chart")


if __name__ == "__main__":
    main()
