"""Long documents with labels that every machine has: C++, Python, and English prose."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from long_text.data import DataError, python_reference

PAD, CLS, FIRST_BYTE = 1, 0, 3  # token ids; 1 is where transformers' Longformer expects padding
VOCABULARY = FIRST_BYTE + 256
EACH, HELD_OUT = 100, 16  # documents of a kind, and how many of them are held out


@dataclass(frozen=True)
class Documents:
    """Token ids (documents, length), and the number of each one's kind."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def batch(self, size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Documents of one step: a function of (seed, step) alone."""
        chosen = np.random.default_rng([seed, step]).choice(len(self.labels), size, replace=False)
        return self.tokens[chosen], self.labels[chosen]


def _sources(folder: Path, suffix: str, rng: np.random.Generator) -> Iterator[bytes]:
    """The files of a folder, in random order."""
    paths = sorted(folder.rglob(f"*{suffix}"))
    paths = [path for path in paths if "site-packages" not in path.relative_to(folder).parts]
    return (paths[number].read_bytes() for number in rng.permutation(len(paths)))


def _passages(text: bytes, length: int, rng: np.random.Generator) -> Iterator[bytes]:
    """A text cut in pieces, in random order."""
    starts = range(0, len(text), length)
    return (text[starts[number] :][:length] for number in rng.permutation(len(starts)))


def sources(length: int, seed: int) -> dict[str, Iterator[bytes]]:
    """For each kind its documents: headers of torch, modules of CPython, and its reference."""
    rng = np.random.default_rng(seed)
    return {
        "C++": _sources(Path(torch.__file__).parent / "include", ".h", rng),
        "Python": _sources(Path(os.__file__).parent, ".py", rng),
        "prose": _passages(python_reference(), length, rng),
    }


KINDS = ("C++", "Python", "prose")


def encode(text: bytes, length: int) -> torch.Tensor:
    """[CLS] and the last bytes of a file, which hold no license header; padded on the right."""
    kept = np.frombuffer(text[-(length - 1) :], np.uint8)
    tokens = torch.full((length,), PAD)
    tokens[0] = CLS
    tokens[1 : len(kept) + 1] = torch.from_numpy(kept.astype(np.int64)) + FIRST_BYTE
    return tokens


def load_documents(length: int, seed: int) -> tuple[Documents, Documents]:
    """Documents to train on and held-out ones, as many of each kind, half as long or longer."""
    train, held_out = [], []
    for label, (kind, texts) in enumerate(sources(length, seed).items()):
        long = (text[1 - length :] for text in texts if 2 * len(text) >= length)
        ends = dict.fromkeys(islice(long, 2 * EACH))  # some headers differ in their start alone
        coded = [(encode(end, length), label) for end in islice(ends, EACH)]
        if len(coded) < 2 * HELD_OUT:
            raise DataError(f"only {len(coded)} documents of {kind} are installed here")
        held_out += coded[:HELD_OUT]
        train += coded[HELD_OUT:]
    return _join(train), _join(held_out)


def _join(coded: list[tuple[torch.Tensor, int]]) -> Documents:
    tokens, labels = zip(*coded, strict=True)
    return Documents(torch.stack(tokens), torch.tensor(labels))
