"""Attention to the k largest logits, beside torch: scores, torch.topk, gather.

Timed interleaved, the choice of the keys alone, the forward pass, and forward with backward:

    python benchmarks/selection.py                          # about a minute
    python benchmarks/selection.py --length 8192 --k 16 64
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path

import report
import torch
from timing import interleave
from torch import Tensor

from sparse_attn.functional import topk_attention


def torch_choice(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits and indices of the k best keys."""
    return (query @ key.mT / math.sqrt(query.shape[-1])).topk(k)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    """The softmax over the best logits, times the values gathered for each query."""
    logits, indices = torch_choice(query, key, k)
    heads = value.shape[0] * value.shape[1]
    flat = value.flatten(0, 2)
    first = torch.arange(heads).view(*value.shape[:2], 1, 1) * value.shape[2]
    chosen = flat.index_select(0, (indices + first).flatten())
    weights = logits.softmax(-1).unsqueeze(-2)
    return (weights @ chosen.view(*indices.shape, -1)).squeeze(-2)


def tasks(args: argparse.Namespace, k: int) -> dict[tuple[str, str], Callable[[], object]]:
    """By part and by who does it."""
    torch.manual_seed(args.seed)
    shape = (args.batch, args.heads, args.length, args.head_dim)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    inputs = [x.detach() for x in (query, key, value)]
    torch.testing.assert_close(torch_attention(*inputs, k), topk_attention(*inputs, k))

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(query, key, value, k).sum(), (query, key, value))

    return {
        ("choice", "torch"): lambda: torch_choice(*inputs[:2], k),
        ("choice", "sparse_attn"): lambda: torch.ops.sparse_attn.top_keys(*inputs[:2], k),
        ("forward", "torch"): lambda: torch_attention(*inputs, k),
        ("forward", "sparse_attn"): lambda: topk_attention(*inputs, k),
        ("forward + backward", "torch"): lambda: step(torch_attention),
        ("forward + backward", "sparse_attn"): lambda: step(topk_attention),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 1),
        ("heads", 8),
        ("length", 4096),
        ("head-dim", 64),
        ("rounds", 5),
        ("threads", torch.get_num_threads()),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each task")
    parser.add_argument("--out", type=Path, help="a folder for the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = {}
    for k in args.k:
        found = interleave(tasks(args, k), args.rounds, args.seconds)
        for part in ("choice", "forward", "forward + backward"):
            ours, theirs = (1e3 * found[part, who].median for who in ("sparse_attn", "torch"))
            print(f"k {k:4} {part:20} {theirs:8.1f} ms {ours:8.1f} ms {theirs / ours:6.2f} x")
        times |= {f"k {k} {part} {who}": s.summary() for (part, who), s in found.items()}
    if args.out:
        options = {name: x for name, x in vars(args).items() if name != "out"}
        result = {"environment": report.environment(), "options": options, "times": times}
        path = args.out / f"selection_{datetime.date.today()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
