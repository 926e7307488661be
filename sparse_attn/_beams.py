"""Beams: which sequences a decoding state goes on with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def chosen_sequences(index: Tensor | Iterable[int], batch_size: int, device: object) -> Tensor:
    """The index as a tensor on the device; TypeError or ValueError unless it is (batch,) ints in
    [0, batch_size), one at least."""
    chosen = torch.as_tensor(index)
    if chosen.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"sparse_attn: expected index of ints, got {chosen.dtype}")
    inside = chosen.numel() > 0 and chosen.min() >= 0 and chosen.max() < batch_size
    if chosen.dim() != 1 or not inside:
        raise ValueError(
            f"sparse_attn: expected index of shape (batch,) in [0, {batch_size}), got "
            f"{chosen.tolist()}"
        )
    return chosen.to(device)
