"""Rows gathered into windows, with gradients that are added up in one order on any device, as those
of index_select are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Gather:
    """Rows of each set in another order, and windows of them; and the transpose.

    Args:
        rows: (sets, shown): which row of the set stands where.
        places: Of all windows' places those that show row 0 of set 0, then row 1, and so on.
        offsets: (sets · length + 1) where those of each row begin in places; None if each row has
            one.
        width: Rows of a window.
        step: From one window to the next: less than width where they overlap.
    """

    def __init__(
        self, rows: Tensor, places: Tensor, offsets: Tensor | None, width: int, step: int
    ) -> None:
        self._arguments = (rows, places, offsets, width, step)

    def __call__(self, x: Tensor) -> Tensor:
        """(sets, length, size) to (sets, windows, width, size); windows share memory."""
        return _Gather.apply(x, *self._arguments)

    def add(self, windows: Tensor) -> Tensor:
        """(sets, windows, width, size) to (sets, length, size): the sum over a row's places."""
        return _Add.apply(windows, *self._arguments)


class _Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.window = inputs[4:]


class _Gather(_Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, places: Tensor, offsets: Tensor | None, width: int, step: int
    ) -> Tensor:
        sets, length, size = x.shape
        all_rows = (rows + of_sets(length, rows)).flatten()
        gathered = x.reshape(sets * length, size).index_select(0, all_rows)
        return gathered.view(*rows.shape, size).unfold(1, width, step).transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Add.apply(gradient, *ctx.saved_tensors, *ctx.window), *[None] * 5


class _Add(_Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, places: Tensor, offsets: Tensor | None, width: int, step: int
    ) -> Tensor:
        flat = x.flatten(0, 2)
        if offsets is None:
            added = flat.index_select(0, places)
        else:
            added = embedding_bag(places, flat, offsets, mode="sum", include_last_offset=True)
        return added.unflatten(0, (x.shape[0], -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(gradient, *ctx.saved_tensors, *ctx.window), *[None] * 5


def of_sets(length: int, like: Tensor) -> Tensor:
    """Where each set begins among all rows, for (sets, …)."""
    first = length * torch.arange(like.shape[0], device=like.device)
    return first.view(-1, *[1] * (like.dim() - 1))


def finite_where(hidden: Tensor, x: Tensor) -> Tensor:
    """x (batch, heads, length, size) without what hidden (batch, length) tokens hold of NaN,
    infinity and numbers too large to be squared, which would reach others as 0 · NaN."""
    largest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max ** 0.25
    return x.masked_fill(hidden[:, None, :, None] & ~(x.abs() < largest), 0)
