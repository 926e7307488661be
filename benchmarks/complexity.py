"""How time and peak memory grow with the length: exponents fitted to measurements, for each method.

Every method is timed at four lengths, forward and forward + backward, all methods interleaved. The
shortest is the first power of two at which a forward pass takes 20 ms, so that fixed costs do not
bend the fit; over all four time should grow 8-fold, whatever the exponent: by 2 from length to
length for a window, by 1.4 for dense attention. The exponent is the slope of log time over log
length by least squares. Beside it stands that of the number of pairs from `pattern.cost(n)`, which
is what time would follow if nothing else took any.

Peak memory is the resident memory of a process of its own beyond what its libraries take, less the
inputs, at longer lengths, where a step takes four times as long. Below 16 MiB a thread's scratch
would bend the fit, so such lengths do not enter it. A window is also timed at several reaches, and
at lengths up to a million tokens.

    python benchmarks/complexity.py                       # everything, about 8 minutes
    python benchmarks/complexity.py --parts million       # Window(256) up to 1 048 576 tokens only
    python benchmarks/complexity.py --methods window "dense, SDPA"
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import report
import torch
from growth import chart
from growth.child import Worker
from growth.fit import exponent, n_log_n
from growth.methods import METHODS, Method, inputs, task, window
from record import DIRECTIONS, TITLES
from timing import Samples, interleave, once
from tqdm import tqdm

POINTS, GROWTH = 4, 8.0  # lengths, and the times of the last one over those of the first
FIRST = 1024
LONGER = 4.0  # the times of the lengths at which memory is measured
LEAST_PEAK, LEAST_POINTS = 2**24, 3  # bytes, and lengths, that a fit of memory needs
REACHES, REACH_LENGTH = (512, 1024, 2048, 4096), 65536
MILLION = (2**18, 2**19, 2**20)
PARTS = ("exponents", "reaches", "million")


def lengths(method: Method, least: float, seed: int) -> list[int]:
    """The lengths that a method is timed at."""
    n, span = FIRST, GROWTH ** (1 / method.time)
    while 2 * n * span <= method.longest:
        run = task(
            method, method.length(n), inputs(method.leaves, 1, method.length(n), seed), False
        )
        once(run)
        if once(run) >= least:
            break
        n *= 2
    steps = [span ** (i / (POINTS - 1)) for i in range(POINTS)]
    return list(dict.fromkeys(method.length(n * step) for step in steps))


class Sequences:
    """Inputs that methods of the same length share."""

    def __init__(self, seed: int):
        self._seed = seed
        self._data: dict = {}

    def of(self, n: int) -> tuple:
        """Three leaves and the gradient of the output."""
        if n not in self._data:
            self._data[n] = inputs(3, 1, n, self._seed)
        return self._data[n]


def make_tasks(chosen: dict[str, list[int]], args: argparse.Namespace) -> dict:
    """By (method or reach, length, direction)."""
    data = Sequences(args.seed)
    wanted = [(name, METHODS[name], n) for name, sizes in chosen.items() for n in sizes]
    if "reaches" in args.parts:
        wanted += [(reach, window(reach), REACH_LENGTH) for reach in REACHES]
    return {
        (name, n, direction): task(method, n, data.of(n), direction != DIRECTIONS[0])
        for name, method, n in wanted
        for direction in DIRECTIONS
    }


def peaks(name: str, sizes: list[int], args: argparse.Namespace, shown: tqdm) -> dict:
    """Bytes at the peak beyond libraries and inputs, for each direction, and their exponents."""
    method = METHODS[name]
    sizes = [method.length(n * LONGER ** (1 / method.time)) for n in sizes]
    sizes = list(dict.fromkeys(sizes))
    found: dict = {"lengths": sizes}
    with Worker(name, 1, args.threads, args.seed) as worker:
        for direction in DIRECTIONS:
            measured = []
            for n in sizes:
                answer = worker.measure(n, direction != DIRECTIONS[0])
                if "error" in answer:
                    raise SystemExit(f"{name}, {n} tokens: {answer['error']}")
                measured.append(answer["peak"] - answer["inputs"])
            large = [
                (n, peak) for n, peak in zip(sizes, measured, strict=True) if peak > LEAST_PEAK
            ]
            found[direction] = {
                "peak_bytes": measured,
                "exponent": exponent(*zip(*large, strict=True))
                if len(large) >= LEAST_POINTS
                else None,
            }
            shown.update()
    return found


def summarize(name: str, sizes: list[int], times: dict, memory: dict) -> dict:
    """Measurements, exponents and what was expected of one method."""
    method = METHODS[name]
    pairs = [method.pairs(n) for n in sizes] if method.pairs else None
    return {
        "lengths": sizes,
        "pairs": pairs,
        "pairs_exponent": exponent(sizes, pairs) if pairs else None,
        "expected": {
            "time": n_log_n(sizes) if method.logarithm else method.time,
            "memory": method.memory,
            "tolerance": method.tolerance,
        },
        "time": fitted_times(sizes, {d: [times[name, n, d] for n in sizes] for d in DIRECTIONS}),
        "memory": memory,
    }


def fitted_times(x: Sequence[int], samples: dict[str, list[Samples]]) -> dict:
    """Times over x and their exponents, by direction."""
    return {
        direction: {
            "samples": [sample.summary() for sample in found],
            "exponent": exponent(x, [sample.median for sample in found]),
        }
        for direction, found in samples.items()
    }


def summarize_reaches(times: dict) -> dict:
    """How a window's time grows with its reach."""
    n = REACH_LENGTH
    pairs = [window(reach).pairs(n) for reach in REACHES]
    return {
        "reaches": REACHES,
        "length": n,
        "pairs": pairs,
        "pairs_exponent": exponent(REACHES, pairs),
        "expected": {"time": 1.0, "tolerance": 0.05},
        "time": fitted_times(REACHES, {d: [times[r, n, d] for r in REACHES] for d in DIRECTIONS}),
    }


