"""Genomes: reading them, holding an end out, and drawing windows of either strand."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from long_text.data import HELD_OUT, Corpus, DataError, training_batch

BASES = b"ACGT"  # 0 to 3: a base and its complement add up to 3
SHIPPED = "tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"


def shipped_genome() -> Path:
    """The chromosome of Corynebacterium diphtheriae, 2.5 million bases, that pyrodigal ships."""
    found = importlib.util.find_spec("pyrodigal")
    path = Path(found.origin).parent / SHIPPED if found and found.origin else None
    if path is None or not path.exists():
        raise DataError(
            "the default genome comes with pyrodigal: pip install pyrodigal, or give --fasta FILE"
        )
    return path


def read_fasta(path: Path) -> np.ndarray:
    """The bases of a FASTA file, plain or gzipped, as numbers; all its sequences in a row.

    Letters that are none of the four bases are left out.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read --fasta {path}: {error}") from None
    lines = (line for line in text.upper().splitlines() if not line.startswith(b">"))
    letters = np.frombuffer(b"".join(lines), np.uint8)
    numbers = np.full(256, len(BASES), np.uint8)
    numbers[list(BASES)] = range(len(BASES))
    return numbers[letters][numbers[letters] < len(BASES)]


def load_genome(path: Path | None, length: int) -> Corpus:
    """Read `path`, or the genome that pyrodigal ships, and hold out whole windows at its end."""
    path = path or shipped_genome()
    bases = read_fasta(path)
    windows = int(len(bases) * HELD_OUT) // length
    if windows == 0:
        raise DataError(
            f"{path.name} has {len(bases)} bases, but --length {length} needs at least "
            f"{round(length / HELD_OUT)}: give a longer genome or a smaller --length"
        )
    cut = len(bases) - windows * length
    return Corpus(path.name, bases[:cut], bases[cut:])


def complement(bases: np.ndarray) -> np.ndarray:
    """The other strand, in its own direction."""
    return (3 - bases)[::-1]


def strand_batch(
    bases: np.ndarray, length: int, batch: int, step: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (batch, length) of one step, from a random strand: a function of (seed,
    step) alone."""
    other = np.random.default_rng([seed, step]).integers(2)
    return training_batch(complement(bases) if other else bases, length, batch, step, seed)
