"""Training on crops, with the loop of the long-text example."""

from dataclasses import dataclass

import torch
from long_text import training

from images.coding import residuals
from images.data import as_pixels, training_crops
from images.model import Config, build_model


@dataclass
class Settings(training.BaseSettings):
    """Those of all training, over more steps."""

    steps: int = 800


class Trainer(training.Trainer):
    """Trains an image model on crops of photographs."""

    Config, Settings, unit = Config, Settings, "pixel"
    build_model = staticmethod(build_model)

    @property
    def length(self) -> int:
        """Pixels of a sequence."""
        return self.model.config.side**2

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (batch, side, side) of this step, and the residuals to predict."""
        s, side = self.settings, self.model.config.side
        pixels = training_crops(self.corpus.train, side, s.batch, self.step, s.seed)
        return pixels, residuals(pixels).flatten(1)

    @torch.no_grad()
    def held_out_map(self) -> torch.Tensor:
        """Bits of every pixel of the held-out crops, (crops, side, side)."""
        crops = as_pixels(self.corpus.held_out)
        return torch.cat([self.model.bits(crop) for crop in crops.split(1)])

    def held_out_bits(self) -> float:
        """Mean bits per pixel of the held-out crops."""
        return self.held_out_map().mean().item()
