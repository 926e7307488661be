"""Associative recall: facts stand in the first half of a long sequence, its last tokens ask for
them."""

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = 0  # the key of a filler, the value of a question


@dataclass(frozen=True)
class Recall:
    """The task. A token is a key and a value: a fact has both, a filler only a value, a question
    only a key, whose value is to be told. Values are drawn anew for each sequence.

    Facts fill the first half, each told as often as it fits, in random order; then come fillers up
    to the questions. So the answer is always far, and which token has it depends on what it says.
    """

    length: int = 2048
    keys: int = 128
    values: int = 16
    questions: int = 64

    def __post_init__(self):
        if not self.questions <= self.keys <= self.length // 2:
            raise ValueError(
                "expected questions ≤ keys ≤ length / 2, got "
                f"{self.questions}, {self.keys} and {self.length}"
            )

    def batch(self, size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens (size, length, 2), keys and values, of one step, and the answers (size, questions)
        from 0 to values - 1; the same ones for the same step and seed."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        facts, fillers = self.length // 2, (self.length + 1) // 2 - self.questions
        told = 1 + _shuffled(size, facts, generator) % self.keys
        asked = 1 + _shuffled(size, self.keys, generator)[:, : self.questions]
        known = torch.randint(1, self.values + 1, (size, self.keys + 1), generator=generator)
        noise = torch.randint(1, self.values + 1, (size, fillers), generator=generator)
        keys = torch.cat([told, torch.full_like(noise, NOTHING), asked], 1)
        values = torch.cat([known.gather(1, told), noise, torch.full_like(asked, NOTHING)], 1)
        return torch.stack([keys, values], -1), known.gather(1, asked) - 1


def _shuffled(size: int, count: int, generator: torch.Generator) -> Tensor:
    """(size, count): 0 to count - 1 in random order."""
    return torch.rand(size, count, generator=generator).argsort(1)
