"""What the machine can do at best: matrix products, exponentials in cache, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from timing import Samples

GEMM_SIZE = 2048
EXPS_PER_TASK = 2**22
# In and out of 64 KiB to 1 MiB; which is fastest differs between machines, so the best one counts.
EXP_SIZES = tuple(2**p for p in range(13, 18))
COPY_BYTES = 2**28

Name = tuple[str, str, int]  # kind, data type or size, threads


@dataclass(frozen=True)
class Probe:
    """A task and the work in one call of it."""

    work: float
    task: Callable[[], object]


def _gemm(dtype: torch.dtype) -> Probe:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Probe(2.0 * GEMM_SIZE**3, lambda: torch.mm(a, b, out=out))


def _exp(size: int) -> Probe:
    x = -torch.rand(size)
    out = torch.empty_like(x)
    repeats = EXPS_PER_TASK // size

    def task() -> None:
        for _ in range(repeats):
            torch.exp(x, out=out)

    return Probe(float(size * repeats), task)


def _copy() -> Probe:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    return Probe(2.0 * COPY_BYTES, lambda: target.copy_(source))


def probes(dtypes: Iterable[str], threads: Iterable[int]) -> dict[Name, Probe]:
    """The tasks whose rates are the limits, by kind, data type or size, and threads.

    Exponentials are counted by one thread: at sizes that stay in cache a call takes microseconds,
    and on a busy machine waiting for the other threads at the end of each call was measured to
    take 99 % of the time.
    """
    threads = list(threads)
    gemms = {dtype: _gemm(getattr(torch, dtype)) for dtype in dict.fromkeys(("float32", *dtypes))}
    found = {("gemm", dtype, n): probe for dtype, probe in gemms.items() for n in threads}
    found |= {("exp", str(size), 1): _exp(size) for size in EXP_SIZES}
    return found | {("copy", "float32", max(threads)): _copy()}


@dataclass(frozen=True)
class Limits:
    """Rates in FLOP/s, exp/s and bytes/s (read and written)."""

    gemm: float
    exp: float
    copy: float

    @classmethod
    def of(cls, rates: Mapping[Name, float], dtype: str, threads: int) -> Limits:
        """The limits for a data type and a number of threads.

        Half types accumulate in float32 and may be widened to it: the better product rate counts.
        """
        gemm = max(rates["gemm", kind, threads] for kind in {dtype, "float32"})
        exp = threads * max(rate for (kind, *_), rate in rates.items() if kind == "exp")
        copy = max(rate for (kind, *_), rate in rates.items() if kind == "copy")
        return cls(gemm, exp, copy)

    def seconds(self, pairs: int, head_dim: int, backward: bool) -> float:
        """The least time for `pairs` over all heads: products, then exponentials.

        Forward is two products (4 FLOPs a pair and element) and an exponential a pair, backward
        five products (10) and an exponential.
        """
        flops, exps = (14, 2) if backward else (4, 1)
        return flops * pairs * head_dim / self.gemm + exps * pairs / self.exp


def rates(found: Mapping[Name, Probe], times: Mapping[Name, Samples]) -> dict[Name, float]:
    """The median rate of each probe."""
    return {name: probe.work / times[name].median for name, probe in found.items()}