def million(args: argparse.Namespace) -> list[dict]:
    """Window(256), one head, at up to a million tokens: time and memory."""
    found = []
    with Worker("window", 1, args.threads, args.seed) as worker:
        for n in tqdm(MILLION, desc="up to a million", unit="length"):
            entry: dict = {"length": n}
            for direction in DIRECTIONS:
                answer = worker.measure(n, direction != DIRECTIONS[0], repeats=2)
                if "error" in answer:
                    raise SystemExit(f"{n} tokens: {answer['error']}")
                entry[direction] = answer
            found.append(entry)
    return found


def verdict(entry: dict, what: str, direction: str) -> str:
    """The exponent, with `reached` or `MISSED`."""
    value, expected = entry[what][direction]["exponent"], entry["expected"]
    if value is None:
        return f"{'too small':>13}"
    reached = abs(value - expected[what]) <= expected["tolerance"]
    return f"{value:5.2f} {'reached' if reached else 'MISSED':<7}"


def _exponent_lines(methods: dict) -> list[str]:
    heads = ("time, fwd", "time, fwd+bwd", "memory, fwd", "memory, fwd+bwd")
    lines = ["exponents in the length: expected (of time; of memory), of the pairs, fitted"]
    lines.append(f"{'':44}{'pairs':>6}" + "".join(f"{head:>17}" for head in heads))
    for name, entry in methods.items():
        expected, pairs = entry["expected"], entry["pairs_exponent"]
        line = f"{name:<26}{expected['time']:5.2f}; {expected['memory']:.1f}"
        line += f" ± {expected['tolerance']:.2f} " + (f"{pairs:6.2f}" if pairs else f"{'':6}")
        for what in ("time", "memory"):
            line += "".join(f"    {verdict(entry, what, d)}" for d in DIRECTIONS)
        lines.append(line)
    return lines


def _reach_lines(found: dict) -> list[str]:
    line = f"time of a window in its reach, {found['length']} tokens, reaches of {found['reaches']}"
    fits = ", ".join(f"{TITLES[d]} {verdict(found, 'time', d)}" for d in DIRECTIONS)
    return ["", line, f"  pairs {found['pairs_exponent']:.2f}, {fits}"]


def _million_lines(found: list[dict]) -> list[str]:
    lines = ["", "Window(256), one head of 64: seconds, GiB with the inputs, bytes of a token"]
    for entry in found:
        n = entry["length"]
        cells = (
            f"{TITLES[d]}: {entry[d]['seconds']:6.2f} s {entry[d]['peak'] / 2**30:6.3f} GiB "
            f"{entry[d]['peak'] / n:7.0f} B   "
            for d in DIRECTIONS
        )
        lines.append(f"  {n:>8} {''.join(cells)}")
    return lines


def table(result: dict) -> str:
    """All that was measured as text."""
    env = result["environment"]
    lines = [f"{env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}", ""]
    if result["methods"]:
        lines += _exponent_lines(result["methods"])
    if "reaches" in result:
        lines += _reach_lines(result["reaches"])
    if "million" in result:
        lines += _million_lines(result["million"])
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"of {', '.join(METHODS)}")  # fmt: skip
    add("--least", type=float, default=20.0, help="ms of the shortest forward pass (20)")
    add("--rounds", type=int, default=5, help="shuffled rounds of the timing (5)")
    add("--seconds", type=float, default=0.6, help="spent on each method and length (0.6)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results", help="directory")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    started = report.environment()
    chosen = {}
    if "exponents" in args.parts:
        for name in tqdm(args.methods, desc="lengths", unit="method"):
            chosen[name] = lengths(METHODS[name], args.least / 1e3, args.seed)
    tasks = make_tasks(chosen, args)
    times = interleave(tasks, args.rounds, args.seconds, args.seed) if tasks else {}
    del tasks
    result = {
        "environment": started,
        "settings": {k: v for k, v in vars(args).items() if k != "out"} | {"heads": 1},
        "methods": {},
    }
    count = len(DIRECTIONS) * len(chosen)
    with tqdm(total=count, desc="memory", unit="fit", disable=not count) as shown:
        for name, sizes in chosen.items():
            memory = peaks(name, sizes, args, shown)
            result["methods"][name] = summarize(name, sizes, times, memory)
    if "reaches" in args.parts:
        result["reaches"] = summarize_reaches(times)
    if "million" in args.parts:
        result["million"] = million(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"complexity_{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if result["methods"]:
        chart.draw_growth(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
