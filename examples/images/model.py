"""An autoregressive model of grayscale images with the Sparse Transformer's blocks."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from images.coding import residuals, shifted
from sparse_attn import Causal, Pattern, PerHead, SparseTransformerBlock, Strided

LEVELS = 256
OUTSIDE = 256  # stands for a neighbor that the image does not have
# Rows down and columns right, of pixels that come before in raster order.
BEFORE = ((0, 1), (1, 1), (1, 0), (1, -1))


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

    A pixel enters as the gray level to its left, the residuals of its four neighbors that come
    before, and its row and column (section 5.3).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.width
        self.level = nn.Embedding(LEVELS + 1, width)
        self.residuals = nn.ModuleList(nn.Embedding(LEVELS + 1, width) for _ in BEFORE)
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
        x = self.row.weight[:, None] + self.column.weight
        x = x + self.level(shifted(pixels, 0, 1, OUTSIDE))
        coded = residuals(pixels)
        for table, offset in zip(self.residuals, BEFORE, strict=True):
            x = x + table(shifted(coded, *offset, OUTSIDE))
        return x.flatten(1, 2)

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
