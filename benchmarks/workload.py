"""The cases that the benchmarks time: who sees whom, how many pairs, and the tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

import sparse_attn

BATCH, HEADS, HEAD_DIM = 1, 8, 64


class _Case:
    """What all cases share; `base` names one, `length` is its number of tokens."""

    base: str
    length: int
    causal = False

    @property
    def name(self) -> str:
        """The base name, with the length where it is not the usual one."""
        return self.base if self.length == 4096 else f"{self.base}_n{self.length}"

    def at(self, length: int):
        """The same case at another length."""
        return replace(self, length=length)

    def mask(self) -> Tensor:
        """The dense (length, length) mask."""
        return _dense_mask(self)

    def key_padding_mask(self) -> Tensor | None:
        """(1, length) bool: which keys nobody sees."""
        return None


@lru_cache(maxsize=1)
def _dense_mask(case: _Case) -> Tensor:
    index = torch.arange(case.length)
    # By rows, as the differences alone would take eight times the memory of the mask.
    return torch.cat([case.visible(rows[:, None], index) for rows in index.split(512)])


@dataclass(frozen=True)
class Case(_Case):
    """A window of `reach` keys on each side, or on the left, dilated or with global tokens."""

    base: str
    reach: int
    dilation: int = 1
    num_global: int = 0
    spread: bool = False
    length: int = 4096
    causal: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The global tokens: the first ones, or spread evenly over the sequence."""
        return tuple(self._token_step * i for i in range(self.num_global))

    @property
    def _token_step(self) -> int:
        return self.length // self.num_global if self.spread else 1

    @property
    def right(self) -> int:
        """The keys that are seen on the right."""
        return 0 if self.causal else self.reach

    def pattern(self) -> sparse_attn.Pattern:
        """The case as a pattern of ours."""
        window = sparse_attn.Window(self.reach, self.right, dilation=self.dilation)
        return window | sparse_attn.Global(self.tokens) if self.tokens else window

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for index tensors that broadcast; arithmetic alone."""
        seen = (j - i).abs() <= self.reach * self.dilation
        if self.causal:
            seen = seen & (j <= i)
        if self.dilation > 1:
            seen = seen & ((j - i) % self.dilation == 0)
        if self.num_global:
            seen = seen | self._is_global(i) | self._is_global(j)
        return seen

    def _is_global(self, i: Tensor) -> Tensor:
        step = self._token_step
        few = i < step * self.num_global
        return few & (i % step == 0) if self.spread else few

    def pairs(self) -> int:
        """The exact number of (query, key) pairs of one head."""
        n, r, d, tokens = self.length, self.reach, self.dilation, self.tokens
        sides = 1 if self.causal else 2
        window = n + sides * sum(max(0, n - m * d) for m in range(1, r + 1))
        rows = sum(1 + min(r, t // d) + min(r, (n - 1 - t) // d) for t in tokens)
        both = sum(abs(s - t) <= r * d and (s - t) % d == 0 for s in tokens for t in tokens)
        # Global rows and columns, less what the window has of them (its columns mirror its rows).
        return window + 2 * n * len(tokens) - len(tokens) ** 2 - (2 * rows - both)


@dataclass(frozen=True)
class BigBirdCase(_Case):
    """BigBird's blocks: three around each, three at random, the first and the last one global.

    The layout of Hugging Face's BigBird, with the same random blocks for every head.
    """

    base: str
    block: int
    random_blocks: int = 3
    length: int = 4096

    def pattern(self) -> sparse_attn.Pattern:
        """The case as a pattern of ours."""
        return sparse_attn.BigBird(self.block, self.random_blocks)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.length // self.block)

    @cached_property
    def drawn(self) -> Tensor:
        """(blocks, random_blocks): the random blocks of each block."""
        # The draw depends on the number of blocks and on the seed, not on the tokens in a block.
        mask = sparse_attn.RandomBlocks(self.random_blocks, 1).mask(self.blocks)
        return mask.nonzero()[:, 1].view(self.blocks, -1)

    @cached_property
    def fixed(self) -> Tensor:
        """(blocks, blocks) bool: what blocks see beside the random ones."""
        i = torch.arange(self.blocks)
        seen = (i[:, None] - i).abs() <= 1
        seen[[0, -1]] = True
        seen[:, [0, -1]] = True
        return seen

    @cached_property
    def layout(self) -> Tensor:
        """(blocks, blocks) bool: which blocks see which."""
        return self.fixed.scatter(1, self.drawn, True)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for index tensors that broadcast."""
        return self.layout[i // self.block, j // self.block]

    def pairs(self) -> int:
        """The exact number of (query, key) pairs of one head."""
        sizes = torch.full((self.blocks,), self.block)
        sizes[-1] = self.length - (self.blocks - 1) * self.block
        return int(sizes @ self.layout.long() @ sizes)


@dataclass(frozen=True)
class StridedCase(_Case):
    """The Sparse Transformer's strided pattern with its stride at the root of the length."""

    base: str
    length: int = 4096
    causal = True

    @property
    def stride(self) -> int:
        """l = √N."""
        return math.isqrt(self.length)

    def pattern(self) -> sparse_attn.Pattern:
        """The case as a pattern of ours."""
        return sparse_attn.Strided(self.stride)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for index tensors that broadcast; arithmetic alone."""
        return (j <= i) & ((i - j < self.stride) | ((i - j) % self.stride == 0))

    def pairs(self) -> int:
        """The exact number of (query, key) pairs of one head."""
        n, stride = self.length, self.stride
        distances = [*range(stride), *range(stride, n, stride)]
        return sum(n - distance for distance in distances)


@dataclass(frozen=True)
class PaddedCase(_Case):
    """A window of `reach` keys on each side over tokens of which the second half is padding."""

    base: str
    reach: int
    length: int = 4096

    @property
    def _tokens(self) -> int:
        return self.length // 2

    def pattern(self) -> sparse_attn.Pattern:
        """The case as a pattern of ours, for which the padding is a mask of its own."""
        return sparse_attn.Window(self.reach)

    def key_padding_mask(self) -> Tensor:
        """(1, length) bool: which keys nobody sees."""
        return torch.arange(self.length)[None] >= self._tokens

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for index tensors that broadcast; arithmetic alone."""
        return ((j - i).abs() <= self.reach) & (j < self._tokens)

    def pairs(self) -> int:
        """The exact number of (query, key) pairs of one head."""
        # Each key is seen by the queries within reach.
        last = self.length - 1
        return sum(
            min(last, j + self.reach) - max(0, j - self.reach) + 1 for j in range(self._tokens)
        )


AnyCase = Case | BigBirdCase | StridedCase | PaddedCase

CASES = {
    case.base: case
    for case in (
        *(Case(f"window{reach}", reach) for reach in (64, 128, 256, 512, 1024)),
        Case("window256_global16", 256, num_global=16),
        Case("window256_spread16", 256, num_global=16, spread=True),
        # As many keys as window128, but farther apart.
        *(Case(f"dilated{step}", 128, dilation=step) for step in (2, 4, 8)),
        Case("causal256", 256, causal=True),
        BigBirdCase("bigbird64", 64),
        StridedCase("strided"),
        PaddedCase("half_padded256", 256),
    )
}


def find_case(name: str) -> AnyCase:
    """The case of a name such as `window256` or `window256_n16384`."""
    base, _, length = name.partition("_n")
    if base not in CASES or (length and not length.isdigit()):
        raise ValueError(f"expected a case of {', '.join(CASES)} (with _n<length>), got {name}")
    return CASES[base].at(int(length)) if length else CASES[base]


def make_inputs(
    length: int, heads: int, dtype: torch.dtype, seed: int, head_dim: int = HEAD_DIM
) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient of the output, (batch, heads, length, head size)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, heads, length, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(4))


def dense_reference(mask: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output and gradients of dense attention in float64; `mask` None is full attention."""
    *leaves, grad = (x.double() for x in inputs)
    query, key, value = (x.requires_grad_() for x in leaves)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
        # A query without keys has an output of 0, where the softmax would make NaN of it.
        scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1)
    output = (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ value
    return output.detach(), *torch.autograd.grad(output, (query, key, value), grad)
