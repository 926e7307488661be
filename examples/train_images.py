"""Train an autoregressive model of grayscale images, pixel by pixel, with sparse attention.

The model is a Sparse Transformer: its strided pattern lets a pixel see the last row's worth of
pixels, and those right above it. It is trained on crops of 96 x 96 pixels, sequences of 9216, of
the photograph that matplotlib ships (or on --images FOLDER), then measured on a part of it that no
training crop touches, beside an adaptive histogram of each pixel given its neighbors.
"""

import argparse
import sys
from pathlib import Path

from images.baseline import histogram_bits
from images.data import load_photos
from images.model import Config
from images.plots import save_figure
from images.training import Settings, Trainer
from long_text.command import (
    HelpFormatter,
    add_result_options,
    add_size_options,
    add_training_options,
    positive,
    summarize,
    train_main,
)


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
    add_size_options(add, config)
    add("--recompute", action="store_true", help="less memory, more time, the same numbers")
    add_training_options(parser, settings)
    add_result_options(parser, "runs/images")
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
    photos = trainer.corpus
    bits = trainer.held_out_map().numpy()
    baseline = histogram_bits(photos.train, photos.held_out)
    name = "adaptive histogram"
    summarize(trainer, args, f"pixels, {bits.size}", bits.mean(), name, baseline.mean())
    save_figure(args.out / "training.png", trainer.history, photos.held_out, bits, baseline)
    print(f"{args.out}: training.png, results.json, checkpoint.pt")
    return bool(bits.mean() < baseline.mean())


def main() -> int:
    """The command line."""
    return train_main(
        make_parser(),
        Trainer,
        lambda folder, config: load_photos(folder, config.side),
        describe,
        report,
        "images",
        "the histogram",
    )


if __name__ == "__main__":
    sys.exit(main())
