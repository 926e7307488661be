"""Tokens in other orders, and chunks of them beside their neighbours: with gradients that are added
up in one order on any device, as those of index_select are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Ring:
    """Chunks of tokens in the orders of several rounds, one round after another, in a ring.

    Args:
        order: (sets, rounds, length): the tokens of each round, each once.
        chunk: Tokens of a chunk; divides length.
        before: Chunks before its own that a chunk sees.
        after: Chunks behind it.
    """

    def __init__(self, order: Tensor, chunk: int, before: int, after: int) -> None:
        self.rounds, self.length = order.shape[1:]
        self.chunk, self.seen = chunk, (before + 1 + after) * chunk
        self.tokens, total = order.flatten(1), self.rounds * self.length
        starts = self.length * torch.arange(self.rounds, device=order.device)
        self._order = (order + starts[:, None]).flatten(1)
        rows = torch.arange(total, device=order.device)
        self._places = torch.empty_like(self._order).scatter_(
            1, self._order, rows.expand_as(self._order)
        )
        shown = torch.arange(-before * chunk, total + after * chunk, device=order.device) % total
        self._shown = self.tokens[:, shown]
        # Who sees a token: of the chunk `shift` places before its own it is in part before + shift.
        shift = torch.arange(-before, after + 1, device=order.device)
        place = self._places.unflatten(1, (self.rounds, self.length)).mT[..., None]
        viewer = (place // chunk - shift) % (total // chunk)
        self._views = (viewer * self.seen + (before + shift) * chunk + place % chunk).flatten(2)

    def own(self, x: Tensor) -> Tensor:
        """(sets, length, size) to (sets, chunks, chunk, size)."""
        places = self._places.unflatten(1, (self.rounds, self.length)).mT
        return _Gather.apply(x, self.tokens, places, self.chunk, self.chunk)

    def around(self, x: Tensor) -> Tensor:
        """(sets, length, size) to (sets, chunks, seen, size): chunks share the memory of rows."""
        return _Gather.apply(x, self._shown, self._views, self.seen, self.chunk)

    def back(self, x: Tensor) -> Tensor:
        """(sets, chunks, chunk, size) to (sets, rounds, length, size)."""
        total = self.rounds * self.length
        order = self._order[..., None]
        rows = _Gather.apply(x.flatten(1, 2), self._places, order, total, total)
        return rows.squeeze(1).unflatten(1, (self.rounds, self.length))


class _Gather(torch.autograd.Function):
    """Rows of (sets, length, size) by shown (sets, rows), then windows of `width` of them every
    `step`: (sets, windows, width, size)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shown: Tensor, views: Tensor, width: int, step: int) -> Tensor:
        sets, length, size = x.shape
        rows = _of_all_sets(shown, length).flatten()
        gathered = x.reshape(sets * length, size).index_select(0, rows)
        return gathered.view(*shown.shape, size).unfold(1, width, step).transpose(2, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.window = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Add.apply(gradient, *ctx.saved_tensors, *ctx.window), None, None, None, None


class _Add(torch.autograd.Function):
    """The transpose of _Gather: for each row of x the sum over its views, (sets, length, views),
    which count the rows of all windows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(windows: Tensor, shown: Tensor, views: Tensor, width: int, step: int) -> Tensor:
        rows = windows.flatten(0, 2)
        places = _of_all_sets(views, windows.shape[1] * windows.shape[2]).flatten(0, 1)
        if places.shape[1] == 1:
            added = rows.index_select(0, places[:, 0])
        else:
            added = embedding_bag(places, rows, mode="sum")
        return added.view(*views.shape[:2], rows.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.window = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(gradient, *ctx.saved_tensors, *ctx.window), None, None, None, None


def _of_all_sets(rows: Tensor, length: int) -> Tensor:
    first = length * torch.arange(rows.shape[0], device=rows.device)
    return rows + first.view(-1, *[1] * (rows.dim() - 1))
