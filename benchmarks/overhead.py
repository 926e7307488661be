"""What a small call costs beyond its arithmetic, and what that is made of.

Microseconds of a call with few heads of few tokens: forward in inference mode, forward with
autograd, forward + backward, by sparse_attn.attention, by the op itself, by SDPA and by torch.add
of the same tensors. Times of 1, 2, 4 and 8 heads on one thread give the arithmetic of a head as
their slope; the overhead is what is left. Forward + backward holds torch's own autograd engine too:
what it takes for an addition of two numbers is a row of its own. Then the stages of a call, layers,
and a step of a KVCache.

    python benchmarks/overhead.py                        # about 2 minutes on two cores
    python benchmarks/overhead.py --threads 1            # without the second half
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import overhead_report
import overhead_stages
import report
import torch
import torch.nn.functional as F
from timing import interleave, once
from torch import Tensor

import sparse_attn
from sparse_attn import Window

FORWARD, RECORDED, BOTH = "forward", "forward, recorded", "forward + backward"
DIRECTIONS = (FORWARD, RECORDED, BOTH)
FUNCTION, OP = "sparse_attn.attention", "torch.ops"
ENGINE = "torch.add of two numbers"
SECONDS = 1e-3  # of one sample
TARGET = 30.0  # microseconds

Call = Callable[[], object]


def entries(query: Tensor, key: Tensor, value: Tensor, window: int) -> dict[str, Call]:
    """One call of each entry point."""
    pattern = Window(window)
    words = pattern.encode()
    op = torch.ops.sparse_attn.attention
    return {
        FUNCTION: lambda: sparse_attn.attention(query, key, value, pattern),
        OP: lambda: op(query, key, value, words)[0],
        "SDPA": lambda: F.scaled_dot_product_attention(query, key, value),
        "torch.add": lambda: query + key,
    }


class Sample:
    """Runs a call a few times in one of the directions: as often as fits into a fraction of the
    time that a busy machine leaves a process alone."""

    def __init__(
        self, call: Call, direction: str, inputs: tuple[Tensor, ...] = (), grad: Any = None
    ):
        self.call, self.direction, self.inputs, self.grad = call, direction, inputs, grad
        self.calls = 1
        once(self)
        self.calls = min(20, max(1, int(SECONDS / once(self))))

    def __call__(self) -> None:
        """The sample."""
        with torch.inference_mode(self.direction == FORWARD):
            for _ in range(self.calls):
                output = self.call()
                if self.direction == BOTH:
                    torch.autograd.grad(output, self.inputs, self.grad, allow_unused=True)


def attention_tasks(args: argparse.Namespace) -> dict[tuple, Sample]:
    """By (entry, direction, heads)."""
    tasks = {}
    for heads in args.heads:
        shape = (1, heads, args.length, args.head_dim)
        for direction in DIRECTIONS:
            recorded = direction != FORWARD
            inputs = tuple(torch.randn(shape, requires_grad=recorded) for _ in range(3))
            grad = torch.randn(shape)
            for name, call in entries(*inputs, args.window).items():
                tasks[name, direction, heads] = Sample(call, direction, inputs, grad)
            numbers = tuple(torch.randn((), requires_grad=recorded) for _ in range(2))
            add = lambda a=numbers[0], b=numbers[1]: a + b  # noqa: E731
            tasks[ENGINE, direction, heads] = Sample(add, direction, numbers, torch.ones(()))
    return tasks


def layer_tasks(args: argparse.Namespace) -> dict[tuple, Sample]:
    """The same for layers, of heads × head_dim channels."""
    tasks = {}
    for heads in args.heads:
        width = heads * args.head_dim
        x = torch.randn(1, args.length, width)
        pattern = Window(args.window)
        ours = sparse_attn.MultiheadAttention(width, heads, batch_first=True, pattern=pattern)
        longformer = sparse_attn.LongformerSelfAttention(width, heads, 2 * args.window)
        theirs = torch.nn.MultiheadAttention(width, heads, batch_first=True)

        def self_attention(layer: torch.nn.Module, x: Tensor = x) -> Tensor:
            return layer(x, x, x, need_weights=False)[0]

        for layer, call in (
            (ours, self_attention),
            (longformer, lambda layer, x=x: layer(x)[0]),
            (theirs, self_attention),
        ):
            name = f"{'torch.nn' if layer is theirs else 'ours'}.{type(layer).__name__}"
            # What a layer uses of its parameters.
            call(layer).sum().backward()
            used = tuple(p for p in layer.parameters() if p.grad is not None)
            for direction in DIRECTIONS:
                forward = lambda c=call, m=layer: c(m)  # noqa: E731
                grad = torch.ones_like(x)
                tasks[name, direction, heads] = Sample(forward, direction, used, grad)
    return tasks


def steps(args: argparse.Namespace) -> dict[tuple, Sample]:
    """A token of a KVCache whose window is full."""
    tasks = {}
    for heads in args.heads:
        cache = sparse_attn.KVCache(
            Window(args.window, 0), batch_size=1, num_heads_kv=heads, head_dim=args.head_dim
        )
        token = torch.randn(3, 1, heads, 1, args.head_dim)
        cache.attend(*torch.randn(3, 1, heads, args.length, args.head_dim))
        call = lambda cache=cache, token=token: cache.attend(*token)  # noqa: E731
        tasks["KVCache.attend", FORWARD, heads] = Sample(call, FORWARD)
    return tasks


def measure(
    group: str, tasks: dict[tuple, Sample], args: argparse.Namespace, threads: int
) -> list[dict]:
    """A row for each task: microseconds of a call."""
    torch.set_num_threads(threads)
    found = interleave(tasks, args.rounds, args.seconds, args.seed)
    rows = []
    for (entry, direction, heads), samples in found.items():
        calls = tasks[entry, direction, heads].calls
        us = [1e6 * seconds / calls for seconds in samples.seconds]
        rows.append({
            "group": group, "entry": entry, "direction": direction, "heads": heads,
            "threads": threads, "median_us": statistics.median(us), "min_us": min(us),
            "samples": len(us),
        })  # fmt: skip
    return rows


def arithmetic(rows: list[dict]) -> dict[tuple, float]:
    """Microseconds of a head, by (entry, direction): the slope of one thread's least times, each
    of which counts by its relative error."""
    slopes = {}
    for row in rows:
        key = row["entry"], row["direction"]
        line = [r for r in rows if (r["entry"], r["direction"], r["threads"]) == (*key, 1)]
        if len(line) > 1:
            x, y = ([r[name] for r in line] for name in ("heads", "min_us"))
            slopes[key] = max(0.0, float(np.polyfit(x, y, 1, w=1 / np.array(y))[0]))
    return slopes


def add_overheads(rows: list[dict]) -> None:
    """What a time has beyond the arithmetic, shared by as many threads as there are heads for."""
    slopes = arithmetic(rows)
    for row in rows:
        slope = slopes.get((row["entry"], row["direction"]))
        if slope is None:
            continue
        row["arithmetic_us"] = slope * row["heads"] / min(row["threads"], row["heads"])
        row["overhead_us"] = row["min_us"] - row["arithmetic_us"]
        if row["entry"] != FUNCTION:
            continue
        same = ("direction", "heads", "threads")
        engine = next(
            r["min_us"]
            for r in rows
            if r["entry"] == ENGINE and all(r[name] == row[name] for name in same)
        )
        row["engine_us"] = engine if row["direction"] == BOTH else 0.0
        row["target_us"] = TARGET
        row["reached"] = row["overhead_us"] - row["engine_us"] < TARGET


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--heads", type=int, nargs="+", default=[1, 2, 4, 8], help="heads (1 2 4 8)")
    add("--length", type=int, default=128, help="tokens (128)")
    add("--head-dim", type=int, default=64, help="channels of a head (64)")
    add("--window", type=int, default=16, help="keys on each side (16)")
    threads = sorted({1, torch.get_num_threads()})
    add("--threads", type=int, nargs="+", default=threads, help="of torch; 1 first (1 and all)")
    add("--rounds", type=int, default=10, help="interleaved rounds (10)")
    add("--seconds", type=float, default=0.2, help="of each task (0.2)")
    add("--seed", type=int, default=0, help="of the inputs and the order of tasks (0)")
    add("--out", type=Path, default=Path("runs/overhead"), help="directory (runs/overhead)")
    return parser


def main() -> None:
    """The command line."""
    args = make_parser().parse_args()
    torch.manual_seed(args.seed)
    rows: list[dict] = []
    for threads in args.threads:
        groups = {"attention": attention_tasks(args), "layers": layer_tasks(args) | steps(args)}
        for group, tasks in groups.items():
            rows += measure(group, tasks, args, threads)
    add_overheads(rows)
    torch.set_num_threads(1)
    stages = overhead_stages.measure(args)
    result = {
        "environment": report.environment(),
        "options": {k: v for k, v in vars(args).items() if k != "out"},
        "rows": rows,
        "stages": stages,
    }
    path = args.out / f"overhead_{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(overhead_report.write(result, path))


if __name__ == "__main__":
    main()
