"""What the GPU benchmark times: patterns, tensors, needed work, and float64 references of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import sparse_attn
from sparse_attn import BigBird, Global, Strided, Window

DIRECTIONS = ("forward", "backward")
# Matrix products over the needed pairs, two operations for each element: QKᵀ and PV; then QKᵀ
# again, dP, dV, dQ and dK.
FLOPS_PER_PAIR = {"forward": 4, "backward": 10}

Visible = Callable[[Tensor, Tensor], Tensor]


def _band(left: int, right: int, dilation: int = 1) -> Visible:
    def visible(i: Tensor, j: Tensor) -> Tensor:
        seen = (i - j <= left * dilation) & (j - i <= right * dilation)
        return seen & ((j - i) % dilation == 0) if dilation > 1 else seen

    return visible


def _or_first(rule: Visible, count: int) -> Visible:
    return lambda i, j: rule(i, j) | (i < count) | (j < count)


def _strided(stride: int) -> Visible:
    return lambda i, j: (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))


@dataclass(frozen=True)
class Case:
    """A pattern of ours and, for peers that take a rule, the same one as arithmetic.

    `window` is (left, right) in steps of `dilation`, if the pattern is a window and no more.
    """

    name: str
    pattern: sparse_attn.Pattern
    rule: Visible | None = None
    window: tuple[int, int] | None = None
    block: int = 0  # of BigBird, whose rule is a table

    def visible(self, length: int, device: torch.device | str) -> Visible:
        """Whether query i sees key j, for index tensors that broadcast."""
        if self.rule is not None:
            return self.rule
        # Blocks are drawn by (seed, block of the query): blocks of 1 give the table of the blocks.
        table = BigBird(1).mask(-(-length // self.block)).to(device)
        return lambda i, j: table[i // self.block, j // self.block]

    @property
    def dilation(self) -> int:
        return self.pattern.dilation if isinstance(self.pattern, Window) else 1


def _window(name: str, left: int, right: int, dilation: int = 1) -> Case:
    pattern = Window(left, right, dilation=dilation)
    return Case(name, pattern, _band(left, right, dilation), (left, right))


# FlashAttention's offsets: 512 keys before and after the query's own, or 512 with its own.
CASES = {
    case.name: case
    for case in (
        _window("window512", 256, 256),
        _window("window512_causal", 511, 0),
        _window("window1024_causal", 1023, 0),
        _window("dilated2", 256, 256, dilation=2),
        _window("dilated4", 256, 256, dilation=4),
        Case(
            "window512_global16",
            Window(256, 256) | Global(range(16)),
            _or_first(_band(256, 256), 16),
        ),
        Case("bigbird64", BigBird(64), block=64),
        Case("strided128", Strided(128), _strided(128)),
    )
}


@dataclass(frozen=True)
class Setup:
    """One call: a case and its sizes."""

    case: Case
    length: int
    head_dim: int
    batch: int = 1
    heads: int = 16
    heads_kv: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cuda"

    @property
    def name(self) -> str:
        return f"{self.case.name} n{self.length} d{self.head_dim}"

    def visible(self) -> Visible:
        return self.case.visible(self.length, self.device)

    def fields(self) -> dict:
        """What identifies the call in a row of the results."""
        return {
            "case": self.case.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "heads": self.heads,
            "heads_kv": self.heads_kv,
            "length": self.length,
            "head_dim": self.head_dim,
        }

    def flops(self, direction: str) -> int:
        """Floating-point operations on the needed pairs of all heads and examples."""
        per_pair = FLOPS_PER_PAIR[direction] * self.head_dim
        return self.batch * self.heads * _pairs(self.case.pattern, self.length) * per_pair

    def bytes(self, direction: str) -> int:
        """Each tensor once: query, key, value and output, their gradients too in the backward."""
        rows = 2 * self.batch * (self.heads + self.heads_kv) * self.length * self.head_dim
        return rows * self.dtype.itemsize * (2 if direction == "backward" else 1)


@lru_cache(maxsize=256)
def _pairs(pattern: sparse_attn.Pattern, length: int) -> int:
    return pattern.cost(length).pairs


def make_inputs(setup: Setup, seed: int = 0) -> tuple[Tensor, ...]:
    """Query, key, value and the gradient of the output, (batch, heads, length, head size)."""
    generator = torch.Generator(device=setup.device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (setup.batch, heads, setup.length, setup.head_dim)
        drawn = torch.randn(shape, generator=generator, device=setup.device, dtype=torch.float32)
        return drawn.to(setup.dtype)

    return normal(setup.heads), normal(setup.heads_kv), normal(setup.heads_kv), normal(setup.heads)


class Reference:
    """Dense attention in float64 of a few rows, and what these rows add to all gradients.

    The gradient of the output is zero on all other rows, so that theirs are zero, too, and the
    gradients of key and value are exact in full.
    """

    def __init__(self, setup: Setup, inputs: tuple[Tensor, ...], count: int = 256, seed: int = 1):
        length, device = setup.length, setup.device
        generator = torch.Generator().manual_seed(seed)
        ends = torch.tensor([0, 1, length // 2, length - 2, length - 1]).clamp(0, length - 1)
        drawn = torch.cat([ends, torch.randint(length, (count - len(ends),), generator=generator)])
        self.rows = drawn.unique().to(device)
        self.setup, self.inputs = setup, inputs
        self.grad = torch.zeros_like(inputs[3])
        self.grad[:, :, self.rows] = inputs[3][:, :, self.rows]

    def compute(self, dense: bool) -> tuple[Tensor, ...]:
        """Output and gradient of query on the rows, gradients of key and value in full."""
        query, key, value, _ = self.inputs
        index = torch.arange(self.setup.length, device=self.setup.device)
        hidden = None if dense else ~self.setup.visible()(self.rows[:, None], index)
        output, grad_query = (torch.empty_like(query[:, :, self.rows]).double() for _ in range(2))
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float64) for x in (key, value))
        group = self.setup.heads // self.setup.heads_kv
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):  # one at a time: rows x length numbers of float64
                kv = (b, h // group)
                parts = self._head((b, h), kv, hidden)
                output[b, h], grad_query[b, h] = parts[:2]
                grad_key[kv] += parts[2]
                grad_value[kv] += parts[3]
        return output, grad_query, grad_key, grad_value

    def _head(self, at: tuple, kv: tuple, hidden: Tensor | None) -> tuple[Tensor, ...]:
        query, key, value, _ = self.inputs
        q, do = query[at][self.rows].double(), self.grad[at][self.rows].double()
        k, v = key[kv].double(), value[kv].double()
        scale = 1 / math.sqrt(q.shape[-1])
        scores = scale * q @ k.mT
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        weights = scores.softmax(-1)
        output = weights @ v
        delta = (output * do).sum(-1, keepdim=True)
        grad_scores = weights * (do @ v.mT - delta) * scale
        return output, grad_scores @ k, grad_scores.mT @ q, weights.mT @ do
