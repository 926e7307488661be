"""Checks peers and makes the tasks that are timed, and makes a result of the times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import torch
from limits import Limits
from peers import PEERS, Peer, Setup, Unsupported, make_task
from record import DIRECTIONS, OURS
from suites import Item, Problem
from timing import Samples, once
from torch import Tensor
from tqdm import tqdm
from workload import BATCH, dense_reference, make_inputs

CHECK_LENGTH = 1024
# Largest difference from the reference, relative to its largest element (or 1).
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}

Key = tuple[Problem, str, str]  # with peer and direction


class Differs(Exception):
    """A peer's results are not those of the reference."""


def use_threads(number: int) -> None:
    """Changes the number of threads, and waits until they run."""
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
        torch.ones(2**20).add_(1)


@lru_cache(maxsize=1)
def _reference(case, dense: bool, dtype: torch.dtype, head_dim: int, seed: int):
    """Inputs at a small length, and dense attention in float64 for them."""
    inputs = make_inputs(case.length, 2, dtype, seed, head_dim)
    mask = None if dense else case.mask()
    if dense and case.causal:
        mask = torch.ones(case.length, case.length, dtype=torch.bool).tril()
    return inputs, dense_reference(mask, inputs)


def _error(actual: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype) -> float:
    worst = 0.0
    for a, exact in zip(actual, expected, strict=False):
        error = (a.double() - exact).abs().max() / max(1.0, exact.abs().max().item())
        worst = max(worst, error.item())
    if not worst <= TOLERANCES[dtype]:
        raise Differs(f"differs by {worst:.1e} from the reference")
    return worst


@cache
def _check(name: str, problem: Problem, seed: int) -> float:
    """The error of a peer against float64 at a small length, gradients included."""
    peer, dtype = PEERS[name], problem.torch_dtype
    inputs, expected = _reference(problem.case, peer.dense, dtype, problem.head_dim, seed)
    worst = 0.0
    for backward in (False, True):
        try:
            task, _ = make_task(peer, Setup(problem.case, inputs, backward))
        except Unsupported:
            if not backward:
                raise
            continue
        results = (peer.from_native(x, 2) for x in task())
        worst = max(worst, _error(results, expected, dtype))
    return worst


def check(name: str, problem: Problem, seed: int) -> float:
    """The error of a peer at a length that shows its borders and takes no time."""
    length = max(CHECK_LENGTH, 2 * getattr(problem.case, "reach", 0))
    return _check(name, Problem(problem.case.at(length), problem.dtype, problem.head_dim), seed)


@dataclass
class Preparation:
    """The tasks to time, and what is known of each before that."""

    seed: int
    dense_up_to: int
    longest: float  # seconds of a call; what should take longer is left out
    tasks: dict[Key, Callable] = field(default_factory=dict)
    seconds: dict[Key, float] = field(default_factory=dict)
    rows: dict[Key, dict] = field(default_factory=dict)
    # Length and seconds of the last call of what differs in its length alone.
    _last: dict[Key, tuple[int, float]] = field(default_factory=dict)
    _inputs: dict[tuple, tuple[Tensor, ...]] = field(default_factory=dict)

    def add(self, items: Iterable[Item]) -> None:
        """Prepares all items, the short ones first."""
        wanted = [(item.problem, name) for item in items for name in item.peers]
        wanted.sort(key=lambda pair: pair[0].case.length)
        for problem, name in tqdm(wanted, desc="checks", unit="peer"):
            use_threads(problem.threads)
            for direction in DIRECTIONS:
                row = self.rows.setdefault((problem, name, direction), {})
                try:
                    self._prepare(problem, name, direction, row)
                except Unsupported as reason:
                    row["status"] = str(reason)
                except ImportError as error:
                    row["status"] = f"missing: {error}"
                except Exception as error:
                    if name == OURS:
                        raise
                    first = str(error).partition("\n")[0]
                    row["status"] = f"error: {type(error).__name__}: {first}"

    def _prepare(self, problem: Problem, name: str, direction: str, row: dict) -> None:
        peer, key = PEERS[name], (problem, name, direction)
        setup = self._setup(problem, direction)
        self._check_time(key)
        # Compiling for the small length as well would take longer than all of the timing.
        if not peer.compiles:
            row["max_error"] = check(name, problem, self.seed)
        task, note = make_task(peer, setup)
        if peer.compiles:
            row["max_error"] = self._against_ours(peer, task, setup)
        self.tasks[key], self.seconds[key] = task, once(task)
        self._last[_without_length(key)] = problem.case.length, self.seconds[key]
        if note:
            row["note"] = note

    def _setup(self, problem: Problem, direction: str) -> Setup:
        sizes = (problem.case.length, problem.heads, problem.torch_dtype)
        key = (*sizes, problem.head_dim)
        if key not in self._inputs:
            self._inputs[key] = make_inputs(*sizes, self.seed, problem.head_dim)
        backward = direction == DIRECTIONS[1]
        return Setup(problem.case, self._inputs[key], backward, self.dense_up_to)

    @staticmethod
    def _against_ours(peer: Peer, task: Callable, setup: Setup) -> float:
        """The error against our output, whose own error is known."""
        ours, _ = make_task(PEERS[OURS], setup)
        dtype = setup.inputs[0].dtype
        heads = setup.inputs[0].shape[1]
        results = (peer.from_native(x, heads) for x in task())
        return _error(results, (x.double() for x in ours()), dtype)

    def _check_time(self, key: Key) -> None:
        """Whether a call would take too long, if time grew with the length."""
        problem = key[0]
        if last := self._last.get(_without_length(key)):
            length, seconds = last
            expected = seconds * problem.case.length / length
            if expected > self.longest:
                raise Unsupported(f"left out: would take {expected:.0f} s or more a call")


def _without_length(key: Key) -> Key:
    problem, *others = key
    return (replace(problem, case=problem.case.at(1)), *others)


def results(
    rows: Mapping[Key, dict], times: Mapping[Key, Samples], limits: Mapping[tuple, Limits]
) -> list[dict]:
    """One flat record for each problem, peer and direction."""
    found = []
    for key, known in rows.items():
        problem, peer, direction = key
        row = problem.fields() | {"peer": peer, "direction": direction} | known
        row["pairs"] = problem.case.pairs()
        samples = times.get(key)
        if samples:
            row |= samples.summary()
        for dtype, name in ((problem.dtype, "limit"), ("float32", "float32_limit")):
            least = limits[dtype, problem.threads].seconds(
                BATCH * problem.heads * row["pairs"], problem.head_dim, direction == DIRECTIONS[1]
            )
            row[f"{name}_ms"] = 1e3 * least
            if samples:
                row[f"share_of_{name}"] = least / samples.median
        ours = times.get((problem, OURS, direction))
        if samples and peer != OURS and ours:
            row["times_ours"] = samples.median / ours.median
        found.append(row)
    return found
