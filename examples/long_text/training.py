"""Training that can stop at any step and go on from there as if it had not."""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from long_text.data import Corpus, held_out_windows, training_batch
from long_text.measure import peak_memory
from long_text.model import Config, build_model

WARMUP = 20
EVALUATIONS = 8
CLIPPED_NORM = 1.0  # longer gradients are scaled down to it
CALIBRATION = 10  # steps that are timed before --minutes becomes a number of steps


@dataclass
class BaseSettings:
    """What decides the numbers of a run, besides the shape of the model and the data."""

    batch: int = 1
    steps: int = 300
    minutes: float | None = None
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass
class Settings(BaseSettings):
    """Those of a text, with the bytes of a sequence."""

    length: int = 4096


@dataclass
class History:
    """What the curves are drawn from; losses in bits per byte, gradient norms before clipping."""

    train: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def learning_rate(step: int, settings: BaseSettings) -> float:
    """A linear warm-up, then a half cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))
    return settings.learning_rate * warm * (0.05 + 0.95 * cosine)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; the matrices of the blocks decay, embeddings and norms do not."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def set_threads(threads: int) -> None:
    """Compute on this many threads."""
    torch.set_num_threads(threads)


@contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """Turns the first Ctrl-C into a flag, so that no step is cut in half; a second one ends."""
    flag: list[bool] = []

    def handler(signum, frame):
        flag.append(True)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


class Trainer:
    """The state of a run: model, optimizer, step and history, savable between two steps.

    Other data and models are trained by a subclass with its own `Config`, `Settings`, `unit` (what
    a token is called), `build_model`, `length`, `batch` and `held_out_bits`.
    """

    Config, Settings, unit = Config, Settings, "byte"
    build_model = staticmethod(build_model)

    def __init__(self, config: Config, settings: Settings, corpus: Corpus):
        torch.manual_seed(settings.seed)
        self.settings, self.corpus = settings, corpus
        self.model = self.build_model(config)
        self.optimizer = build_optimizer(self.model)
        self.step = 0
        self.history = History()

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.settings.length

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (batch, length) of this step."""
        s = self.settings
        return training_batch(self.corpus.train, s.length, s.batch, self.step, s.seed)

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Bits per byte over the whole held-out text, every byte predicted once."""
        total = 0.0
        for inputs, targets in held_out_windows(self.corpus, self.length):
            total += F.cross_entropy(self.model(inputs[None])[0], targets, reduction="sum").item()
        return total / len(self.corpus.held_out) / math.log(2)

    def train_step(self) -> float:
        """One update; returns its loss in bits per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        inputs, targets = self.batch()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIPPED_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        bits = loss.item() / math.log(2)
        self.history.train.append(bits)
        self.history.gradient_norms.append(norm.item())
        return bits

    def train(self, checkpoint: Path | None) -> bool:
        """Train to the end (True) or until Ctrl-C (False); either way `checkpoint` is written.

        Without one, nothing is written or measured on the way.
        """
        s, history = self.settings, self.history
        shown = tqdm(
            desc=self.model.config.attention,
            total=s.steps,
            initial=self.step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
        )
        with shown, interrupt_flag() as stop:
            while self.step < s.steps and not stop:
                start = time.perf_counter()
                self.train_step()
                took = time.perf_counter() - start
                history.seconds += took
                if s.minutes and self.step == CALIBRATION:
                    # The warm-up does not depend on the number of steps, so it may change here.
                    per_step = history.seconds / CALIBRATION
                    shown.total = s.steps = max(CALIBRATION, round(60 * s.minutes / per_step))
                recent = history.train[-20:]
                shown.set_postfix_str(
                    f"loss {sum(recent) / len(recent):.3f} bits/{self.unit}, "
                    f"{s.batch * self.length / took / 1e3:.1f} k{self.unit}s/s, "
                    f"peak {peak_memory() / 2**20:.0f} MiB",
                    refresh=False,
                )
                shown.update()
                due = self.step % max(1, s.steps // EVALUATIONS) == 0 and self.step < s.steps
                if checkpoint and due:
                    bits = self.held_out_bits()
                    history.held_out.append((self.step, bits))
                    shown.write(f"step {self.step}: held-out {bits:.3f} bits/{self.unit}")
                    self.save(checkpoint)
        if checkpoint:
            self.save(checkpoint)
        return self.step >= s.steps

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on; a crash leaves the file before it."""
        state = {
            "config": asdict(self.model.config),
            "settings": asdict(self.settings),
            "data": self.corpus.fingerprint,
            "step": self.step,
            "history": asdict(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, state: dict) -> None:
        """Continue from what `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])
        torch.set_rng_state(state["rng"])


def load_checkpoint(path: Path) -> dict:
    """What `Trainer.save` wrote."""
    try:
        return torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path} to resume from") from None
    except Exception:  # of a damaged file, torch.load raises nearly anything
        raise ValueError(f"{path} is not a checkpoint, or a damaged one") from None
