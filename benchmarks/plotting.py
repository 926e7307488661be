"""matplotlib as the benchmarks use it: loaded when a chart is drawn, and without a display."""

from __future__ import annotations


def pyplot():
    """The module."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
