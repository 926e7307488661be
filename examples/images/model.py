"""An autoregressive model of grayscale images with the Sparse Transformer's blocks."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from images.coding import residuals
from sparse_attn import Causal, Pattern, PerHead, SparseTransformerBlock, Strided

LEVELS = 256
START = 256  # stands for what comes before the first pixel


@dataclass(frozen=True)
class Config:
    """The shape of the model. `attention` is "split" (the two sets of the strided pattern on
    different heads), "union" (both on all heads) or "full"."""

    side: int = 96
    layers: int = 4
    width: int = 64
    heads: int = 4
    attention: str = "split"
    recompute: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"expected a width that is a multiple of heads = {self.heads}, got {self.width}"
            )
        if self.attention == "split" and self.heads % 2:
            raise ValueError(f"expected an even number of heads to split, got {self.heads}")
        if self.attention not in ("split", "union", "full"):
            raise ValueError(
                f"expected attention 'split', 'union' or 'full', got {self.attention!r}"
            )

    @property
    def pattern(self) -> Pattern:
        """Who sees whom: the last `side` pixels, and those right above (section 4.2)."""
        strided = Strided(self.side)
        kinds = {"split": PerHead(strided.factors), "union": strided, "full": Causal()}
        return kinds[self.attention]


class ImageModel(nn.Module):
    """Pixels (B, side, side) to the logits (B, side², 256) of each residual, given all pixels
    before it in raster order.

    Each position is given the gray level and the residual of the pixel before it, its row and its
    column (section 5.3); all else comes through attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.width
        self.level = nn.Embedding(LEVELS + 1, width)
        self.residual = nn.Embedding(LEVELS + 1, width)
        self.row = nn.Embedding(config.side, width)
        self.column = nn.Embedding(config.side, width)
        self.blocks = nn.ModuleList(
            SparseTransformerBlock(
                width,
                config.heads,
                pattern=config.pattern,
                num_layers=config.layers,
                recompute=config.recompute,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, LEVELS)
        self._initialize()

    def _initialize(self) -> None:
        """The part of section 6 that is not the blocks' own."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.125 / math.sqrt(self.config.width))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, side², width), each position from the pixels before it alone."""
        place = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)
        tables = ((self.level, pixels), (self.residual, residuals(pixels)))
        return place + sum(
            table(F.pad(values.flatten(1)[:, :-1], (1, 0), value=START)) for table, values in tables
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))

    def bits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bits of each pixel, (B, side, side)."""
        targets = residuals(pixels).flatten(1)
        nats = F.cross_entropy(self(pixels).transpose(1, 2), targets, reduction="none")
        return nats.view_as(pixels) / math.log(2)


def build_model(config: Config | None = None) -> ImageModel:
    """A freshly initialized model of this shape (of the default one without a `config`)."""
    return ImageModel(config or Config())
