"""Sparse attention on a GPU beside its peers, all in one run: milliseconds and useful TFLOP/s.

Useful are the operations on allowed (query, key) pairs alone: 4 · pairs · head_dim forward and
10 · pairs · head_dim backward, a head and example. Times are the median of interleaved rounds, from
CUDA events, after a warm-up; the L2 cache is not flushed. Forward runs with gradients on (it keeps
what the backward pass needs); backward is torch.autograd.grad alone, on a graph that is kept.

    window512            Window(256, 256): 513 keys
    window512_causal     Window(511, 0): 512 keys, FlashAttention's window_size=(511, 0)
    window1024_causal    Window(1023, 0)
    dilated2, dilated4   Window(256, 256, dilation=2 or 4)
    window512_global16   Window(256, 256) | Global(range(16))
    bigbird64            BigBird(64)
    strided128           Strided(128)

`sdpa_flash` and `cudnn` compute all pairs, whatever the case: their useful TFLOP/s count what the
case needs. `error` is the largest absolute difference from dense attention in float64 on a few
hundred rows (backward: the gradients that these rows give), or what an implementation died of.

The environment variable SPARSE_ATTN_COMMIT names the commit where git does not.

    python benchmarks/gpu_peers.py --budget 300
    python benchmarks/gpu_peers.py --device cpu --implementations sparse_attn --lengths 512
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import gpu_report
import report
import torch
from gpu_attentions import IMPLEMENTATIONS, OPTIONAL
from gpu_group import Group
from gpu_workload import CASES, DIRECTIONS, Setup

LENGTHS = (4096, 16384, 65536, 131072)
HEAD_DIMS = (64, 128)
# Without --cases; the others are for runs of their own.
DEFAULT_CASES = tuple(name for name in CASES if name != "window1024_causal")
DEFAULT_IMPLEMENTATIONS = tuple(name for name in IMPLEMENTATIONS if name != "flex_autotuned")
# The lengths and cases that come first when the time is short.
FIRST_LENGTHS, FIRST_CASES = (16384, 65536), ("window512", "window512_causal")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=DEFAULT_IMPLEMENTATIONS,
        help="flex tries blocks of 128 and 64 and smaller tiles at the first length and keeps its "
        "best; flex_autotuned compiles for minutes; fa3, natten and xformers run if installed",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N")
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS, metavar="D")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--heads-kv", type=int, help="as many as heads by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="stop after this long; the cases that matter most come first",
    )
    parser.add_argument("--resume", action="store_true", help="keep what --out has, add the rest")
    parser.add_argument("--out", type=Path, help="JSON; a table and a chart are written beside it")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA device")
    args.heads_kv = args.heads_kv or args.heads
    name = f"{device_name(args.device)}_{datetime.date.today().isoformat()}.json"
    slug = name.lower().replace(" ", "_")
    args.out = args.out or Path(__file__).parent / "results" / slug
    return args


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def setups(args: argparse.Namespace) -> list[Setup]:
    """All calls, those that matter most first."""

    def rank(setup: Setup) -> tuple:
        return (
            setup.length not in FIRST_LENGTHS,
            setup.case.name not in FIRST_CASES,
            args.lengths.index(setup.length),
            args.cases.index(setup.case.name),
        )

    made = [
        Setup(
            CASES[name],
            length,
            head_dim,
            args.batch,
            args.heads,
            args.heads_kv,
            getattr(torch, args.dtype),
            args.device,
        )
        for name in args.cases
        for length in args.lengths
        for head_dim in args.head_dims
    ]
    return sorted(made, key=rank)


class OutOfTime(BaseException):
    """The budget is spent; no implementation's error, so that nobody catches it as one."""


@contextmanager
def alarm(seconds: float):
    """Raises OutOfTime after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTime

    if not math.isfinite(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(result: dict, path: Path) -> None:
    """Replaces the file as a whole, with the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(result, indent=1) + "\n"),
        (path.with_suffix(".md"), gpu_report.table(result)),
    ):
        part = target.with_name(f".{target.name}.part")
        part.write_text(text)
        os.replace(part, target)


def start(args: argparse.Namespace) -> dict:
    """The result without rows, or what an earlier run left on the same device and commit."""
    environment = report.environment()
    result = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "commit": os.environ.get("SPARSE_ATTN_COMMIT") or environment["commit"],
        "cuda": torch.version.cuda,
        "environment": environment,
        "settings": {"rounds": args.rounds, "seconds": args.seconds, "seed": args.seed},
        "results": [],
    }
    if not (args.resume and args.out.exists()):
        return result
    before = json.loads(args.out.read_text())
    for name in ("device", "torch", "commit"):
        if before[name] != result[name]:
            raise SystemExit(
                f"--resume: {args.out} is of {name} {before[name]}, not {result[name]}"
            )
    return before


def is_done(setup: Setup, result: dict) -> bool:
    fields = setup.fields().items()
    return any(fields <= row.items() for row in result["results"])


def main() -> None:
    began = time.monotonic()
    args = parse_arguments()
    warnings.filterwarnings("ignore", module="torch")
    missing = {name for name, package in OPTIONAL.items() if find_spec(package) is None}
    args.implementations = [name for name in args.implementations if name not in missing]
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    result = start(args)
    todo = [setup for setup in setups(args) if not is_done(setup, result)]
    try:
        with alarm(args.budget - (time.monotonic() - began)):
            for setup in todo:
                rows = Group(setup, args, result["results"]).measure()
                result["results"] += rows
                write(result, args.out)
                print(gpu_report.lines(setup.name, rows), flush=True)
    except OutOfTime:
        print("out of time: the cases that are left out are not in the file", file=sys.stderr)
    if not result["results"]:
        raise SystemExit("no case was finished within the budget")
    gpu_report.chart(result, args.out.with_suffix(".png"))
    print(f"wrote {args.out} and, beside it, the table and the chart")


if __name__ == "__main__":
    main()
