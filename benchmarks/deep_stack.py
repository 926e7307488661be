"""Deep stacks of small layers, with and without the Sparse Transformer's block and initialization.

Each stack learns to predict the bytes of the Python reference, with the same data, optimizer and
pattern:

    scaled     SparseTransformerBlock, its initialization scaled by the depth of the stack
    unscaled   the same blocks with num_layers=1
    post-norm  torch.nn.TransformerEncoderLayer as torch initializes it, the pattern as its mask

Then recomputation: seconds of a training step and bytes kept for its backward pass, at several
depths, with and without it.

    python benchmarks/deep_stack.py                 # about 7 minutes on one core
    python benchmarks/deep_stack.py --layers 48     # a deeper stack
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from plotting import pyplot
from timing import interleave
from torch import Tensor, nn
from tqdm import tqdm

from sparse_attn import SparseTransformerBlock, Strided

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from long_text.data import load_corpus, training_batch

VOCABULARY = 256  # bytes
WARMUP, SMOOTHED = 30, 10  # steps
COLORS = {"scaled": "#c1272d", "unscaled": "#e39a3b", "post-norm": "#1f4e8c"}


class PostNormLayer(nn.TransformerEncoderLayer):
    """torch's layer, which normalizes the stream itself, over the (N, N) pairs `seen`."""

    def __init__(self, width: int, heads: int, seen: Tensor):
        super().__init__(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.register_buffer("hidden", ~seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, src_mask=self.hidden)


class Stack(nn.Module):
    """Bytes (B, N) to the logits (B, N, 256) of the byte after each, through a deep stack."""

    def __init__(self, kind: str, layers: int, args: argparse.Namespace, recompute: bool = False):
        super().__init__()
        width, pattern = args.width, Strided(args.stride)
        if kind == "post-norm":
            make = partial(PostNormLayer, width, args.heads, pattern.mask(args.length))
        else:
            depth = layers if kind == "scaled" else 1
            make = partial(
                SparseTransformerBlock,
                width,
                args.heads,
                pattern=pattern,
                num_layers=depth,
                recompute=recompute,
            )
        self.byte = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(args.length, width)
        self.blocks = nn.Sequential(*(make() for _ in range(layers)))
        self.norm = nn.Identity() if kind == "post-norm" else nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY)
        if kind != "post-norm":
            for table in (self.byte, self.place):
                nn.init.normal_(table.weight, std=0.125 / math.sqrt(width))
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.place.weight[: tokens.shape[1]]
        return self.output(self.norm(self.blocks(x)))


def loss_of(model: Stack, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean nats per byte."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(kind: str, seed: int, args: argparse.Namespace, data, shown: tqdm) -> dict:
    """Loss in bits per byte and gradient norm, before it is clipped, of every step."""
    torch.manual_seed(seed)
    model = Stack(kind, args.layers, args)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / WARMUP)
        loss = loss_of(model, training_batch(data, args.length, args.batch, step, seed))
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        shown.set_postfix_str(f"{kind}, seed {seed}: {losses[-1]:.2f} bits/byte", refresh=False)
        shown.update()
    return {"kind": kind, "seed": seed, "loss": losses, "gradient_norm": norms}


def kept_bytes(model: Stack, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes that one forward pass keeps for its backward pass, besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, batch)
    return sum(kept.values())


def recomputation(args: argparse.Namespace, data) -> list[dict]:
    """Seconds of a forward and backward pass and bytes kept, at each depth, with and without."""
    batch = training_batch(data, args.length, args.batch, 0, args.seeds[0])
    models = {
        (depth, recompute): Stack("scaled", depth, args, recompute)
        for depth in args.depths
        for recompute in (False, True)
    }
    tasks = {key: lambda m=model: loss_of(m, batch).backward() for key, model in models.items()}
    times = interleave(tasks, args.rounds, args.seconds, args.seeds[0])
    return [
        {
            "layers": depth,
            "recompute": recompute,
            "kept_bytes": kept_bytes(model, batch),
            **times[depth, recompute].summary(),
        }
        for (depth, recompute), model in models.items()
    ]


def smooth(values: list[float]) -> list[float]:
    """The mean of the last values at each step."""
    ends = range(1, len(values) + 1)
    return [statistics.fmean(values[max(0, end - SMOOTHED) : end]) for end in ends]


