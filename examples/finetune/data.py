"""Long documents with labels that every machine has: source files, and the package of each."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from long_text.data import DataError

PACKAGES = ("stdlib", "numpy", "torch", "transformers")
LEAST = 2000  # bytes of a file that counts
PAD, CLS, FIRST_BYTE = 1, 0, 3  # token ids; 1 is where transformers' Longformer expects padding
VOCABULARY = FIRST_BYTE + 256
HELD_OUT = 64


@dataclass(frozen=True)
class Documents:
    """Token ids (documents, length), and the number of each one's package."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def batch(self, size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Documents of one step: a function of (seed, step) alone."""
        chosen = np.random.default_rng([seed, step]).choice(len(self.labels), size, replace=False)
        return self.tokens[chosen], self.labels[chosen]


def _folder(package: str) -> Path:
    found = Path(os.__file__) if package == "stdlib" else None
    if found is None:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(f"{package} is needed: pip install {package}")
        found = Path(spec.origin)
    return found.parent


def _files(package: str, most: int, rng: np.random.Generator) -> list[bytes]:
    """At most `most` source files of a package, in random order."""
    folder = _folder(package)
    paths = sorted(
        path
        for path in folder.rglob("*.py")
        if "site-packages" not in path.relative_to(folder).parts
    )
    texts: list[bytes] = []
    for number in rng.permutation(len(paths)):
        text = paths[number].read_bytes()
        if len(text) >= LEAST:
            texts.append(text)
        if len(texts) == most:
            break
    return texts


def encode(text: bytes, length: int) -> torch.Tensor:
    """[CLS] and the last bytes of a file, which hold no license header; padded on the right."""
    kept = np.frombuffer(text[-(length - 1) :], np.uint8)
    tokens = torch.full((length,), PAD)
    tokens[0] = CLS
    tokens[1 : len(kept) + 1] = torch.from_numpy(kept.astype(np.int64)) + FIRST_BYTE
    return tokens


def load_documents(length: int, seed: int, each: int = 150) -> tuple[Documents, Documents]:
    """Documents to train on and held-out ones, as many of each package."""
    rng = np.random.default_rng(seed)
    train, held_out = [], []
    for label, package in enumerate(PACKAGES):
        coded = [(encode(text, length), label) for text in _files(package, each, rng)]
        own = HELD_OUT // len(PACKAGES)
        held_out += coded[:own]
        train += coded[own:]
    return tuple(
        Documents(torch.stack([t for t, _ in part]), torch.tensor([label for _, label in part]))
        for part in (train, held_out)
    )
