"""The cases that the benchmarks time: who sees whom, how many pairs, and the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sparse_attn

BATCH, HEADS, HEAD_DIM = 1, 8, 64


@dataclass(frozen=True)
class Case:
    """A window of `reach` keys on each side over `length` tokens, dilated or with global tokens."""

    base: str
    reach: int
    dilation: int = 1
    num_global: int = 0
    spread: bool = False
    length: int = 4096

    @property
    def name(self) -> str:
        """The base name, with the length where it is not the usual one."""
        return self.base if self.length == 4096 else f"{self.base}_n{self.length}"

    @property
    def tokens(self) -> tuple[int, ...]:
        """The global tokens: the first ones, or spread evenly over the sequence."""
        return tuple(self._token_step * i for i in range(self.num_global))

    @property
    def _token_step(self) -> int:
        return self.length // self.num_global if self.spread else 1

    def at(self, length: int) -> Case:
        """The same case at another length."""
        return replace(self, length=length)

    def pattern(self) -> sparse_attn.Pattern:
        """The case as a pattern of ours."""
        window = sparse_attn.Window(self.reach, dilation=self.dilation)
        return window | sparse_attn.Global(self.tokens) if self.tokens else window

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for index tensors that broadcast; arithmetic alone."""
        seen = (j - i).abs() <= self.reach * self.dilation
        if self.dilation > 1:
            seen = seen & ((j - i) % self.dilation == 0)
        if self.num_global:
            seen = seen | self._is_global(i) | self._is_global(j)
        return seen

    def _is_global(self, i: Tensor) -> Tensor:
        step = self._token_step
        few = i < step * self.num_global
        return few & (i % step == 0) if self.spread else few

    def mask(self) -> Tensor:
        """The dense (length, length) mask."""
        index = torch.arange(self.length)
        return self.visible(index[:, None], index)

    def pairs(self) -> int:
        """The exact number of (query, key) pairs of one head."""
        n, r, d, tokens = self.length, self.reach, self.dilation, self.tokens
        window = n + 2 * sum(max(0, n - m * d) for m in range(1, r + 1))
        rows = sum(1 + min(r, t // d) + min(r, (n - 1 - t) // d) for t in tokens)
        both = sum(abs(s - t) <= r * d and (s - t) % d == 0 for s in tokens for t in tokens)
        # Global rows and columns, less what the window has of them (its columns mirror its rows).
        return window + 2 * n * len(tokens) - len(tokens) ** 2 - (2 * rows - both)


CASES = {
    case.base: case
    for case in (
        Case("window256", 256),
        Case("window128", 128),
        Case("window256_global16", 256, num_global=16),
        Case("window256_spread16", 256, num_global=16, spread=True),
        # As many keys as window128, two and four times as far apart.
        Case("dilated2", 128, dilation=2),
        Case("dilated4", 128, dilation=4),
    )
}


def find_case(name: str) -> Case:
    """The case of a name such as `window256` or `window256_n16384`."""
    base, _, length = name.partition("_n")
    if base not in CASES or (length and not length.isdigit()):
        raise ValueError(f"expected a case of {', '.join(CASES)} (with _n<length>), got {name}")
    return CASES[base].at(int(length)) if length else CASES[base]


def make_inputs(length: int, heads: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient of the output, (batch, heads, length, head size)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, heads, length, HEAD_DIM)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(4))


def dense_reference(mask: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output and gradients of dense attention in float64; `mask` None is full attention."""
    *leaves, grad = (x.double() for x in inputs)
    query, key, value = (x.requires_grad_() for x in leaves)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    output = scores.softmax(-1) @ value
    return output.detach(), *torch.autograd.grad(output, (query, key, value), grad)
