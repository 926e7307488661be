"""Patterns that are drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_attn.patterns import arguments
from sparse_attn.patterns.base import Pattern


@dataclass(frozen=True, repr=False)
class Seeded(Pattern):
    """A pattern with a field `seed`, which decides its draw."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", arguments.seed(self.seed))
        super().__post_init__()

    def reseeded(self, seed: int) -> Pattern:
        return replace(self, seed=arguments.wrap_seed(self.seed + arguments.seed(seed)))
