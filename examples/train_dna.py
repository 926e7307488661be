"""Train a causal language model of DNA, 16384 bases a sequence, with dilated and global attention.

Each head looks back through a window of another dilation, multiples of three bases from the second
head on, since codons have three; all see the landmarks, every 1024th base, which see all before
them. It is trained on both strands of the chromosome of Corynebacterium diphtheriae that pyrodigal
ships (pip install pyrodigal; it does not run) or on --fasta FILE, then measured on the last tenth
of it, beside the best Markov model of 0 to 11 bases of context.
"""

import argparse
import sys
from pathlib import Path

from dna.baseline import markov_bits
from dna.data import load_genome
from dna.model import Config
from dna.plots import save_figure
from dna.training import Settings, Trainer
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
    add = parser.add_argument_group("genome").add_argument
    add("--fasta", type=Path, metavar="FILE",
        help="train on this file, gzipped or not; its last tenth is held out")  # fmt: skip
    add("--length", type=whole, default=config.length, help="bases of a sequence")
    add("--batch", type=whole, default=settings.batch, help="sequences of a step")
    add = parser.add_argument_group("model").add_argument
    add_size_options(add, config)
    add("--window", type=whole, default=config.window, help="keys of a head to the left")
    add("--landmark", type=whole, default=config.landmark, help="bases from one to the next")
    add_training_options(parser, settings)
    add_result_options(parser, "runs/dna")
    return parser


def describe(trainer: Trainer) -> None:
    """Say what is about to be trained."""
    config, genome = trainer.model.config, trainer.corpus
    size = sum(p.numel() for p in trainer.model.parameters())
    pairs = config.pattern(0).cost(config.length).pairs / config.heads / config.length
    print(
        f"{genome.name}: {len(genome.train)} bases to train on, {len(genome.held_out)} held out\n"
        f"{size / 1e6:.1f} M parameters, {config.layers} layers, sequences of {config.length} "
        f"bases, {pairs:.0f} keys a query\n"
        f"  heads with windows of {config.window} keys, dilated by {config.dilations}; a landmark "
        f"every {config.landmark} bases",
        flush=True,
    )


def report(trainer: Trainer, args: argparse.Namespace) -> bool:
    """Measure and draw a trained model; returns whether it beat the baseline."""
    genome = trainer.corpus
    bits = trainer.held_out_map().numpy()
    order, baseline = markov_bits(genome.train, genome.held_out)
    name = f"{order} bases of context"
    summarize(trainer, args, f"bases, {bits.size}", bits.mean(), name, baseline.mean())
    save_figure(
        args.out / "training.png", trainer.history, bits, baseline.reshape(bits.shape), name
    )
    print(f"{args.out}: training.png, results.json, checkpoint.pt")
    return bool(bits.mean() < baseline.mean())


def main() -> int:
    """The command line."""
    return train_main(
        make_parser(),
        Trainer,
        lambda path, config: load_genome(path, config.length),
        describe,
        report,
        "fasta",
        "the Markov model",
    )


if __name__ == "__main__":
    sys.exit(main())
