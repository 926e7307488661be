"""Decoding token by token: a cache of what the pattern needs, and one of the whole sequence.

At each length, tokens per second and bytes of keys and values of

    KVCache     with a window, with global tokens beside it, and dilated
    full cache  all keys in one buffer, scaled_dot_product_attention over them

    python benchmarks/decode.py                          # about 2 minutes on one core
    python benchmarks/decode.py --lengths 1024 16384     # fewer lengths
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from plotting import pyplot
from timing import interleave
from torch import Tensor

from sparse_attn import Causal, Global, KVCache, Window

COLORS = {"window": "#c1272d", "window + global": "#e39a3b", "dilated": "#3b8a5a"}
FULL = "full cache"
COLORS[FULL] = "#1f4e8c"


class FullCache:
    """Keys and values of the whole sequence, in buffers that are large enough from the start."""

    def __init__(self, key: Tensor, value: Tensor, room: int):
        shape = (*key.shape[:2], key.shape[2] + room, key.shape[3])
        self.key, self.value = key.new_empty(shape), key.new_empty(shape)
        self.key[:, :, :-room], self.value[:, :, :-room] = key, value
        self.length = key.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are there."""
        return self.length * (self.key[:, :, 0].nbytes + self.value[:, :, 0].nbytes)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append one token and attend from it to all."""
        self.key[:, :, self.length : self.length + 1] = key
        self.value[:, :, self.length : self.length + 1] = value
        self.length += 1
        seen = self.key[:, :, : self.length], self.value[:, :, : self.length]
        return F.scaled_dot_product_attention(query, *seen)


def patterns(args: argparse.Namespace) -> dict:
    """The patterns by name; all see about `window` keys."""
    window = Window(args.window, 0)
    return {
        "window": window,
        "window + global": (window | Global(range(args.globals))) & Causal(),
        "dilated": Window(args.window // 4, 0, dilation=4),
    }


def filled(name: str, length: int, room: int, args: argparse.Namespace) -> KVCache | FullCache:
    """A cache that has seen `length` tokens, and may see `room` more."""
    tokens = torch.randn(3, args.batch, args.heads, length, args.head_dim)
    if name == FULL:
        return FullCache(*tokens[1:], room)
    cache = KVCache(
        patterns(args)[name],
        batch_size=args.batch,
        num_heads_kv=args.heads,
        head_dim=args.head_dim,
    )
    cache.attend(*tokens)
    return cache


def steps(cache: KVCache | FullCache, args: argparse.Namespace) -> Callable[[], None]:
    """What appends `args.steps` tokens, one by one."""
    token = torch.randn(3, args.batch, args.heads, 1, args.head_dim)

    def run() -> None:
        if isinstance(cache, FullCache):
            cache.length = cache.key.shape[2] - args.steps
        for _ in range(args.steps):
            cache.attend(*token)

    return run


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each cache and length."""
    rows = []
    for length in args.lengths:
        names = (*patterns(args), FULL)
        caches = {name: filled(name, length, args.steps, args) for name in names}
        tasks = {name: steps(cache, args) for name, cache in caches.items()}
        times = interleave(tasks, args.rounds, args.seconds, args.seed)
        for name, cache in caches.items():
            per_second = args.batch * args.steps / times[name].median
            rows.append(
                {
                    "cache": name,
                    "length": length,
                    "tokens_per_second": per_second,
                    "bytes": cache.nbytes,
                    **times[name].summary(),
                }
            )
            print(
                f"{length:7} {name:16} {per_second:9.0f} tokens/s {cache.nbytes / 2**20:8.2f} MiB"
            )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The PNG: tokens per second and bytes over the length."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, key, scale, label in (
        (axes[0], "tokens_per_second", 1, "tokens per second"),
        (axes[1], "bytes", 2**-20, "MiB of keys and values"),
    ):
        for name, color in COLORS.items():
            chosen = [row for row in rows if row["cache"] == name]
            x, y = [row["length"] for row in chosen], [row[key] * scale for row in chosen]
            panel.plot(x, y, "o-", color=color, label=name)
        panel.set(xlabel="tokens so far", ylabel=label, xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    lengths = [2**n for n in range(10, 17)]
    add("--lengths", type=int, nargs="+", default=lengths, help="tokens before (1024 to 65536)")
    add("--window", type=int, default=512, help="keys that a query sees (512)")
    add("--globals", type=int, default=16, help="global tokens (16)")
    add("--batch", type=int, default=1, help="sequences (1)")
    add("--heads", type=int, default=8, help="heads (8)")
    add("--head-dim", type=int, default=64, help="channels of a head (64)")
    add("--steps", type=int, default=64, help="tokens of one measurement (64)")
    add("--rounds", type=int, default=4, help="interleaved rounds (4)")
    add("--seconds", type=float, default=1.0, help="of each cache at each length (1)")
    add("--threads", type=int, default=1, help="of torch (1)")
    add("--seed", type=int, default=0, help="of the order of tasks (0)")
    add("--out", type=Path, default=Path("runs/decode"), help="directory (runs/decode)")
    return parser


def main() -> None:
    """The command line."""
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        rows = measure(args)
    options = {k: v for k, v in vars(args).items() if k != "out"}
    path = args.out / f"decode_{datetime.date.today()}"
    result = {"environment": report.environment(), "options": options, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))
    print(f"{path}.json, {path}.png")


if __name__ == "__main__":
    main()