def draw_training(axes, runs: list[dict], curve: Callable, ylabel: str) -> None:
    """A line `curve(run)` for each run, one color for each kind."""
    named = set()
    for run in runs:
        kind = run["kind"]
        label = None if kind in named else kind
        named.add(kind)
        axes.plot(curve(run), color=COLORS[kind], linewidth=1.1, label=label)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def draw_recomputation(axes, rows: list[dict]) -> None:
    """Bytes kept over the time of a step: a line through the depths for each way."""
    for recompute, color in ((False, "#1f4e8c"), (True, "#c1272d")):
        chosen = [row for row in rows if row["recompute"] == recompute]
        x = [row["median_ms"] for row in chosen]
        y = [row["kept_bytes"] / 2**20 for row in chosen]
        axes.plot(x, y, "o-", color=color, label="recompute" if recompute else "keep everything")
        for row, place in zip(chosen, zip(x, y, strict=True), strict=True):
            axes.annotate(
                f"{row['layers']}", place, xytext=(0, 6), textcoords="offset points", ha="center"
            )
    axes.set(
        xlabel="milliseconds, forward + backward", ylabel="MiB kept for backward", yscale="log"
    )
    axes.margins(y=0.12)
    axes.set_title("Recomputation, by number of layers", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw(result: dict, path: Path) -> None:
    """The PNG: loss, gradient norm, and recomputation."""
    plt = pyplot()
    runs = result["runs"]
    figure, (loss, norm, memory) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    draw_training(loss, runs, lambda run: smooth(run["loss"]), "bits per byte")
    draw_training(norm, runs, lambda run: run["gradient_norm"], "gradient norm, before clipping")
    norm.set_yscale("log")
    title = f"{result['settings']['layers']} layers, a line for each seed"
    loss.set_title(f"{title}, mean of {SMOOTHED} steps", fontsize=10)
    norm.set_title(title, fontsize=10)
    draw_recomputation(memory, result["recomputation"])
    env, run = result["environment"], result["settings"]
    figure.suptitle(
        f"Python reference, sequences of {run['length']} bytes, width {run['width']}; "
        f"{env['cpu']}, {env['threads']} threads, torch {env['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def table(result: dict) -> str:
    """The ends of the curves, and what recomputation costs and saves."""
    lines = [f"last {SMOOTHED} steps, mean: bits per byte, gradient norm"]
    for run in result["runs"]:
        ends = (statistics.fmean(run[field][-SMOOTHED:]) for field in ("loss", "gradient_norm"))
        lines.append(
            f"  {run['kind']:<10} seed {run['seed']}  " + "  ".join(f"{x:.3f}" for x in ends)
        )
    lines += ["", f"{'layers':>6}  {'recompute':<10} {'ms/step':>9} {'MiB kept':>9}"]
    for row in result["recomputation"]:
        lines.append(
            f"{row['layers']:>6}  {row['recompute']!s:<10} {row['median_ms']:>9.1f} "
            f"{row['kept_bytes'] / 2**20:>9.2f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=32, help="of the stacks that are trained (32)")
    add("--steps", type=int, default=200, help="updates of each (200)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and data (0 1 2)")
    add("--depths", type=int, nargs="+", default=[8, 16, 32, 64], metavar="LAYERS",
        help="stacks that recomputation is measured on (8 16 32 64)")  # fmt: skip
    add("--width", type=int, default=64, help="channels of the stream (64)")
    add("--heads", type=int, default=2, help="attention heads (2)")
    add("--stride", type=int, default=16, help="of the pattern Strided (16)")
    add("--length", type=int, default=256, help="bytes of a sequence (256)")
    add("--batch", type=int, default=4, help="sequences of a step (4)")
    add("--learning-rate", type=float, default=1e-3, help="after the warm-up (0.001)")
    add("--rounds", type=int, default=5, help="shuffled rounds of the timing (5)")
    add("--seconds", type=float, default=4.0, help="spent on each timed stack (4)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path(__file__).parent / "results", help="directory")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    data = load_corpus(None, args.length).train
    wanted = [(kind, seed) for seed in args.seeds for kind in COLORS]
    every = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=len(wanted) * args.steps, unit="step", mininterval=every) as shown:
        runs = [train(kind, seed, args, data, shown) for kind, seed in wanted]
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    result = {
        "environment": report.environment(),
        "settings": settings,
        "runs": runs,
        "recomputation": recomputation(args, data),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"deep_stack_{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(table(result))
    print(f"wrote {path} and, beside it, the chart")


if __name__ == "__main__":
    main()
