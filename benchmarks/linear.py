"""Performer and linear attention beside performer_pytorch's FastAttention.

Forward, and forward and backward, causal and not, of the same tensors and the same projection,
interleaved. performer_pytorch comes from PyPI; without it only our own times are taken. Its causal
form asks for CUDA kernels of another package; on the CPU it is the chunked one that it falls back
to (`causal_linear_attention_noncuda`).

    python benchmarks/linear.py --threads 1        # about 2 minutes
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import report
import torch
from timing import interleave
from torch import Tensor

from sparse_attn.functional import linear_attention, performer_attention

try:
    from performer_pytorch import performer_pytorch as peer
except ImportError:
    peer = None

OURS, PEER, ELU = "sparse_attn", "performer_pytorch", "sparse_attn_elu"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attentions(args: argparse.Namespace, causal: bool) -> dict[str, Attention]:
    """By name; ours and the peer's have the same projection."""
    found: dict[str, Attention] = {
        ELU: lambda *x: linear_attention(*x, is_causal=causal),
        OURS: lambda *x: performer_attention(*x, is_causal=causal),
    }
    if peer is None:
        return found
    fast = peer.FastAttention(args.head_dim)
    if causal:
        fast.causal, fast.causal_linear_fn = True, peer.causal_linear_attention_noncuda
    weights = fast.projection_matrix
    found[OURS] = lambda *x: performer_attention(*x, projection=weights, is_causal=causal)
    found[PEER] = fast
    return found


def check(args: argparse.Namespace) -> None:
    """Raises unless both compute the same. The peer's causal form shares one maximum among all
    rows, so only the other is compared."""
    both = attentions(args, False)
    if PEER in both:
        tensors = [torch.randn(1, 2, 300, args.head_dim) for _ in range(3)]
        torch.testing.assert_close(both[OURS](*tensors), both[PEER](*tensors), rtol=1e-3, atol=1e-5)


def tasks(args: argparse.Namespace) -> dict[tuple[str, str], Callable[[], object]]:
    """By what is timed and by name."""
    shape = (args.batch, args.heads, args.length, args.head_dim)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape)
    found = {}
    for causal in (False, True):
        for name, attention in attentions(args, causal).items():

            def forward(attention: Attention = attention) -> Tensor:
                with torch.no_grad():
                    return attention(*leaves)

            def both(attention: Attention = attention) -> object:
                return torch.autograd.grad(attention(*leaves), leaves, grad)

            prefix = "causal " if causal else ""
            found[prefix + "forward", name] = forward
            found[prefix + "forward and backward", name] = both
    return found


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 1),
        ("heads", 8),
        ("length", 4096),
        ("head-dim", 64),
        ("rounds", 6),
        ("threads", torch.get_num_threads()),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=6.0, help="spent on each task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    check(args)
    times = interleave(tasks(args), args.rounds, args.seconds, args.seed)
    found: dict[str, dict] = {}
    for (what, name), samples in times.items():
        found.setdefault(what, {})[name] = samples.summary()
    for what, by_name in found.items():
        line = "".join(f"{name} {x['median_ms']:8.1f} ms   " for name, x in by_name.items())
        if PEER in by_name:
            by_name["ratio"] = by_name[PEER]["median_ms"] / by_name[OURS]["median_ms"]
            line += f"{by_name['ratio']:6.2f} x"
        print(f"{what:28} {line}")
    result = {
        "environment": report.environment(),
        "options": {k: v for k, v in vars(args).items() if k != "out"},
        "times": found,
    }
    path = args.out / f"linear_{args.threads}_threads_{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
