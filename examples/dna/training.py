"""Training on windows of a genome, with the loop of the long-text example."""

import math

import torch
import torch.nn.functional as F
from long_text import training
from long_text.data import held_out_windows
from long_text.training import BaseSettings as Settings

from dna.data import strand_batch
from dna.model import Config, DnaModel


class Trainer(training.Trainer):
    """Trains a model of DNA on both strands of a genome."""

    Config, Settings, unit = Config, Settings, "base"
    build_model = staticmethod(DnaModel)

    @property
    def length(self) -> int:
        """Bases of a sequence."""
        return self.model.config.length

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (batch, length) of this step."""
        s = self.settings
        return strand_batch(self.corpus.train, self.length, s.batch, self.step, s.seed)

    @torch.no_grad()
    def held_out_map(self) -> torch.Tensor:
        """Bits of every held-out base, (windows, length): each window starts without context."""
        rows = [
            F.cross_entropy(self.model(inputs[None])[0], targets, reduction="none")
            for inputs, targets in held_out_windows(self.corpus, self.length)
        ]
        return torch.stack(rows) / math.log(2)

    def held_out_bits(self) -> float:
        """Mean bits of the held-out bases."""
        return self.held_out_map().mean().item()
