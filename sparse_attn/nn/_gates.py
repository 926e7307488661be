"""What the numbers of a learned gate stand for: the slots of a window, or blocks of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.patterns import BlockLayout, Pattern, PerHead, Window, words
from sparse_attn.patterns.base import Intersection, Union
from sparse_attn.patterns.tensors import _Data
from sparse_attn.tables import BlockBias, SlotBias, slot_windows


@dataclass(frozen=True, eq=False, repr=False)
class OpenSlots(_Data):
    """Query i sees key i + (m − left) · dilation for the slots m that are open.

    Args:
        open: (slots,) bool; (n, slots) for each query apart, up to a length of n.
        left: Slots on the left of the query's own.
        dilation: Distance between neighboring slots.
    """

    open: Tensor
    left: int
    dilation: int
    made: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def _encode(self) -> tuple[int, ...]:
        return (words.KEY_LISTS, 1)

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        if self.open.dim() == 2 and not n_q == n_k <= len(self.open):
            raise ValueError(
                "sparse_attn: expected as many queries as keys, at most "
                f"{len(self.open)}, for slots of each query, got {n_q} and {n_k}"
            )
        if (n_q, n_k) not in self.made:
            self.made[n_q, n_k] = self._lists(n_q, n_k)
        return self.made[n_q, n_k]

    def _lists(self, n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
        """The keys of each query, ascending, and how many they are."""
        used = self.open if self.open.dim() == 1 else self.open.any(0)
        slots = used.nonzero()[:, 0]
        here = self.open[slots] if self.open.dim() == 1 else self.open[:n_q, slots]
        position = torch.arange(n_q, device=slots.device)[:, None] + (n_k - n_q)
        keys = position + (slots - self.left) * self.dilation
        here = here & (keys >= 0) & (keys < n_k)
        keys = keys.masked_fill(~here, n_k).sort(-1).values
        return keys.clamp(max=max(n_k - 1, 0)), here.sum(-1)

    def _expression(self) -> str:
        if self.open.dim() == 2:
            return f"OpenSlots(<bool {list(self.open.shape)}>, {self.left}, {self.dilation})"
        distances = [(m - self.left) * self.dilation for m in self.open.nonzero()[:, 0].tolist()]
        return f"OpenSlots(<distances {distances}>)"


class Slots:
    """A number for each slot of the pattern's window, for all queries alike or for each apart."""

    def __init__(self, pattern: Pattern, heads: int, seq_len: int | None, *, rows: bool) -> None:
        self.pattern = pattern
        self.windows = slot_windows("gate", pattern)
        if len({left + 1 + right for left, right, _ in self.windows}) > 1:
            raise ValueError(
                "sparse_attn: expected pattern with windows of the same number of slots for all "
                f"heads, got {pattern!r}"
            )
        self.slots = sum(self.windows[0][:2]) + 1
        self.rows = rows
        # Without a length, one at which the query in the middle has all its slots.
        reach = max(max(left, right) * dilation for left, right, dilation in self.windows)
        self.length = 2 * reach + 1 if seq_len is None else seq_len
        self.shape = (heads, *((self.length,) if rows else ()), self.slots)

    def gate(self, numbers: Tensor, length: int) -> SlotBias:
        rows = numbers[:, :length] if self.rows else numbers[:, None]
        return SlotBias(rows[None])

    def shares(self) -> Tensor:
        """(heads of the pattern, …): the share of the pairs of each number that is allowed."""
        head, row, column = _pairs(self.pattern, self.length)
        group = self.pattern.heads // len(self.windows)
        left, _, dilation = torch.tensor(self.windows).repeat_interleave(group, 0).unbind(-1)
        distance = column - row
        slot = distance.div(dilation[head], rounding_mode="floor") + left[head]
        on = (distance % dilation[head] == 0) & (slot >= 0) & (slot < self.slots)
        if self.rows:
            return _count((head, row, slot), (self.pattern.heads, *self.shape[1:]), on)
        counts = _count((head, slot), (self.pattern.heads, self.slots), on)
        reach = (torch.arange(self.slots) - left[:, None]).abs() * dilation[:, None]
        return counts / (self.length - reach).clamp(min=1)

    def harden(self, opened: Tensor, length: int | None) -> Pattern:
        parts = self.pattern.patterns if isinstance(self.pattern, PerHead) else (self.pattern,)
        group = len(opened) // len(parts)
        of_heads = []
        for head, slots in enumerate(opened):
            left, _, dilation = self.windows[head // group]
            of_slots = (
                OpenSlots(slots, left, dilation) if self.rows else _runs(slots, left, dilation)
            )
            of_heads.append(_with_window(parts[head // group], of_slots))
        return PerHead(of_heads)


class Blocks:
    """A number for each block of pairs; blocks of one are pairs."""

    def __init__(self, pattern: Pattern, heads: int, seq_len: int, block: int) -> None:
        self.pattern = pattern
        self.length = seq_len
        self.block = block
        self.shape = (heads, *(2 * (self._blocks(seq_len),)))

    def _blocks(self, length: int) -> int:
        return -(-length // self.block)

    def gate(self, numbers: Tensor, length: int) -> BlockBias:
        blocks = self._blocks(length)
        return BlockBias(numbers[None, :, :blocks, :blocks], self.block)

    def shares(self) -> Tensor:
        head, row, column = _pairs(self.pattern, self.length)
        place = (head, row // self.block, column // self.block)
        return _count(place, (self.pattern.heads, *self.shape[1:])) / self.block**2

    def harden(self, opened: Tensor, length: int | None) -> Pattern:
        blocks = self._blocks(self.length if length is None else length)
        return self.pattern & BlockLayout(opened[:, :blocks, :blocks].contiguous(), self.block)


def _pairs(pattern: Pattern, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head, query and key of all pairs that a pattern allows."""
    heads = pattern.heads
    tensors = pattern.tensors(length, length)
    crow, column = ops._pattern_pairs(pattern.encode(), tensors, length, length, 1, heads)
    place = torch.arange(heads * length).repeat_interleave(crow[0].diff(dim=-1).flatten())
    return place // length, place % length, column


def _count(
    places: tuple[Tensor, ...], shape: tuple[int, ...], which: Tensor | None = None
) -> Tensor:
    flat = torch.zeros((), dtype=torch.int64)
    for place, size in zip(places, shape, strict=True):
        flat = flat * size + place
    flat = flat if which is None else flat[which]
    return torch.bincount(flat, minlength=math.prod(shape)).view(shape).float()


def _runs(opened: Tensor, left: int, dilation: int) -> Pattern:
    """The open slots of a head: those around the query itself as a window, the others as lists."""
    rest = opened.clone()
    start = stop = left
    while start >= 0 and opened[start]:
        start -= 1
    while stop < len(opened) and opened[stop]:
        stop += 1
    if start == stop:
        return OpenSlots(rest, left, dilation)
    rest[start + 1 : stop] = False
    window = Window(left - start - 1, stop - left - 1, dilation)
    return window | OpenSlots(rest, left, dilation) if rest.any() else window


def _with_window(pattern: Pattern, replacement: Pattern) -> Pattern:
    """The pattern with another one in place of its finite window."""
    if isinstance(pattern, Window) and math.inf not in (pattern.left, pattern.right):
        return replacement
    if isinstance(pattern, (Union, Intersection)):
        parts = tuple(_with_window(part, replacement) for part in pattern.parts)
        return type(pattern)(parts)
    return pattern
