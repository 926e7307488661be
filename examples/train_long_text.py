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
from dataclasses import asdict
from functools import partial
from pathlib import Path

from long_text import compare
from long_text.baseline import two_byte_bits
from long_text.command import HelpFormatter, checkpoint_path, count, positive, prepare
from long_text.data import DataError, load_corpus
from long_text.measure import peak_memory
from long_text.model import ATTENTIONS, Config, build_model
from long_text.plots import save_figure
from long_text.sample import generate
from long_text.training import Settings, Trainer, set_threads

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
    add("--layers", type=whole, default=config.layers, help="blocks")
    add("--width", type=whole, default=config.width, help="channels of the stream")
    add("--heads", type=whole, default=config.heads, help="attention heads")
    add("--window", type=whole, default=config.window, help="keys to the left, or the stride")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=whole,
        help=f"updates (default: {settings.steps}, with --compare {compare.STEPS})")  # fmt: skip
    add("--minutes", type=positive(float),
        help="as many updates as fit into about so many minutes, instead of --steps")  # fmt: skip
    add("--learning-rate", type=positive(float), default=settings.learning_rate, help="at its top")
    add("--seed", type=count, default=settings.seed, help="of weights, data, sample (default: 0)")
    add("--threads", type=whole, help="CPU threads instead of torch's choice")
    add = parser.add_argument_group("result").add_argument
    add("--out", type=Path, default=Path("runs/long_text"), help="directory for all results")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--prompt", default="The ", help="the sample goes on from here")
    add("--sample-bytes", type=count, default=300, help="length of the sample")
    add("--check", action="store_true", help="exit with 1 if the model does not beat the baseline")
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
    corpus, settings, history = trainer.corpus, trainer.settings, trainer.history
    bits = trainer.held_out_bits()
    baseline = two_byte_bits(corpus.train, corpus.held_out)
    history.held_out.append((trainer.step, bits))
    speed = len(history.train) * settings.batch * settings.length / history.seconds
    print(
        f"\nheld-out text, {len(corpus.held_out)} bytes:\n"
        f"  this model            {bits:.3f} bits/byte\n"
        f"  two bytes of context  {baseline:.3f} bits/byte\n"
        f"{trainer.step} steps in {history.seconds:.0f} s, {speed / 1e3:.1f} kB/s, "
        f"peak memory {peak_memory() / 2**20:.0f} MiB"
    )
    prompt = args.prompt.encode(errors="surrogateescape")
    text = generate(trainer.model, prompt, args.sample_bytes, settings.seed)
    sample = printable(prompt + text)
    if args.sample_bytes:
        print(f"\na sample:\n{sample}\n")
    results = {
        "held_out_bits": bits,
        "baseline_bits": baseline,
        "seconds": history.seconds,
        "bytes_per_second": speed,
        "peak_memory": peak_memory(),
        "config": asdict(trainer.model.config),
        "settings": asdict(settings),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    save_figure(args.out / "training.png", history, baseline, trainer.model.config)
    print(f"{args.out}: training.png, results.json, sample.txt, checkpoint.pt")
    return bits < baseline


def run(trainer: Trainer, args: argparse.Namespace) -> int:
    """Train and report; returns the exit status."""
    if args.measure:
        print(json.dumps(compare.measure(trainer)))
        return 0
    describe(trainer)
    if not trainer.train(checkpoint_path(args)):
        text = f" --text {args.text}" if args.text else ""
        print(f"Stopped at step {trainer.step}. To go on: --resume --out {args.out}{text}")
        return 130
    if report(trainer, args):
        return 0
    print("The model did not beat two bytes of context: train it longer (--steps).")
    return 1 if args.check else 0


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
    if args.threads:
        set_threads(args.threads)
    try:
        if not args.measure:
            args.out.mkdir(parents=True, exist_ok=True)
        job = comparison(args) if args.compare else partial(run, start(args), args)
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        return job()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
