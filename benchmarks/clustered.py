"""Attention within buckets and clusters against the packages it comes from.

    chunked   one round of hashing, causal, chunks that see themselves and the one before: here,
              transformers' LSHSelfAttention, reformer_pytorch's LSHAttention
    routing   as many clusters as windows fit the length, not causal: here, routing_transformer's
              KmeansAttention

All are given queries, keys and values: no projections. Packages that are missing are left out.

    python benchmarks/clustered.py --threads 1      # about 2 minutes
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import report
import torch
from timing import interleave
from torch import Tensor, nn

from sparse_attn.functional import chunked_lsh_attention, routing_attention

OURS = "sparse_attn"


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def leaf(args: argparse.Namespace, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randn(shape, generator=generator, requires_grad=True)


def chunked(args: argparse.Namespace) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Calls by package, and the leaves of each."""
    shape, flat = (args.batch, args.heads, args.length, args.head_dim), args.batch * args.heads
    buckets = 2 * args.length // args.chunk
    query_key, value = leaf(args, *shape), leaf(args, *shape)
    calls = {
        OURS: (
            lambda: chunked_lsh_attention(
                query_key, value, num_buckets=buckets, chunk_length=args.chunk, is_causal=True
            ),
            [query_key, value],
        )
    }
    if has("transformers"):
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        config = ReformerConfig(
            attn_layers=["lsh"],
            num_attention_heads=args.heads,
            attention_head_size=args.head_dim,
            hidden_size=args.heads * args.head_dim,
            num_hashes=1,
            num_buckets=buckets,
            lsh_attn_chunk_length=args.chunk,
            is_decoder=True,
            lsh_attention_probs_dropout_prob=0.0,
            hash_seed=args.seed,
        )
        theirs = LSHSelfAttention(config)
        theirs.query_key, theirs.value = nn.Identity(), nn.Identity()
        x = leaf(args, args.batch, args.length, args.heads * args.head_dim)
        calls["transformers"] = (lambda: theirs(x).hidden_states, [x])
    if has("reformer_pytorch"):
        from reformer_pytorch.reformer_pytorch import LSHAttention

        lucid = LSHAttention(
            bucket_size=args.chunk,
            n_hashes=1,
            causal=True,
            attend_across_buckets=True,
            allow_duplicate_attention=True,
        )
        both = [leaf(args, flat, args.length, args.head_dim) for _ in range(2)]
        calls["reformer_pytorch"] = (lambda: lucid(*both)[0], both)
    return calls


def routing(args: argparse.Namespace) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Calls by package, and the leaves of each."""
    shape = (args.batch, args.heads, args.length, args.head_dim)
    clusters = args.length // args.window
    tensors = [leaf(args, *shape) for _ in range(3)]
    centroids = torch.nn.functional.normalize(
        torch.randn(args.heads, clusters, args.head_dim), dim=2
    )
    calls = {
        OURS: (lambda: routing_attention(*tensors, centroids, window=args.window), tensors),
    }
    if has("routing_transformer"):
        from routing_transformer.routing_transformer import KmeansAttention

        layer = KmeansAttention(clusters, args.window, args.heads, args.head_dim).eval()
        layer.kmeans.means.copy_(centroids)
        layer.kmeans.initted.fill_(True)
        given = [leaf(args, *shape) for _ in range(3)]
        calls["routing_transformer"] = (lambda: layer(*given)[0], given)
    return calls


def run(call: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Tensor:
    with torch.set_grad_enabled(backward):
        output = call()
    if backward:
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 1),
        ("heads", 8),
        ("length", 4096),
        ("head-dim", 64),
        ("chunk", 64),
        ("window", 128),
        ("rounds", 6),
        ("threads", torch.get_num_threads()),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = {
        (kind.__name__, name, passes): lambda c=call, x=leaves, b=passes != "forward": run(c, x, b)
        for kind in (chunked, routing)
        for name, (call, leaves) in kind(args).items()
        for passes in ("forward", "both")
    }
    times = interleave(tasks, args.rounds, args.seconds, args.seed)
    found: dict[str, dict] = {}
    for (kind, name, passes), samples in times.items():
        ratio = samples.median / times[kind, OURS, passes].median
        found.setdefault(kind, {}).setdefault(name, {})[passes] = samples.summary() | {
            "ratio": ratio
        }
        print(f"{kind:8} {name:20} {passes:8} {1e3 * samples.median:8.1f} ms {ratio:6.2f} x")
    result = {
        "environment": report.environment(),
        "options": {k: v for k, v in vars(args).items() if k != "out"},
        "times": found,
    }
    path = args.out / f"clustered_{args.threads}_{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
