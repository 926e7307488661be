"""What the CPU kernels are meant to reach, as data, and which of it a result reaches.

Shares, multiples of peers' times and costs are those of one run. A target that a run does not have
the entries for is not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from record import DIRECTIONS, LOOPS, OURS

#: The entries that targets are about, where they do not say otherwise.
USUAL = {"length": 4096, "head_dim": 64, "heads": 8, "dtype": "float32"}


class Rows:
    """The rows of a result, found by their fields; the most threads unless asked otherwise."""

    def __init__(self, rows: list[dict]) -> None:
        self._rows = rows
        self.most_threads = max((row["threads"] for row in rows), default=0)

    def find(self, **fields: object) -> dict | None:
        """The row with these fields and those that are usual, if it was measured."""
        wanted = USUAL | {"threads": self.most_threads, "peer": OURS} | fields
        for row in self._rows:
            if "median_ms" in row and all(row[key] == value for key, value in wanted.items()):
                return row
        return None


Measure = Callable[[Rows, str], "float | None"]


@dataclass(frozen=True)
class Target:
    """At least (or at most) `wanted`, for each direction that has one."""

    what: str
    measure: Measure
    wanted: tuple[float | None, float | None]
    at_most: bool = False
    unit: str = "×"  # or %

    def reached(self, value: float, wanted: float) -> bool:
        """Whether a measured value is good enough."""
        return value <= wanted if self.at_most else value >= wanted


def _share(case: str, of: str = "limit", **fields: object) -> Measure:
    def measure(rows: Rows, direction: str) -> float | None:
        row = rows.find(case=case, direction=direction, **fields)
        return row and 100 * row[f"share_of_{of}"]

    return measure


def _against(*peers: str, **fields: object) -> Measure:
    """The time of the best of these peers as a multiple of ours."""

    def measure(rows: Rows, direction: str) -> float | None:
        wanted = {"case": "window256", "direction": direction} | fields
        found = [rows.find(peer=peer, **wanted) for peer in peers]
        return min((row["times_ours"] for row in found if row), default=None)

    return measure


def _cost(case: str, plain: str, **fields: object) -> Measure:
    """Our time for a case as a multiple of that for another."""

    def measure(rows: Rows, direction: str) -> float | None:
        a, b = (rows.find(case=name, direction=direction, **fields) for name in (case, plain))
        return a["median_ms"] / b["median_ms"] if a and b else None

    return measure


def _speed_up(**fields: object) -> Measure:
    """Our time on one thread as a multiple of that on all."""

    def measure(rows: Rows, direction: str) -> float | None:
        if rows.most_threads == 1:
            return None
        one = rows.find(direction=direction, threads=1, **fields)
        every = rows.find(direction=direction, **fields)
        return one["median_ms"] / every["median_ms"] if one and every else None

    return measure


STEPS = (2, 4, 8)
HALF = ("bfloat16", "float16")
TARGETS = (
    Target("share of the limit, window ±256", _share("window256"), (75, 68), unit="%"),
    *(
        Target(f"share of the limit, dilation {d}", _share(f"dilated{d}"), (70, 62), unit="%")
        for d in STEPS
    ),
    *(
        Target(
            f"share of the float32 limit, {dtype}",
            _share("window256", "float32_limit", dtype=dtype),
            (68, 60),
            unit="%",
        )
        for dtype in HALF
    ),
    Target("the best chunk loop in stock torch", _against(*LOOPS), (1.9, 1.9)),
    Target("FlexAttention, compiled", _against("flex_attention"), (2.5, None)),
    Target("Hugging Face's Longformer", _against("longformer"), (12, 12)),
    Target("local-attention", _against("local_attention"), (6, 3.5)),
    Target("SDPA with a band mask, N 4096", _against("sdpa_mask"), (9, 6.5)),
    Target(
        "SDPA with a band mask, N 16384", _against("sdpa_mask", length=16384), (35, 35)
    ),
    *(
        Target(f"dilation {d} ÷ none", _cost(f"dilated{d}", "window128"), (1.1, 1.1), at_most=True)
        for d in STEPS
    ),
    Target(
        "16 global tokens ÷ none",
        _cost("window256_global16", "window256"),
        (1.15, 1.15),
        at_most=True,
    ),
    Target("causal ÷ both sides", _cost("causal256", "window256"), (0.6, 0.6), at_most=True),
    Target(
        "half of the tokens padding ÷ none",
        _cost("half_padded256", "window256"),
        (0.55, 0.55),
        at_most=True,
    ),
    Target(
        "all threads over one, 1 head, N 65536",
        _speed_up(case="window256", length=65536, heads=1),
        (1.8, 1.8),
    ),
)  # fmt: skip


def evaluate(results: list[dict]) -> list[dict]:
    """Each target that the rows of a result have something for, with what they say."""
    rows = Rows(results)
    found = []
    for target in TARGETS:
        for direction, wanted in zip(DIRECTIONS, target.wanted, strict=True):
            value = target.measure(rows, direction)
            if wanted is None or value is None:
                continue
            found.append({
                "target": target.what,
                "direction": direction,
                "wanted": wanted,
                "at_most": target.at_most,
                "unit": target.unit,
                "measured": value,
                "reached": target.reached(value, wanted),
            })  # fmt: skip
    return found
