"""Scores of blocks of pairs, summed over samples, and the blocks that are best by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_attn.analysis._samples import Sample
from sparse_attn.functional._common import repeat_heads, without_padding
from sparse_attn.patterns import BlockLayout, Causal, KeyLists, Pattern

#: Yields the first keys of groups that no border of blocks crosses, (groups,), and the score of
#: each query on each group, (batch, heads, n_q, groups).
Scores = Callable[[Sample, int], Iterator[tuple[Tensor, Tensor]]]


def attention_mass(sample: Sample, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The exact weight of each query on each block of keys."""
    return sample.exact.key_groups(block, "attention")


def gradient_importance(sample: Sample, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """|w · ∂loss/∂w| of each query and key."""
    problem = sample.exact.problem
    value = without_padding(problem.value, problem.key_padding_mask)
    value = repeat_heads(value, problem.shape[1])
    for keys, weights in sample.exact.key_groups(1, "gradients"):
        with torch.autocast(value.device.type, enabled=False):
            slopes = sample.grad_output @ value[:, :, keys].mT
        yield keys, weights.mul_(slopes).abs_()


def check_share(name: str, share: object) -> float:
    """A share as a float in (0, 1]."""
    if isinstance(share, Tensor) or not hasattr(share, "__float__"):
        raise TypeError(f"sparse_attn: expected {name} to be a number, got {share!r}")
    if not 0.0 < share <= 1.0:  # NaN neither
        raise ValueError(f"sparse_attn: expected {name} in (0, 1], got {share}")
    return float(share)


class BlockScores:
    """Scores of pairs, summed over blocks of `block` × `block` tokens, examples and samples."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.sums = torch.zeros(0, 0, 0)  # (heads, blocks of queries, blocks of keys) float64
        self.sizes = (0, 0)  # (n_q, n_k) of the longest sample
        self.causal = False

    def add(self, sample: Sample, scores: Scores) -> None:
        """Add the scores of a sample."""
        self._make_room(sample)
        for keys, of_queries in scores(sample, self.block):
            by_key = of_queries.sum(0, dtype=torch.float64)
            rows = torch.nn.functional.pad(by_key, (0, 0, 0, -by_key.shape[1] % self.block))
            by_key = rows.unflatten(1, (-1, self.block)).sum(2)
            columns = keys // self.block
            first = int(columns[0])
            sums = by_key @ torch.nn.functional.one_hot(columns - first).to(by_key.dtype)
            if not sums.isfinite().all():
                raise ValueError(
                    "sparse_attn: expected samples with finite attention, got one with NaN"
                )
            self.sums[:, : sums.shape[1], first : first + sums.shape[2]] += sums

    def layout(self, density: float) -> Pattern:
        """The blocks of each head with the largest sums, as many as density allows."""
        kept, visible = self._needed(), self._visible()
        number = max(int(density * int(visible.sum()) + 1e-9), int(kept[0].sum()))
        ranks = self.sums.masked_fill(~visible, -math.inf).masked_fill(kept, math.inf)
        order = ranks.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :number]
        layout = torch.zeros_like(ranks, dtype=torch.bool).flatten(1)
        layout.scatter_(1, order, True)
        return self._with_causality(BlockLayout(layout.view_as(ranks), self.block))

    def key_lists(self, number: int) -> Pattern:
        """So many keys for each query, those with the largest sums; for blocks of one token."""
        ranks = self.sums.masked_fill(~self._visible(), -math.inf)
        order = ranks.sort(dim=2, descending=True, stable=True).indices[..., :number]
        return self._with_causality(KeyLists(order.contiguous()))

    def _with_causality(self, pattern: Pattern) -> Pattern:
        return pattern & Causal() if self.causal else pattern

    def _visible(self) -> Tensor:
        """(blocks of queries, blocks of keys): whether some query of a block sees some key."""
        if not self.causal:
            return torch.ones(self.sums.shape[1:], dtype=torch.bool, device=self.sums.device)
        n_q, n_k = self.sizes
        last = torch.arange(self.block - 1, self.block * self.sums.shape[1], self.block)
        first_key = torch.arange(0, n_k, self.block)
        last = last.clamp(max=n_q - 1) + n_k - n_q
        return (first_key <= last[:, None]).to(self.sums.device)

    def _needed(self) -> Tensor:
        """(heads, …) the blocks without which a query might see nothing: the best one of each row,
        or those that hold the queries' own positions."""
        needed = torch.zeros_like(self.sums, dtype=torch.bool)
        if not self.causal:
            return needed.scatter_(2, self.sums.argmax(2, keepdim=True), True)
        n_q, n_k = self.sizes
        row = torch.arange(max(0, n_q - n_k), n_q, device=needed.device)
        needed[:, row // self.block, (row + n_k - n_q) // self.block] = True
        return needed

    def _make_room(self, sample: Sample) -> None:
        """Grow to the sizes of a sample; raise ValueError if it is unlike those before it."""
        problem = sample.exact.problem
        heads, (n_q, n_k) = problem.shape[1], problem.sizes
        causal = isinstance(sample.exact.reference, Causal)
        if self.sums.numel():
            known = self.sums.shape[0], self.causal
            if known != (heads, causal):
                raise ValueError(
                    "sparse_attn: expected samples that are alike, "
                    f"{known[0]} heads and is_causal={known[1]}, got {heads} and {causal}"
                )
            if causal and n_k - n_q != self.sizes[1] - self.sizes[0]:
                raise ValueError(
                    "sparse_attn: expected causal samples with n_k - n_q = "
                    f"{self.sizes[1] - self.sizes[0]}, got {n_k - n_q}"
                )
        self.causal = causal
        self.sizes = max(self.sizes[0], n_q), max(self.sizes[1], n_k)
        shape = heads, *(-(-size // self.block) for size in self.sizes)
        if self.sums.shape != shape:
            grown = torch.zeros(shape, dtype=torch.float64, device=problem.query.device)
            _, rows, columns = self.sums.shape
            if self.sums.numel():
                grown[:, :rows, :columns] = self.sums
            self.sums = grown
