"""Linformer's and Nyströmformer's attention beside the packages `linformer` and
`nystrom_attention`.

Timed is the attention of heads that are at hand, forward, and forward with backward: the same
projections or the same landmarks, the packages' own lines on both sides of their linear layers.
All are run in turn, and medians are compared.

    PYTHONPATH=... python benchmarks/low_rank.py --threads 1      # a minute or two
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
from torch import Tensor, nn

from sparse_attn.functional import linformer_attention, nystrom_attention

OURS = "sparse_attn"


def linformer(query: Tensor, key: Tensor, value: Tensor, proj_k: Tensor, proj_v: Tensor) -> Tensor:
    """The middle of linformer.LinformerSelfAttention.forward (0.2.3): its module takes x, from
    which keys of all heads side by side are made; here they are given so.
    """
    batch, heads, _, size = query.shape

    def mixtures(x: Tensor, proj: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        mixed = torch.einsum("bnd,nk->bkd", rows, proj)
        return mixed.reshape(batch, proj.shape[1], heads, size).transpose(1, 2)

    dots = torch.einsum("bhnd,bhkd->bhnk", query, mixtures(key, proj_k)) * size**-0.5
    return torch.einsum("bhnk,bhkd->bhnd", dots.softmax(dim=-1), mixtures(value, proj_v))


class PackageNystrom:
    """nystrom_attention.NystromAttention with its projections taken out."""

    def __init__(self, args: argparse.Namespace) -> None:
        from nystrom_attention import NystromAttention

        self.module = NystromAttention(
            args.heads * args.size,
            dim_head=args.size,
            heads=args.heads,
            num_landmarks=args.k,
            residual=False,
        )
        self.module.to_qkv = nn.Identity()
        self.module.to_out = nn.Identity()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
        output = self.module(torch.cat(rows, -1))
        return output.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)


def make_attentions(args: argparse.Namespace) -> dict[tuple[str, str], Callable]:
    """By function and by whose it is; the package of the second is optional."""
    made = {
        ("linformer", OURS): linformer_attention,
        ("linformer", "linformer"): linformer,
        ("nystrom", OURS): lambda *x: nystrom_attention(*x[:3], args.k),
    }
    try:
        package = PackageNystrom(args)
    except ImportError:
        print("nystrom_attention is not installed")
    else:
        made["nystrom", "nystrom_attention"] = lambda *x: package(*x[:3])
    return made


def make_inputs(args: argparse.Namespace) -> list[Tensor]:
    """Query, key, value as a layer has them, heads side by side in memory, and projections."""
    torch.manual_seed(args.seed)
    heads = [torch.randn(args.batch, args.length, args.heads, args.size) for _ in range(3)]
    projections = [torch.randn(args.length, args.k) / args.k**0.5 for _ in range(2)]
    leaves = [x.requires_grad_() for x in (*heads, *projections)]
    return [x.transpose(1, 2) if x.dim() == 4 else x for x in leaves]


def make_tasks(args: argparse.Namespace) -> dict[tuple[str, str, str], Callable]:
    tensors = make_inputs(args)
    grad = torch.randn(tensors[0].shape)

    def forward(run: Callable) -> Tensor:
        with torch.inference_mode():
            return run(*tensors)

    def forward_backward(run: Callable) -> Tensor:
        output = run(*tensors)
        torch.autograd.grad(output, tensors, grad, allow_unused=True)
        return output.detach()

    tasks = {}
    for (function, whose), run in make_attentions(args).items():
        for name, step in (("forward", forward), ("forward + backward", forward_backward)):
            tasks[function, name, whose] = lambda step=step, run=run: step(run)
    return tasks


def check(tasks: dict[tuple[str, str, str], Callable]) -> None:
    """Raises unless both compute the same: Linformer's to rounding; Nyström's pseudo-inverses start
    from other points, so that they only agree about as far as they have converged.
    """
    for (function, step, whose), task in tasks.items():
        if whose == OURS:
            continue
        ours, theirs = tasks[function, step, OURS](), task()
        error = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{function:10} {step:20} relative difference {error:.1e}")
        assert error < (1e-4 if function == "linformer" else 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 1),
        ("length", 4096),
        ("heads", 8),
        ("size", 64),
        ("k", 256),
        ("rounds", 5),
        ("threads", torch.get_num_threads()),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = make_tasks(args)
    check(tasks)
    times = interleave(tasks, args.rounds, args.seconds, args.seed)
    for (function, step, whose), samples in times.items():
        ratio = samples.median / times[function, step, OURS].median
        milliseconds = 1e3 * samples.median
        print(f"{function:10} {step:20} {whose:18} {milliseconds:8.1f} ms {ratio:6.2f} x")
    result = {
        "environment": report.environment(),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "times": {" / ".join(name): samples.summary() for name, samples in times.items()},
    }
    path = args.out / f"low_rank_{args.threads}_threads_{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
