"""What the tests of the examples share: running a script, and stopping and resuming a training."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, status: int = 0) -> str:
    """What the script prints; it must end with this status."""
    command = [sys.executable, EXAMPLES / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def train_whole_and_resumed(make: Callable, load_checkpoint: Callable, folder: Path) -> tuple:
    """Trainers that took six steps at once and in two halves, with the losses of each."""
    whole, first, second = (make() for _ in range(3))
    expected = [whole.train_step() for _ in range(6)]
    losses = [first.train_step() for _ in range(3)]
    first.save(folder / "checkpoint.pt")
    second.restore(load_checkpoint(folder / "checkpoint.pt"))
    losses += [second.train_step() for _ in range(3)]
    return whole, second, expected, losses
