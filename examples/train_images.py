"""Train an autoregressive model of grayscale images, pixel by pixel, with sparse attention.

The model is a Sparse Transformer: its strided pattern lets a pixel see the last row's worth of
pixels, and those right above it. It is trained on crops of 96 x 96 pixels, sequences of 9216, of
the photograph that matplotlib ships (or on --images FOLDER), then measured on a part of it that no
training crop touches, beside an adaptive histogram of each pixel given its neighbors.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from images.baseline import histogram_bits
from images.data import load_photos
from images.model import Config
from images.plots import save_figure
from images.training import Settings, Trainer
from long_text.command import HelpFormatter, checkpoint_path, count, positive, prepare
from long_text.data import DataError
from long_text.measure import peak_memory
from long_text.training import set_threads


def make_parser() -> argparse.ArgumentParser:
    """All options; the defaults of the model and of the training are those of their classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    config, settings, whole = Config(), Settings(), positive(int)
    add = parser.add_argument_group("images").add_argument
    add("--images", type=Path, metavar="FOLDER",
        help="train on the images of this folder; every tenth one is held out")  # fmt: skip
    add("--side", type=whole, default=config.side, help="rows and columns of a crop")
    add("--batch", type=whole, default=settings.batch, help="crops of a step")
    add = parser.add_argument_group("model").add_argument
    add("--attention", choices=["split", "union", "full"], default=config.attention,
        help="the parts of Strided(side) on separate heads, or both on all; full")  # fmt: skip
    add("--layers", type=whole, default=config.layers, help="blocks")
    add("--width", type=whole, default=config.width, help="channels of the stream")
    add("--heads", type=whole, default=config.heads, help="attention heads")
    add("--recompute", action="store_true", help="less memory, more time, the same numbers")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=whole, default=settings.steps, help="updates")
    add("--minutes", type=positive(float),
        help="as many updates as fit into about so many minutes, instead of --steps")  # fmt: skip
    add("--learning-rate", type=positive(float), default=settings.learning_rate, help="at its top")
    add("--seed", type=count, default=settings.seed, help="of weights and crops (default: 0)")
    add("--threads", type=whole, help="CPU threads instead of torch's choice")
    add = parser.add_argument_group("result").add_argument
    add("--out", type=Path, default=Path("runs/images"), help="directory for all results")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--check", action="store_true", help="exit with 1 if the model does not beat the baseline")
    return parser


def describe(trainer: Trainer) -> None:
    """Say what is about to be trained."""
    config, photos = trainer.model.config, trainer.corpus
    size = sum(p.numel() for p in trainer.model.parameters())
    pixels = sum(image.size for image in photos.train)
    print(
        f"{photos.name}: {pixels} pixels to train on, {len(photos.held_out)} crops of "
        f"{config.side} x {config.side} held out\n"
        f"{size / 1e6:.1f} M parameters, {config.layers} layers of {config.heads} heads, "
        f"sequences of {trainer.length} pixels\n"
        f"  {config.pattern}",
        flush=True,
    )


def report(trainer: Trainer, args: argparse.Namespace) -> bool:
    """Measure and draw a trained model; returns whether it beat the baseline."""
    photos, history = trainer.corpus, trainer.history
    bits = trainer.held_out_map().numpy()
    baseline = histogram_bits(photos.train, photos.held_out)
    history.held_out.append((trainer.step, bits.mean()))
    speed = len(history.train) * trainer.settings.batch * trainer.length / history.seconds
    print(
        f"\nheld-out pixels, {bits.size}:\n"
        f"  this model          {bits.mean():.3f} bits/pixel\n"
        f"  adaptive histogram  {baseline.mean():.3f} bits/pixel\n"
        f"{trainer.step} steps in {history.seconds:.0f} s, {speed / 1e3:.1f} kpixels/s, "
        f"peak memory {peak_memory() / 2**20:.0f} MiB"
    )
    results = {
        "held_out_bits": float(bits.mean()),
        "baseline_bits": float(baseline.mean()),
        "seconds": history.seconds,
        "pixels_per_second": speed,
        "peak_memory": peak_memory(),
        "config": asdict(trainer.model.config),
        "settings": asdict(trainer.settings),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    save_figure(args.out / "training.png", history, photos.held_out, bits, baseline)
    print(f"{args.out}: training.png, results.json, checkpoint.pt")
    return bool(bits.mean() < baseline.mean())


def run(trainer: Trainer, args: argparse.Namespace) -> int:
    """Train and report; returns the exit status."""
    describe(trainer)
    if not trainer.train(checkpoint_path(args)):
        images = f" --images {args.images}" if args.images else ""
        print(f"Stopped at step {trainer.step}. To go on: --resume --out {args.out}{images}")
        return 130
    if report(trainer, args):
        return 0
    print("The model did not beat the histogram: train it longer (--steps).")
    return 1 if args.check else 0


def main() -> int:
    """The command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.threads:
        set_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = prepare(
            args, Trainer, lambda config, settings: load_photos(args.images, config.side)
        )
    except (DataError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        return run(trainer, args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
