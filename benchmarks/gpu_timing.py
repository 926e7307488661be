"""Times and memory of calls on a GPU, all calls taking turns; on a CPU, with its clock."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping

import torch

Call = Callable[[], object]
MOST_CALLS = 100  # in one sample
LONGEST_SLEEP = 0.05  # seconds
CLOCK = 2e9  # cycles a second, of an H200 at its fastest 1.98e9


def _host_seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


class Sampler:
    """One call: how often it runs in a sample, and the seconds of one run of it.

    On a GPU the samples begin with a pause in which Python queues all runs, so that events around
    them see the device's time alone, however short the kernels are. The L2 cache is not flushed.
    """

    def __init__(self, call: Call, device: torch.device, seconds: float):
        self._call, self._on_gpu = call, device.type == "cuda"
        call()
        self._count, self._pause = 1, 0.0
        once = min(self.sample() for _ in range(2))
        self._count = max(1, min(MOST_CALLS, round(seconds / max(once, 1e-9))))
        if self._on_gpu:
            torch.cuda.synchronize()
            self._pause = min(LONGEST_SLEEP, 1.5 * _host_seconds(call, self._count))
            torch.cuda.synchronize()

    def sample(self) -> float:
        """The seconds of one run, the mean of those in one sample."""
        if not self._on_gpu:
            return _host_seconds(self._call, self._count) / self._count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self._pause * CLOCK))
        start.record()
        for _ in range(self._count):
            self._call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._count


def interleave(
    calls: Mapping[Hashable, Call], device: torch.device, rounds: int, seconds: float, seed: int = 0
) -> dict[Hashable, list[float]]:
    """The samples of each call, about `seconds` long each, one in every shuffled round."""
    samplers = {key: Sampler(call, device, seconds) for key, call in calls.items()}
    samples: dict = {key: [] for key in calls}
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        turn = list(calls)
        shuffle(turn)
        for key in turn:
            samples[key].append(samplers[key].sample())
    return samples


def quickest(calls: list[Call], device: torch.device) -> int:
    """Which of several ways to do the same takes least time."""
    if len(calls) == 1:
        return 0
    samples = interleave(dict(enumerate(calls)), device, rounds=3, seconds=0.005)
    medians = {key: statistics.median(found) for key, found in samples.items()}
    return min(medians, key=medians.__getitem__)


def peak_mib(call: Call, device: torch.device) -> float | None:
    """What a call takes of torch's CUDA allocator at its peak, results included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(call: Call) -> list[str]:
    """The kernels of ours that a call runs, by their classes: entry<sparse_attn::cuda::Kernel>.

    None where the machine lets nobody trace.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return []
    names = {event.key for event in profiler.key_averages()}
    found = (re.search(r"entry<(?:\w+::)*(\w+)", name) for name in names)
    return sorted({match.group(1) for match in found if match})
