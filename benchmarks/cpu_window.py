"""Window, dilated and global attention on the CPU, beside every peer, in one interleaved run.

Each peer is first compared with dense attention in float64 at a small length, output and gradients.
Then all cases, peers, directions and the machine's own limits take turns, so that their ratios hold
on a machine with neighbors. The limit of a case is the time of its needed products at the measured
SGEMM rate plus that of its exponentials at the measured in-cache rate.

    python benchmarks/cpu_window.py                 # the usual cases, about 15 minutes
    python benchmarks/cpu_window.py --memory        # also memory and time per token at 65536
    python benchmarks/cpu_window.py --quick         # one short case, about 2 minutes
"""

from __future__ import annotations

import argparse
import datetime
import warnings
from dataclasses import replace
from pathlib import Path

import limits
import report
import torch
from memory import measure_apart
from peers import OURS, PEERS, Setup, Unsupported, make_task
from report import DIRECTIONS
from timing import interleave
from tqdm import tqdm
from workload import BATCH, CASES, HEAD_DIM, HEADS, Case, dense_reference, find_case, make_inputs

DEFAULT_CASES = (
    "window256",
    "window256_n16384",
    "window256_global16",
    "window256_spread16",
    "window128",
    "dilated2",
    "dilated4",
)
CHECK_LENGTH = 1024
# Largest difference from float64, relative to the largest element (or 1).
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
LONG_CASE = "window256_n65536"
LONG_PEERS = (OURS, "chunk_loop_tuned")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = f"of {', '.join(CASES)}; `_n<length>` sets another length than 4096"
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=cases)
    parser.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="each case at each of these lengths"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=[str(t)[6:] for t in TOLERANCES], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="shuffled rounds (10; 3 with --quick)")
    parser.add_argument(
        "--seconds", type=float, help="spent on each peer, case and direction (6; 1 with --quick)"
    )
    parser.add_argument("--dense-up-to", type=int, default=16384, metavar="N")
    parser.add_argument("--memory", action="store_true", help=f"also {LONG_CASE}: memory, scaling")
    parser.add_argument("--quick", action="store_true", help="one case of 1024 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; a table and a chart are written beside it")
    args = parser.parse_args()
    if args.out is None:
        name = f"cpu_window_{datetime.date.today().isoformat()}.json"
        args.out = Path(__file__).parent / "results" / name
    args.cases = args.cases or (["window256_n1024"] if args.quick else DEFAULT_CASES)
    args.rounds = args.rounds or (3 if args.quick else 10)
    args.seconds = args.seconds or (1.0 if args.quick else 6.0)
    try:
        cases = [find_case(name) for name in args.cases]
    except ValueError as error:
        parser.error(str(error))
    if args.lengths:
        cases = [case.at(n) for n in args.lengths for case in cases]
    args.cases = list(dict.fromkeys(cases))
    return args


class Differs(Exception):
    """A peer's results are not those of dense attention."""


def check(name: str, case: Case, dtype: torch.dtype, seed: int) -> float:
    """The error of a peer against the dense definition at a small length, gradients included."""
    peer, small = PEERS[name], case.at(CHECK_LENGTH)
    inputs = make_inputs(small.length, 2, dtype, seed)
    expected = dense_reference(None if peer.dense else small.mask(), inputs)
    worst = 0.0
    for backward in (False, True):
        try:
            task, _ = make_task(peer, Setup(small, inputs, backward))
        except Unsupported:
            if not backward:
                raise
            continue
        for actual, exact in zip(task(), expected, strict=False):
            error = (peer.from_native(actual).double() - exact).abs().max() / max(
                1.0, exact.abs().max().item()
            )
            worst = max(worst, error.item())
    if not worst <= TOLERANCES[dtype]:
        raise Differs(f"differs: by {worst:.1e} from dense attention")
    return worst


