"""A progress bar for what turns out to take long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Step = TypeVar("Step")

#: Seconds that pass before a bar is shown.
_PATIENCE = 5.0


def shown(steps: Sequence[Step], what: str, unit: str) -> Iterator[Step]:
    """The steps, with tqdm's bar on a terminal if it is installed and they take some seconds."""
    try:
        from tqdm import tqdm  # an extra: nothing here needs it
    except ImportError:
        return iter(steps)
    return iter(tqdm(steps, desc=what, unit=unit, delay=_PATIENCE, disable=None, leave=False))
