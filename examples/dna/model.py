"""A causal language model of DNA whose heads look back at different dilations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from long_text.model import Stack, check_pairs
from torch import nn

from sparse_attn import Causal, Global, Pattern, PerHead, Window

BASES = 4


@dataclass(frozen=True)
class Config:
    """The shape of the model."""

    length: int = 16384
    layers: int = 3
    width: int = 96
    heads: int = 4
    window: int = 64
    landmark: int = 1024
    attention: str = "dilated"

    def __post_init__(self):
        check_pairs(self.width, self.heads)

    @property
    def dilations(self) -> list[int]:
        """Of the heads: 1, then 3, 12, 48, ..., whole codons, so that a gene keeps its phase."""
        return [1] + [3 * 4**head for head in range(self.heads - 1)]

    def pattern(self, layer: int) -> Pattern:
        """The pairs that every layer may look at, all to the left: windows with a dilation for each
        head, and the landmarks, bases that see everything before them and are seen from then on."""
        landmarks = Global(range(0, self.length, self.landmark))
        windows = (Window(self.window, 0, dilation=dilation) for dilation in self.dilations)
        return PerHead([(window | landmarks) & Causal() for window in windows])


class WordEmbedding(nn.Module):
    """The sum of embeddings of the words of 1, 3, 6 and 8 bases that end with each base."""

    SIZES = (1, 3, 6, 8)

    def __init__(self, width: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(BASES**size, width) for size in self.SIZES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, code = 0, torch.zeros_like(tokens)
        for back in range(max(self.SIZES)):
            before = F.pad(tokens, (back, 0))[:, : tokens.shape[1]]
            code = code + before * BASES**back
            if back + 1 in self.SIZES:
                x = x + self.tables[self.SIZES.index(back + 1)](code)
        return x


class DnaModel(Stack):
    """Bases (B, N) to the logits (B, N, 4) of the base after each."""

    def __init__(self, config: Config):
        super().__init__(config, WordEmbedding(config.width))
        self.output = nn.Linear(config.width, BASES)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        turns = self.turns(0, tokens.shape[1], tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turns)
        return self.output(self.norm(x))
