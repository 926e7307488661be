"""Real text as bytes: loading it, splitting it, and drawing training windows from it."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HELD_OUT = 0.1  # the last tenth of the text


class DataError(Exception):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: what is trained on, and what follows it and is never trained on."""

    name: str
    train: np.ndarray
    held_out: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Tells this text from others."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()


def python_reference() -> bytes:
    """The Python language reference that CPython ships for `help()`, in sorted order of topics.

    Topics quote one another at length; every paragraph is kept once, so that nothing of the
    held-out end has been trained on word for word.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        raise DataError(
            "this Python does not ship pydoc_data.topics: give a text with --text FILE"
        ) from None
    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen or len(words) < 40:  # short ones are headings and code
                kept.append(paragraph)
            seen.add(words)
    return "\n\n".join(kept).encode()


def load_corpus(path: Path | None, length: int) -> Corpus:
    """Read `path` (or Python's reference) and hold its end out; windows have `length` bytes."""
    if path is None:
        name, text = "Python reference", python_reference()
    else:
        try:
            name, text = path.name, path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read --text {path}: {error.strerror}") from None
    cut = len(text) - int(len(text) * HELD_OUT)
    if cut < length + 1 or cut == len(text):
        needed = max(10, round((length + 1) / (1 - HELD_OUT)) + 1)
        raise DataError(
            f"{name} has {len(text)} bytes, but --length {length} needs at least {needed}: "
            "give a longer text or a smaller --length"
        )
    data = np.frombuffer(text, dtype=np.uint8)
    return Corpus(name, data[:cut], data[cut:])


def pair(data: np.ndarray, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [start, stop) as inputs and the bytes that follow each of them as targets."""
    window = torch.from_numpy(data[start : stop + 1].astype(np.int64))
    return window[:-1], window[1:]


def training_batch(
    data: np.ndarray, length: int, batch: int, step: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (batch, length) of one step: a function of (seed, step) alone.

    An epoch is the whole text, cut into windows from a random phase on and shuffled.
    """
    windows = max(1, (len(data) - 1) // length - 1)
    inputs, targets = [], []
    for number in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(number, windows)
        rng = np.random.default_rng([seed, epoch])
        phase = int(rng.integers(len(data) - windows * length))
        start = phase + int(rng.permutation(windows)[place]) * length
        x, y = pair(data, start, start + length)
        inputs.append(x)
        targets.append(y)
    return torch.stack(inputs), torch.stack(targets)


def held_out_windows(corpus: Corpus, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows that predict every held-out byte exactly once, the last one possibly shorter."""
    data = np.concatenate([corpus.train[-1:], corpus.held_out])
    ends = len(data) - 1
    return [pair(data, start, min(start + length, ends)) for start in range(0, ends, length)]