def prepare(args: argparse.Namespace) -> tuple[dict, dict]:
    """The tasks to time and, for each case and peer, its error or why it has no task."""
    dtype = getattr(torch, args.dtype)
    wanted = [(case, name) for case in args.cases for name in args.peers]
    if args.memory and find_case(LONG_CASE) not in args.cases:
        wanted.append((find_case(LONG_CASE), OURS))
    inputs = {
        length: make_inputs(length, HEADS, dtype, args.seed)
        for length in {case.length for case, _ in wanted}
    }
    tasks: dict = {}
    found: dict = {}
    for case, name in tqdm(wanted, desc="checks", unit="peer"):
        entry = found.setdefault(case, {}).setdefault(name, {})
        setup = Setup(case, inputs[case.length], False, args.dense_up_to)
        try:
            entry["max_error"] = check(name, case, dtype, args.seed)
            for direction in DIRECTIONS:
                entry[direction] = {}
                current = replace(setup, backward=direction == DIRECTIONS[1])
                task, note = make_task(PEERS[name], current)
                task()  # compiles, and fails here if it must
                tasks[case, name, direction] = task
                if note:
                    entry[direction]["note"] = note
        except Unsupported as reason:
            _no_task(entry, str(reason))
        except ImportError as error:
            _no_task(entry, f"missing: {error}")
        except Exception as error:
            if name == OURS:
                raise
            kind = "" if isinstance(error, Differs) else f"error: {type(error).__name__}: "
            _no_task(entry, kind + str(error).partition("\n")[0])
    return tasks, found


def _no_task(entry: dict, status: str) -> None:
    for direction in DIRECTIONS:
        if not entry.get(direction):
            entry[direction] = {"status": status}


def ratios(cases: dict) -> dict:
    """Dilation and global tokens against the plain window of as many keys at the same length."""
    result: dict = {}
    for case, peers in cases.items():
        plain = Case(f"window{case.reach}", case.reach, length=case.length)
        if plain == case or plain not in cases:
            continue
        pair = result.setdefault(f"{case.name} / {plain.name}", {})
        for name, entry in peers.items():
            both = ((d, entry[d], cases[plain].get(name, {}).get(d, {})) for d in DIRECTIONS)
            pair[name] = {
                d: a["median_ms"] / b["median_ms"]
                for d, a, b in both
                if "median_ms" in a and "median_ms" in b
            }
    return {pair: {p: r for p, r in peers.items() if r} for pair, peers in result.items()}


def time_per_token(cases: dict) -> dict:
    """Our time per token against that at the shortest length measured of the same case."""
    result: dict = {}
    for case, peers in cases.items():
        shortest = min((c for c in cases if c.base == case.base), key=lambda c: c.length)
        ours, base = peers.get(OURS), cases[shortest].get(OURS)
        if case != shortest and ours and base:
            scale = shortest.length / case.length
            result[f"{case.name} / {shortest.name}"] = {
                d: scale * ours[d]["median_ms"] / base[d]["median_ms"] for d in DIRECTIONS
            }
    return result


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="torch")
    for case in args.cases:
        visited = case.pattern().cost(case.length).pairs
        if visited != case.pairs():
            raise SystemExit(f"{case.name}: cost says {visited} pairs, expected {case.pairs()}")
    memory = []
    if args.memory:
        chosen = [name for name in LONG_PEERS if name in args.peers]
        for name in tqdm(chosen, desc="memory", unit="peer"):
            memory.append(measure_apart(name, LONG_CASE, args.dtype, args.threads, args.seed))
    started = report.environment()
    tasks, cases = prepare(args)
    probes = limits.probes(getattr(torch, args.dtype))
    named = {**tasks, **{name: probe.task for name, probe in probes.items()}}
    times = interleave(named, args.rounds, args.seconds, args.seed)
    limit = limits.Limits.from_samples(probes, times)

    written: dict = {}
    for case, peers in cases.items():
        pairs = BATCH * HEADS * case.pairs()
        least = {d: limit.seconds(pairs, HEAD_DIM, d == DIRECTIONS[1]) for d in DIRECTIONS}
        for name, entry in peers.items():
            for d in DIRECTIONS:
                if (samples := times.get((case, name, d))) is None:
                    continue
                entry[d] |= samples.summary()
                entry[d]["share_of_limit"] = least[d] / samples.median
                if name != OURS and (ours := times.get((case, OURS, d))):
                    entry[d]["times_ours"] = samples.median / ours.median
        written[case.name] = {
            "length": case.length,
            "pattern": repr(case.pattern()),
            "pairs": case.pairs(),
            "limit": least,
            "peers": peers,
        }
    result = {
        "environment": started,
        "settings": {
            "batch": BATCH,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": args.dtype,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "seed": args.seed,
        },
        "limits": {
            **vars(limit),
            "tasks": {
                name: {"work": p.work, **times[name].summary()} for name, p in probes.items()
            },
        },
        "cases": written,
        "ratios": ratios(cases),
        "time_per_token": time_per_token(cases),
        "memory": memory,
    }
    print(report.write(result, args.out))
    print(f"wrote {args.out} and, beside it, the table and the chart")


if __name__ == "__main__":
    main()
