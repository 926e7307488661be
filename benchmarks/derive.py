"""What the rows of a CPU result say together: growth, costs of features, threads."""

from __future__ import annotations

import re
from collections import defaultdict

from growth.fit import exponent
from record import PROBLEM

#: Cases and what they are compared with.
PAIRS = {
    "dilated2": "window128",
    "dilated4": "window128",
    "dilated8": "window128",
    "window256_global16": "window256",
    "window256_spread16": "window256",
    "causal256": "window256",
    "half_padded256": "window256",
}
LEAST_POINTS = 3


def growth(rows: list[dict]) -> list[dict]:
    """The exponent of each time in the length, and that of windows in their reach."""
    lines: dict = defaultdict(dict)
    for row in rows:
        if "median_ms" not in row:
            continue
        same = {key: row[key] for key in ("head_dim", "heads", "dtype", "threads", "peer")}
        same["direction"] = row["direction"]
        over_n = {"variable": "length", "case": row["case"]} | same
        lines[tuple(over_n.items())][row["length"]] = row["median_ms"]
        if reach := re.fullmatch(r"window(\d+)", row["case"]):
            over_w = {"variable": "reach", "length": row["length"]} | same
            lines[tuple(over_w.items())][int(reach[1])] = row["median_ms"]
    return [
        dict(line)
        | {
            "from": min(points),
            "to": max(points),
            "exponent": exponent(list(points), list(points.values())),
        }
        for line, points in lines.items()
        if len(points) >= LEAST_POINTS
    ]


def _pairs_of(rows: list[dict], **change: object):
    """Rows with the row that differs from them by `change` alone."""
    fields = (*PROBLEM, "peer", "direction")
    known = {tuple(row[name] for name in fields): row for row in rows if "median_ms" in row}
    for row in known.values():
        other = known.get(tuple((row | change)[name] for name in fields))
        if other and other is not row:
            yield row, other


def costs(rows: list[dict]) -> list[dict]:
    """Time with what a case has beside the plain window as a multiple of that of the window."""
    found = []
    for case, plain in PAIRS.items():
        for row, other in _pairs_of([r for r in rows if r["case"] in (case, plain)], case=plain):
            entry = {key: row[key] for key in (*PROBLEM, "peer", "direction")}
            found.append(entry | {"of": plain, "ratio": row["median_ms"] / other["median_ms"]})
    return found


def speed_up(rows: list[dict]) -> list[dict]:
    """The time on one thread as a multiple of that on several."""
    found = []
    for row, one in _pairs_of(rows, threads=1):
        entry = {key: row[key] for key in (*PROBLEM, "peer", "direction")}
        found.append(entry | {"speed_up": one["median_ms"] / row["median_ms"]})
    return found


def everything(rows: list[dict]) -> dict:
    """All of it, by name."""
    return {"growth": growth(rows), "costs": costs(rows), "speed_up": speed_up(rows)}
