"""What the machine can do at best: matrix products, exponentials in cache, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timing import Samples

GEMM_SIZE = 2048
EXPS_PER_TASK = 2**22
# In and out of 64 KiB to 1 MiB; which is fastest differs between machines, so the best one counts.
EXP_SIZES = tuple(2**p for p in range(13, 18))
COPY_BYTES = 2**28


@dataclass(frozen=True)
class Probe:
    """A task and the work in one call of it."""

    kind: str
    work: float
    task: Callable[[], object]


def _gemm(dtype: torch.dtype) -> Probe:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Probe("gemm", 2.0 * GEMM_SIZE**3, lambda: torch.mm(a, b, out=out))


def _exp(dtype: torch.dtype, size: int) -> Probe:
    """One thread's rate times the threads.

    At sizes that stay in cache a call takes microseconds, and on a busy machine waiting for the
    other threads at the end of each call was measured to take 99 % of the time.
    """
    threads = torch.get_num_threads()
    x = -torch.rand(size, dtype=dtype)
    out = torch.empty_like(x)
    repeats = EXPS_PER_TASK // size

    def task() -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(repeats):
                torch.exp(x, out=out)
        finally:
            torch.set_num_threads(threads)

    return Probe("exp", float(size * repeats * threads), task)


def _copy() -> Probe:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    return Probe("copy", 2.0 * COPY_BYTES, lambda: target.copy_(source))


def probes(dtype: torch.dtype) -> dict[str, Probe]:
    """The tasks whose rates are the limits, by name.

    Half types accumulate in float32 and may be widened to it: the better product rate counts.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = {f"gemm {kind}": _gemm(kind) for kind in {dtype: 0, wide: 0}}
    found |= {f"exp {size}": _exp(wide, size) for size in EXP_SIZES}
    return found | {"copy": _copy()}


@dataclass(frozen=True)
class Limits:
    """Rates in FLOP/s, exp/s and bytes/s (read and written)."""

    gemm: float
    exp: float
    copy: float

    @classmethod
    def from_samples(cls, found: Mapping[str, Probe], times: Mapping[str, Samples]) -> Limits:
        """The best median rate of each kind."""
        best: dict[str, float] = {}
        for name, probe in found.items():
            best[probe.kind] = max(best.get(probe.kind, 0.0), probe.work / times[name].median)
        return cls(**best)

    def seconds(self, pairs: int, head_dim: int, backward: bool) -> float:
        """The least time for `pairs` over all heads: products, then exponentials.

        Forward is two products (4 FLOPs a pair and element) and an exponential a pair, backward
        five products (10) and an exponential.
        """
        flops, exps = (14, 2) if backward else (4, 1)
        return flops * pairs * head_dim / self.gemm + exps * pairs / self.exp
