"""Biases and gates that depend on the distance of query and key alone, for decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.patterns import Pattern
from sparse_attn.tables import SLOPES, SLOTS, BlockBias, SlotBias, encode_table, slot_windows


@dataclass(frozen=True)
class DistanceTable:
    """A bias or gate by distance, in the form of `encode_table`: (batch or 1, heads, 1, …)."""

    name: str
    table: Tensor
    kind: int

    @staticmethod
    def of(
        name: str, given: Tensor | SlotBias | BlockBias, pattern: Pattern, query: Tensor
    ) -> DistanceTable:
        """Check what the user gave.

        Raises:
            TypeError: It is no table.
            ValueError: It is not by distance, or does not fit pattern and query.
        """
        table, kind = encode_table(name, given, pattern)
        by_distance = kind in (SLOPES, SLOTS) and table.shape[2] == 1
        fits = table.shape[0] in (1, query.shape[0]) and table.shape[1] == query.shape[1]
        if not by_distance or not fits:
            raise ValueError(
                f"sparse_attn: expected {name} by distance for decoding, "
                f"{'(heads,), ' if name == 'bias' else ''}(heads, slots) or a SlotBias of shape "
                f"(batch or 1, heads, 1, slots), for {query.shape[1]} heads, got "
                f"{tuple(getattr(given, 'table', given).shape)}"
            )
        if table.device != query.device:
            raise ValueError(
                f"sparse_attn: expected {name} on {query.device}, as query, got {table.device}"
            )
        return DistanceTable(name, table, kind)

    def of_heads(self, heads: slice) -> DistanceTable:
        """For some of the heads."""
        return DistanceTable(self.name, self.table[:, heads], self.kind)

    def given(self) -> Tensor | SlotBias:
        """As the user gave it, for keys at their own distances."""
        return self.table[0, :, 0, 0] if self.kind == SLOPES else SlotBias(self.table)

    def dense(self, distance: Tensor, pattern: Pattern) -> Tensor:
        """(batch or 1, heads, new, keys), for key − query = `distance` (new, keys)."""
        if self.kind == SLOPES:
            wide = torch.promote_types(self.table.dtype, torch.float32)  # as the kernels compute
            return -self.table.to(wide) * distance.abs()
        windows = slot_windows(self.name, pattern)
        of_heads = torch.tensor(windows, device=distance.device)[:, :, None, None]
        left, right, dilation = of_heads.unbind(1)  # (patterns, 1, 1)
        slot = torch.div(distance, dilation, rounding_mode="floor") + left
        on_slot = (distance % dilation == 0) & (slot >= 0) & (slot <= left + right)
        table = self.table[:, :, 0].unflatten(1, (len(windows), -1))
        slots = slot.where(on_slot, 0).flatten(1)[None, :, None].expand(*table.shape[:3], -1)
        picked = table.gather(-1, slots).unflatten(-1, distance.shape)
        off_slots = 0.0 if self.name == "bias" else 1.0
        return torch.where(on_slot[None, :, None], picked, off_slots).flatten(1, 2)
