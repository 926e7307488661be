"""The sets of measurements: which problems, which peers, and of which the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peers import PEERS
from record import DTYPES, OURS
from workload import HEAD_DIM, HEADS, AnyCase, find_case


@dataclass(frozen=True)
class Problem:
    """A case, with everything else that its time depends on."""

    case: AnyCase
    dtype: str = "float32"
    head_dim: int = HEAD_DIM
    heads: int = HEADS
    threads: int = torch.get_num_threads()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the tensors."""
        return getattr(torch, self.dtype)

    def fields(self) -> dict:
        """What identifies the problem in a result."""
        return {
            "case": self.case.base,
            "length": self.case.length,
            "head_dim": self.head_dim,
            "heads": self.heads,
            "dtype": self.dtype,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Item:
    """A problem, the peers to time, and those of which the memory is measured too."""

    problem: Problem
    peers: tuple[str, ...] = tuple(PEERS)
    memory: tuple[str, ...] = ()


def _headline(threads: int) -> Iterator[Item]:
    def problem(name: str, dtype: str = "float32") -> Problem:
        return Problem(find_case(name), dtype, threads=threads)

    everyone = tuple(PEERS)
    # Without a pattern all cases are the same: dense attention is timed once for each length.
    others = tuple(name for name in PEERS if name != "sdpa_dense")
    yield Item(problem("window256"), everyone, everyone)
    yield Item(problem("causal256"), everyone, (OURS,))
    for name in ("window128", "window256_global16", "dilated2", "dilated4", "dilated8", "strided"):
        yield Item(problem(name), others, (OURS,))
    yield Item(problem("bigbird64"), others, (OURS, "bigbird"))
    yield Item(problem("half_padded256"), (OURS,))
    yield Item(problem("window256_n16384"), others, others)
    for dtype in DTYPES[1:]:
        yield Item(problem("window256", dtype), (OURS, "chunk_loop_tuned"), (OURS,))


def _growth(threads: int) -> Iterator[Item]:
    few = (OURS, "chunk_loop_tuned")
    many = (*few, "flex_attention", "chunked_bmm", "local_attention", "longformer", "sdpa_mask")
    for power in range(10, 17):
        problem = Problem(find_case("window256").at(2**power), threads=threads)
        yield Item(problem, few if power % 2 else many, few if power in (12, 14, 16) else ())
    for power in (10, 12, 14, 16):  # those with a whole root
        problem = Problem(find_case("strided").at(2**power), threads=threads)
        yield Item(problem, (OURS, "chunked_bmm"))
    for reach in (64, 128, 256, 512, 1024):
        problem = Problem(find_case(f"window{reach}").at(8192), threads=threads)
        yield Item(problem, many[: 3 if reach in (64, 256, 1024) else 2])


def _types(threads: int) -> Iterator[Item]:
    peers = (OURS, "chunk_loop_tuned", "sdpa_mask", "flex_attention", "local_attention")
    for dtype in DTYPES:
        for head_dim in (64, 128):
            for name in ("window256", "window256_global16", "dilated2", "causal256", "bigbird64"):
                problem = Problem(find_case(name), dtype, head_dim, threads=threads)
                yield Item(problem, peers if name == "window256" else (OURS,))


def _threads(threads: int) -> Iterator[Item]:
    for number in (1, threads):
        yield Item(
            Problem(find_case("window256"), threads=number),
            (OURS, "sdpa_mask", "flex_attention", "local_attention", "chunk_loop_tuned"),
        )
        for name in ("window256", "dilated2", "causal256", "bigbird64", "strided"):
            problem = Problem(find_case(name).at(65536), heads=1, threads=number)
            yield Item(problem, (OURS, "chunk_loop_tuned") if name == "window256" else (OURS,))


SUITES = {"headline": _headline, "growth": _growth, "types": _types, "threads": _threads}


def suite(names: list[str], threads: int) -> list[Item]:
    """The items of one or several suites, those of the same problem joined."""
    joined: dict[Problem, Item] = {}
    for name in SUITES if "all" in names else names:
        for item in SUITES[name](threads):
            known = joined.get(item.problem, Item(item.problem, ()))
            joined[item.problem] = Item(
                item.problem,
                tuple(dict.fromkeys((*known.peers, *item.peers))),
                tuple(dict.fromkeys((*known.memory, *item.memory))),
            )
    return list(joined.values())
