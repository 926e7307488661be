"""Exponents of measured growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the line through log y over log x with the least squares."""
    logs = ([math.log(value) for value in values] for values in (x, y))
    return statistics.linear_regression(*logs).slope


def n_log_n(lengths: Sequence[int]) -> float:
    """The slope that n · log n has over these lengths: a little above 1."""
    return exponent(lengths, [n * math.log(n) for n in lengths])
