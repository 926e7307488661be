"""Whether this library got slower between two results of `cpu_attention.py`.

    python benchmarks/compare.py OLD.json NEW.json              # relative to the limit of each run
    python benchmarks/compare.py OLD.json NEW.json --by chunk_loop_tuned --allow 5

Milliseconds of two runs say little: machines differ, and neighbors slow one run more than another.
What is compared is the time as a multiple of the limit, which both runs measured in the same
rounds as the kernels and which every entry has; or, by a peer, as a multiple of its time, which
also follows what slows kernels but not matrix products, such as a lack of memory bandwidth.

Exit status: 0 if nothing got more than ALLOW % worse, 1 if something did, 2 if the files do not
match.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from record import OURS, PROBLEM, TITLES

IDENTITY = (*PROBLEM, "direction")
LIMIT = "limit"


class Mismatch(Exception):
    """The files cannot be compared; the message says why."""


def read(path: Path) -> dict:
    """A result of `cpu_attention.py`."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mismatch(f"{path}: {error}") from error
    rows = result.get("results") if isinstance(result, dict) else None
    if not isinstance(rows, list) or not rows or not all(set(IDENTITY) <= set(r) for r in rows):
        raise Mismatch(f"{path}: expected a result of cpu_attention.py")
    return result


def multiples(result: dict, by: str) -> dict[tuple, float]:
    """Our times as multiples of the limit or of a peer's times, by what was measured."""
    times: dict = {}
    for row in result["results"]:
        if "median_ms" in row:
            key = tuple(row[name] for name in IDENTITY)
            times.setdefault(row["peer"], {})[key] = row["median_ms"]
            times.setdefault(LIMIT, {})[key] = row["limit_ms"]
    ours, base = times.get(OURS, {}), times.get(by, {})
    return {key: ours[key] / base[key] for key in ours if key in base}


def compare(old: dict, new: dict, by: str = LIMIT) -> dict[tuple, tuple[float, float, float]]:
    """Old multiple, new multiple and change in percent of every common entry."""
    before, after = multiples(old, by), multiples(new, by)
    common = [key for key in before if key in after]
    if not common:
        raise Mismatch(f"the files have no common entry with {OURS} and {by}")
    return {key: (before[key], after[key], 100 * (after[key] / before[key] - 1)) for key in common}


def table(found: dict, allow: float) -> str:
    """The comparison as text, the worst last."""
    head = f"{'case':<22}{'N':>7}{'D':>5}{'H':>4} {'type':<10}{'thr':>4} {'':<19}"
    lines = [head + f"{'old':>8}{'new':>8}{'change':>9}"]
    for key, (before, after, change) in sorted(found.items(), key=lambda item: item[1][2]):
        case, length, head_dim, heads, dtype, threads, direction = key
        lines.append(
            f"{case:<22}{length:>7}{head_dim:>5}{heads:>4} {dtype:<10}{threads:>4} "
            f"{TITLES[direction]:<19}{before:8.3f}{after:8.3f}{change:+8.1f}%"
            + ("  worse" if change > allow else "")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--allow", type=float, default=10.0, help="percent (%(default)s)")
    parser.add_argument("--by", default=LIMIT, metavar="PEER", help="instead of the limit")
    args = parser.parse_args()
    try:
        old, new = read(args.old), read(args.new)
        found = compare(old, new, args.by)
    except Mismatch as error:
        print(error, file=sys.stderr)
        return 2
    print(f"our time as a multiple of {'the limit' if args.by == LIMIT else args.by}")
    print(table(found, args.allow))
    names = [result.get("environment", {}).get("cpu") for result in (old, new)]
    if names[0] != names[1]:
        print(f"other machines: {names[0]}, then {names[1]}")
    worse = sum(change > args.allow for *_, change in found.values())
    left = len(multiples(old, args.by)) - len(found), len(multiples(new, args.by)) - len(found)
    print(f"{len(found)} compared, {worse} more than {args.allow:g} % worse", end="; ")
    print(f"only in the old file: {left[0]}, only in the new one: {left[1]}")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
