"""Training one model, with one method of attention."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from long_text.measure import peak_memory
from long_text.training import CLIPPED_NORM, WARMUP
from torch import nn
from tqdm import tqdm

from recall.data import Recall
from recall.methods import METHODS
from recall.model import Model

HELD_OUT = 32  # sequences that no step trains on


@dataclass
class Settings:
    """What decides the numbers of a run."""

    length: int = 2048
    keys: int = 64
    layers: int = 1
    width: int = 64
    heads: int = 4
    batch: int = 4
    steps: int = 300
    learning_rate: float = 1e-2
    seed: int = 0

    @property
    def task(self) -> Recall:
        """The task of this size: every key is asked for."""
        return Recall(self.length, self.keys, questions=self.keys)


def build_model(method: str, settings: Settings) -> Model:
    """The model with this method; what reads and answers starts equal for all methods."""
    s = settings
    torch.manual_seed(s.seed)
    return Model(s.task, s.width, s.layers, lambda: METHODS[method](s.width, s.heads, s.length))


def losses(model: Model, settings: Settings) -> Iterator[tuple[float, float]]:
    """The loss of each step, and its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(settings.steps):
        tokens, answers = settings.task.batch(settings.batch, step, settings.seed)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1, (step + 1) / WARMUP)
        start = time.perf_counter()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        (loss + model.auxiliary_loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: Model, settings: Settings) -> float:
    """The share of questions answered right, in sequences of another seed."""
    model.eval()
    found = []
    for step in range(-(-HELD_OUT // settings.batch)):
        tokens, answers = settings.task.batch(settings.batch, step, settings.seed + 1)
        found.append(model(tokens).argmax(-1) == answers)
    return torch.cat(found).double().mean().item()


def measure(method: str, settings: Settings) -> dict:
    """Train with one of METHODS: losses, seconds of the steps, memory, and accuracy."""
    model = build_model(method, settings).train()
    before, took = peak_memory(), []
    bar = tqdm(losses(model, settings), desc=method, total=settings.steps, unit="step")
    for loss, seconds in bar:
        took.append((loss, seconds))
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return {
        "losses": [loss for loss, _ in took],
        "seconds": [seconds for _, seconds in took],
        "training_memory": peak_memory() - before,
        "accuracy": accuracy(model, settings),
    }
