"""Sparse attention on the CPU beside every peer and the machine's limits, in one interleaved run.

Each peer is first compared with dense attention in float64 at a small length, output and gradients
(FlexAttention, which would compile once more for that, with our output at the length that is
timed). Then all cases, peers, directions and the machine's own limits take turns, so that their
ratios hold on a machine with neighbors. The limit of a case is the time of its needed products at
the measured SGEMM rate plus that of its exponentials at the measured in-cache rate.

    python benchmarks/cpu_attention.py                    # the headline, with memory and targets
    python benchmarks/cpu_attention.py --suite growth     # time against N and w
    python benchmarks/cpu_attention.py --suite types      # float32, bfloat16, float16; heads of 128
    python benchmarks/cpu_attention.py --suite threads    # one thread and all, few heads too
    python benchmarks/cpu_attention.py --quick            # short cases, less than 2 minutes
    python benchmarks/cpu_attention.py --cases dilated4 strided --lengths 4096 16384

`compare.py` compares two results; `report.py` prints one, also as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path

import derive
import limits
import report
import targets
import torch
from measure import Key, Preparation, results, use_threads
from memory import measure_apart
from peers import PEERS
from record import DTYPES
from suites import SUITES, Item, Problem, suite
from timing import interleave
from tqdm import tqdm
from workload import BATCH, CASES, HEAD_DIM, HEADS, find_case

QUICK_CASES = ("window256", "dilated2", "bigbird64", "strided")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), default=["headline"])
    cases = f"instead of a suite: of {', '.join(CASES)}; `_n<length>` sets another length than 4096"
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=cases)
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="of each of --cases")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[HEAD_DIM])
    parser.add_argument("--heads", nargs="+", type=int, default=[HEADS])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, help="shuffled rounds (8; 3 with --quick)")
    parser.add_argument(
        "--seconds", type=float, help="spent on each peer, case and direction (2; 0.2 with --quick)"
    )
    parser.add_argument(
        "--longest", type=float, default=5.0, metavar="S",
        help="leaves out what would take more seconds a call, by its time at shorter lengths",
    )  # fmt: skip
    parser.add_argument("--dense-up-to", type=int, default=16384, metavar="N")
    parser.add_argument("--no-memory", action="store_true", help="only times")
    parser.add_argument("--quick", action="store_true", help="a few cases of 1024 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; a table and charts are written beside it")
    args = parser.parse_args()
    if args.quick:
        args.cases, args.lengths = args.cases or QUICK_CASES, args.lengths or [1024]
    args.rounds = args.rounds or (3 if args.quick else 8)
    args.seconds = args.seconds or (0.2 if args.quick else 2.0)
    if args.out is None:
        kind = "quick" if args.quick else "cases" if args.cases else "_".join(args.suite)
        name = f"cpu_{kind}_{datetime.date.today().isoformat()}.json"
        args.out = Path(__file__).parent / "results" / name
    try:
        args.items = _items(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _items(args: argparse.Namespace) -> list[Item]:
    """What is measured: a suite, or all combinations of what was asked for."""
    if not args.cases:
        items = suite(args.suite, max(args.threads))
    else:
        cases = [find_case(name) for name in args.cases]
        if args.lengths:
            cases = [case.at(n) for n in args.lengths for case in cases]
        options = (args.dtypes, args.head_dims, args.heads, args.threads)
        items = [Item(Problem(*each)) for each in itertools.product(cases, *options)]
    return [
        Item(
            item.problem,
            tuple(name for name in item.peers if name in args.peers),
            tuple(name for name in item.memory if name in args.peers and not args.no_memory),
        )
        for item in items
    ]


def measure_memory(items: Iterable[Item], seed: int) -> list[dict]:
    """The peaks of each peer, in processes of their own."""
    problems: dict = {}
    for item in items:
        for name in item.memory:
            problems.setdefault(name, []).append(item.problem)
    rows = []
    for name, wanted in tqdm(problems.items(), desc="memory", unit="peer"):
        rows += measure_apart(name, wanted, seed)
    return rows


def measure_times(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows of the result, and the limits."""
    dtypes = dict.fromkeys(("float32", *(item.problem.dtype for item in args.items)))
    threads = dict.fromkeys(item.problem.threads for item in args.items)
    prepared = Preparation(args.seed, args.dense_up_to, args.longest)
    prepared.add(args.items)
    probes = limits.probes(dtypes, threads)
    tasks = {**prepared.tasks, **{name: probe.task for name, probe in probes.items()}}

    def set_threads(name: Key | limits.Name) -> None:
        use_threads(name[0].threads if isinstance(name[0], Problem) else name[-1])

    times = interleave(
        tasks, args.rounds, args.seconds, args.seed, before=set_threads, known=prepared.seconds
    )
    rates = limits.rates(probes, times)
    found = {(d, n): limits.Limits.of(rates, d, n) for d in dtypes for n in threads}
    written = [{"dtype": d, "threads": n, **vars(limit)} for (d, n), limit in found.items()]
    return results(prepared.rows, times, found), written


def add_memory(rows: list[dict], memory: list[dict]) -> None:
    """Puts the peaks into the rows that they belong to."""
    measured = ("peak_mib", "extra_mib")
    known = {
        tuple(value for key, value in found.items() if key not in measured): found
        for found in memory
    }
    for row in rows:
        names = (key for key in (memory[0] if memory else ()) if key not in measured)
        found = known.get(tuple(row[name] for name in names), {})
        row.update({key: found[key] for key in measured if key in found})


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(max(args.threads))
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="torch")
    for case in {item.problem.case: None for item in args.items}:
        visited = case.pattern().cost(case.length).pairs
        if case.key_padding_mask() is None and visited != case.pairs():
            raise SystemExit(f"{case.name}: cost says {visited} pairs, expected {case.pairs()}")
    started = report.environment()
    memory = measure_memory(args.items, args.seed)
    rows, written = measure_times(args)
    add_memory(rows, memory)
    settings = {name: getattr(args, name) for name in ("rounds", "seconds", "longest", "seed")}
    result = {
        "environment": started,
        "settings": {"batch": BATCH, "suite": None if args.cases else args.suite, **settings},
        "limits": written,
        "results": rows,
        **derive.everything(rows),
        "targets": targets.evaluate(rows),
    }
    print(report.write(result, args.out))
    print(f"wrote {args.out} and, beside it, the table and the charts")


if __name__ == "__main__":
    main()
