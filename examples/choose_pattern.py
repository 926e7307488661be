"""Choose the sparse patterns of a model that was trained with full attention.

For each layer it measures what patterns of every kind lose on held-out text at a share of the cost
of full attention, prints them, the best first, and draws what each of their heads keeps. Then
it swaps them in, without further training, and compares the bits per byte. Layouts of blocks are
fitted to training text: to its attention, and for comparison to its gradients. The model is a
small byte-level one, trained first; or give your own tensors with --tensors.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from long_text.command import HelpFormatter, count, positive
from long_text.data import Corpus, DataError, load_corpus, pair
from long_text.model import ByteModel, Config
from long_text.training import Settings, Trainer, set_threads

from sparse_attn import (
    Causal,
    Pattern,
    Recommendations,
    Window,
    gradient_pattern,
    recommend_pattern,
    record_attention,
)


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    whole = positive(int)
    add = parser.add_argument_group("choice").add_argument
    add("--budget", type=positive(float), default=0.2, help="largest share of the dense cost")
    add("--show", type=whole, default=8, help="patterns to print and draw for each layer")
    add("--out", type=Path, default=Path("runs/choose_pattern"), help="directory for the picture")
    add = parser.add_argument_group("your own tensors").add_argument
    add(
        "--tensors",
        type=Path,
        metavar="FILE",
        help="a dict of query, key, value (batch, heads, length, size), saved by torch.save",
    )
    add("--causal", action="store_true", help="their attention is causal")
    add = parser.add_argument_group("model trained here").add_argument
    add("--text", type=Path, metavar="FILE", help="this file instead of the Python reference")
    add("--length", type=whole, default=512, help="bytes of a sequence")
    add("--steps", type=whole, default=200, help="updates")
    add("--layers", type=whole, default=2, help="blocks")
    add("--width", type=whole, default=128, help="channels of the stream")
    add("--heads", type=whole, default=4, help="attention heads")
    add("--samples", type=whole, default=8, help="sequences to fit to, and to measure on")
    add("--seed", type=count, default=0, help="of weights and batches (default: 0)")
    add("--threads", type=whole, help="CPU threads instead of torch's choice")
    return parser


def train(args: argparse.Namespace, corpus: Corpus) -> ByteModel:
    """A small model with full attention."""
    config = Config(args.layers, args.width, args.heads, attention="full")
    settings = Settings(length=args.length, batch=4, steps=args.steps, seed=args.seed)
    print(f"training {args.layers} layers on {corpus.name}, {args.steps} steps", flush=True)
    trainer = Trainer(config, settings, corpus)
    if not trainer.train(None):
        raise KeyboardInterrupt
    return trainer.model


def sequences(data, length: int, number: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (number, length), evenly spaced from the byte `first` on."""
    starts = range(first, len(data) - length, max(1, (len(data) - length - first) // number))
    pairs = [pair(data, start, start + length) for start in starts[:number]]
    if not pairs:
        raise DataError(f"expected more than {first + length} bytes of text, got {len(data)}")
    return tuple(torch.stack(part) for part in zip(*pairs, strict=True))


def loss_of(model: ByteModel, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits(model: ByteModel, batch: tuple[torch.Tensor, torch.Tensor], patterns: list) -> float:
    """Bits per byte with these patterns, one for each layer."""
    for block, pattern in zip(model.blocks, patterns, strict=True):
        block.pattern = pattern
    return loss_of(model, batch).item() / math.log(2)


def choose_for_model(args: argparse.Namespace) -> dict[str, Recommendations]:
    """Patterns for each layer of a model trained here, and what they are worth."""
    corpus = load_corpus(args.text, args.length)
    model = train(args, corpus)
    half = len(corpus.held_out) // 2
    chosen_on = sequences(corpus.held_out[:half], args.length, args.samples)
    judged_on = sequences(corpus.held_out[half:], args.length, args.samples)
    with record_attention(model) as fitted_to:
        loss_of(model, sequences(corpus.train, args.length, args.samples)).backward()
    with record_attention(model) as measured, torch.no_grad():
        loss_of(model, chosen_on)
    results, by_gradient = {}, []
    for name, (sample,) in measured.items():
        inputs = (sample[part] for part in ("query", "key", "value"))
        results[name] = recommend_pattern(
            *inputs, args.budget, is_causal=True, samples=fitted_to[name]
        )
        by_gradient.append(within_budget(fitted_to[name], args))
    show(results, args.show)
    window = next(r.pattern for r in results["blocks.0"] if isinstance(r.pattern, Window))
    compared = {
        "full": [Causal()] * args.layers,
        "the best above": [result[0].pattern for result in results.values()],
        "blocks by gradient": by_gradient,
        repr(window): [window] * args.layers,
    }
    print("\nheld-out bits per byte, without further training")
    for name, patterns in compared.items():
        print(f"  {bits(model, judged_on, patterns):.3f}  {name}")
    return results


def within_budget(samples: list[dict], args: argparse.Namespace) -> Pattern:
    """The layout of the most important blocks of 4 that costs no more than the budget."""
    dense, density = Causal().cost(args.length).pairs * args.heads, min(args.budget, 1.0)
    while True:
        pattern = gradient_pattern(samples, block=4, density=density)
        if pattern.cost(args.length).pairs <= args.budget * dense or density < 1e-3:
            return pattern
        density *= 0.95


def choose_for_tensors(args: argparse.Namespace) -> dict[str, Recommendations]:
    """Patterns for the tensors of a file."""
    saved = torch.load(args.tensors, weights_only=True)
    try:
        inputs = [saved[name] for name in ("query", "key", "value")]
    except (KeyError, TypeError, IndexError):
        raise DataError(f"{args.tensors}: expected a dict of query, key and value") from None
    grouped = inputs[0].dim() == 4 and inputs[0].shape[1] != inputs[1].shape[1]
    results = {
        str(args.tensors): recommend_pattern(
            *inputs, args.budget, is_causal=args.causal, enable_gqa=grouped
        )
    }
    show(results, args.show)
    return results


def show(results: dict[str, Recommendations], most: int) -> None:
    for name, result in results.items():
        print(f"\n{name}\n{Recommendations(result[:most])}")


def draw(results: dict[str, Recommendations], most: int, path: Path) -> None:
    """For each layer the attention that each head keeps with each pattern."""
    shown = max(min(most, len(result)) for result in results.values())
    size = (11, (0.32 * shown + 1.2) * len(results))
    figure, panels = plt.subplots(len(results), figsize=size, squeeze=False, layout="constrained")
    for (name, result), ax in zip(results.items(), panels[:, 0], strict=True):
        best = result[:most]
        mass = [r.report.mass_per_head for r in best]
        image = ax.imshow(mass, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, numbers in enumerate(mass):
            for head, number in enumerate(numbers):
                color = "white" if number > 0.6 else "black"
                ax.text(head, row, f"{number:.2f}", ha="center", va="center", color=color)
        labels = [f"{r.report.method[:58]}  {r.share:.0%}" for r in best]
        ax.set_yticks(range(len(best)), labels, fontsize=7, family="monospace")
        ax.set(title=name, xlabel="head", xticks=range(len(mass[0])))
        figure.colorbar(image, ax=ax, label="mass kept")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.threads:
        set_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        results = (choose_for_tensors if args.tensors else choose_for_model)(args)
        draw(results, args.show, args.out / "patterns.png")
    except (DataError, ValueError, TypeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    print(f"\n{args.out / 'patterns.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
