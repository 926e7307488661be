"""Interleaved timing: every task runs in turn, so that a busy moment of the machine hits all."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

MIN_SAMPLES, MAX_PER_ROUND = 3, 4
LONG = 0.5  # seconds of a call that one more of would tell little


@dataclass
class Samples:
    """The times of one task, in seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        """Median, least and largest time in milliseconds, and their number."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "samples": len(self.seconds),
        }


def once(task: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    result = task()
    elapsed = time.perf_counter() - start
    del result  # freed outside the timing, as the memory of a step is in a training loop
    return elapsed


def interleave(
    tasks: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    seconds: float,
    seed: int = 0,
    *,
    before: Callable[[Hashable], object] = lambda name: None,
    known: Mapping[Hashable, float] | None = None,
) -> dict[Hashable, Samples]:
    """Times each task about `seconds` long, spread evenly over shuffled rounds.

    A quick task enters a round up to four times, a slow one only some rounds, but three at least.
    `before` is called with a task's name ahead of each call, outside the timing. `known` has the
    seconds of tasks that ran already: slow ones of them need no warm-up.
    """
    wanted = {}
    for name, task in tqdm(tasks.items(), desc="warm-up", unit="task"):
        expected = (known or {}).get(name, 0.0)
        if expected < LONG:
            before(name)
            once(task)
            expected = once(task)
        count = int(seconds / max(expected, 1e-9))
        wanted[name] = min(max(count, MIN_SAMPLES), MAX_PER_ROUND * rounds)
    results = {name: Samples() for name in tasks}
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        with tqdm(total=sum(wanted.values()), desc="rounds", unit="call") as progress:
            for r in range(rounds):
                turn = []
                for name, n in wanted.items():
                    turn += [name] * (n * (r + 1) // rounds - n * r // rounds)
                shuffle(turn)
                for name in turn:
                    before(name)
                    results[name].seconds.append(once(tasks[name]))
                    progress.update()
    finally:
        gc.enable()
    return results
