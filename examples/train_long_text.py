"""Train a byte-level language model with sparse attention on real text, and show what it learned.

The model is Longformer's for text: every layer reads a causal window of the bytes before, with
dilations that grow with depth, and byte 0 of the window. It is trained on sequences of 4096
bytes of the Python reference that CPython ships (or on --text FILE), then measured on the last
tenth of the text, beside a model of two bytes of context. --compare trains it with each kind of
attention in turn: does sparsity keep the quality?
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from long_text import compare
from long_text.baseline import two_byte_bits
from long_text.command import (
    HelpFormatter,
    add_result_options,
    add_size_options,
    add_training_options,
    count,
    positive,
    prepare,
    start_and_run,
    summarize,
    train_and_report,
)
from long_text.data import load_corpus
from long_text.model import ATTENTIONS, Config, build_model
from long_text.plots import save_figure
from long_text.sample import generate
from long_text.training import Settings, Trainer

__all__ = ["Config", "build_model", "main"]


def make_parser() -> argparse.ArgumentParser:
    """All options; the defaults of the model and of the training are those of their classes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # --compare hands the options on
    )
    config, settings, whole = Config(), Settings(), positive(int)
    add = parser.add_argument_group("text").add_argument
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="train on this file instead of the Python reference",
    )
    add("--length", type=whole, default=settings.length, help="bytes of a sequence")
    add("--batch", type=whole, default=settings.batch, help="sequences of a step")
    add = parser.add_argument_group("model").add_argument
    add("--attention", choices=ATTENTIONS, default=config.attention,
        help="the pattern of all layers; full: scaled_dot_product_attention")  # fmt: skip
    add_size_options(add, config)
    add("--window", type=whole, default=config.window, help="keys to the left, or the stride")
    steps = f" (default: {settings.steps}, with --compare {compare.STEPS})"
    add_training_options(parser, settings, steps)
    add = add_result_options(parser, "runs/long_text")
    add("--prompt", default="The ", help="the sample goes on from here")
    add("--sample-bytes", type=count, default=300, help="length of the sample")
    add("--compare", action="store_true",
        help="train with each attention instead, and compare quality, time and memory")  # fmt: skip
    add("--measure", action="store_true", help=argparse.SUPPRESS)  # one row of --compare
    return parser


def describe(trainer: Trainer) -> None:
    """Say what is about to be trained."""
    config, corpus, settings = trainer.model.config, trainer.corpus, trainer.settings
    size = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{corpus.name}: {len(corpus.train)} bytes to train on, {len(corpus.held_out)} held out\n"
        f"{size / 1e6:.1f} M parameters, {config.layers} layers of {config.heads} heads, "
        f"sequences of {settings.length} bytes"
    )
    for layer in range(config.layers):
        print(f"  layer {layer + 1}: {config.pattern(layer)}")
    sys.stdout.flush()


def printable(text: bytes) -> str:
    """Text that is safe to show on a terminal, whatever the model wrote."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)


def report(trainer: Trainer, args: argparse.Namespace) -> bool:
    """Measure, sample and draw a trained model; returns whether it beat the baseline."""
    corpus, settings = trainer.corpus, trainer.settings
    bits = trainer.held_out_bits()
    baseline = two_byte_bits(corpus.train, corpus.held_out)
    what = f"text, {len(corpus.held_out)} bytes"
    summarize(trainer, args, what, bits, "two bytes of context", baseline)
    prompt = args.prompt.encode(errors="surrogateescape")
    text = generate(trainer.model, prompt, args.sample_bytes, settings.seed)
    sample = printable(prompt + text)
    if args.sample_bytes:
        print(f"\na sample:\n{sample}\n")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    save_figure(args.out / "training.png", trainer.history, baseline, trainer.model.config)
    print(f"{args.out}: training.png, results.json, sample.txt, checkpoint.pt")
    return bits < baseline


def run(trainer: Trainer, args: argparse.Namespace) -> int:
    """Train and report; returns the exit status."""
    if args.measure:
        print(json.dumps(compare.measure(trainer)))
        return 0
    return train_and_report(trainer, args, describe, report, "text", "two bytes of context")


def start(args: argparse.Namespace) -> Trainer:
    """The trainer that the options ask for, new or resumed."""
    return prepare(
        args,
        Trainer,
        lambda config, settings: load_corpus(args.text, settings.length),
        keep_old=not args.measure,
    )


def comparison(args: argparse.Namespace) -> Callable[[], int]:
    """What trains with each attention and returns the exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(args.text, args.length)
    baseline = two_byte_bits(corpus.train, corpus.held_out)
    own = [word for word in sys.argv[1:] if word not in ("--compare", "--resume")]
    own += ["--steps", str(args.steps)]
    return partial(compare.compare, Path(__file__), own, args.out, baseline)


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.compare and args.minutes:
        parser.error("--compare trains all for as many steps: give --steps instead of --minutes")
    args.steps = args.steps or (compare.STEPS if args.compare else Settings().steps)
    return start_and_run(
        parser,
        args,
        lambda: comparison(args) if args.compare else partial(run, start(args), args),
    )


if __name__ == "__main__":
    sys.exit(main())
