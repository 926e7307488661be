"""Chunks of tokens that are sorted, beside their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.functional._gather import Gather, of_sets


class Ring:
    """Chunks of tokens in the orders of several rounds, one round after another, in a ring.

    Args:
        order: (sets, rounds, length): the tokens of each round, each once.
        chunk: Tokens of a chunk; divides length.
        before: Chunks before its own that a chunk sees.
        after: Chunks behind it.

    Attributes:
        own: (sets, length, size) to (sets, chunks, chunk, size).
        around: To (sets, chunks, (before + 1 + after) · chunk, size).
    """

    def __init__(self, order: Tensor, chunk: int, before: int, after: int) -> None:
        self.sets, self.rounds, self.length = order.shape
        self.device = order.device
        tokens, total, device = order.flatten(1), self.rounds * self.length, self.device
        places = torch.arange(total, device=device).expand_as(tokens)
        starts = self.length * torch.arange(self.rounds, device=device)
        in_rounds = (order + starts[:, None]).flatten(1)
        places = torch.empty_like(tokens).scatter_(1, in_rounds, places)
        # Of each token its place in every round.
        by_token = places.unflatten(1, (self.rounds, self.length)).mT

        def views(before: int, after: int) -> Gather:
            seen, chunks = (before + 1 + after) * chunk, total // chunk
            shown = torch.arange(-before * chunk, total + after * chunk, device=device) % total
            # Of the chunk `shift` places before its own a token is in part before + shift.
            shift = torch.arange(-before, after + 1, device=device)
            viewer = (by_token[..., None] // chunk - shift) % chunks
            view = viewer * seen + (before + shift) * chunk + by_token[..., None] % chunk
            view = (view + of_sets(chunks * seen, view)).flatten()
            each = self.rounds * len(shift)
            offsets = torch.arange(0, view.shape[0] + 1, each, device=device)
            return Gather(tokens[:, shown], view, offsets if each > 1 else None, seen, chunk)

        self.own, self.around = views(0, 0), views(before, after)
        back = (in_rounds + of_sets(total, in_rounds)).flatten()
        self._back = Gather(places, back, None, total, total)

    def back(self, x: Tensor) -> Tensor:
        """(sets, chunks, chunk, size) to (sets, rounds, length, size)."""
        return self._back(x.flatten(1, 2)).unflatten(2, (self.rounds, self.length)).squeeze(1)
