"""Dense attention with bias, gate, soft cap, dropout and sink: what the tests of these hold to.

Tables are spread over all pairs here, by their definitions, with differentiable indexing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import reference
import torch
from cases import DEVICE
from philox import philox, seed_key
from torch import Tensor

import sparse_attn


class Call(NamedTuple):
    """Sizes that tables are spread over, and the (left, right, dilation) of each head's window."""

    batch: int
    heads: int
    n_q: int
    n_k: int
    windows: Sequence[tuple[int, int, int]] = ()

    @property
    def distance(self) -> Tensor:
        """Key less position, (n_q, n_k)."""
        position = torch.arange(self.n_q, device=DEVICE) + self.n_k - self.n_q
        return torch.arange(self.n_k, device=DEVICE) - position[:, None]


def slopes(table: Tensor, call: Call, neutral: float) -> Tensor:
    return -table[None, :, None, None] * call.distance.abs().to(table.dtype)


def slots(table: Tensor, call: Call, neutral: float) -> Tensor:
    """`table` (B or 1, heads, n_q or 1, slots)."""
    spread = []
    for head in range(call.heads):
        left, right, dilation = call.windows[head * len(call.windows) // call.heads]
        slot = call.distance.div(dilation, rounding_mode="floor") + left
        inside = (call.distance % dilation == 0) & (slot >= 0) & (slot < left + 1 + right)
        rows = table[:, head].expand(-1, call.n_q, -1)
        numbers = rows.gather(2, slot.clamp(0, left + right).expand(len(rows), -1, -1))
        spread.append(torch.where(inside, numbers, neutral))
    return torch.stack(spread, 1)


def blocks(block: int) -> Callable[[Tensor, Call, float], Tensor]:
    def spread(table: Tensor, call: Call, neutral: float) -> Tensor:
        rows = torch.arange(call.n_q, device=DEVICE) // block
        return table[:, :, rows][..., torch.arange(call.n_k, device=DEVICE) // block]

    return spread


class Table(NamedTuple):
    """A kind of table: its shape for a call, how the library takes it, how it spreads."""

    shape: Callable[[Call], tuple[int, ...]]
    given: Callable[[Tensor], object]
    spread: Callable[[Tensor, Call, float], Tensor]


def slot_count(call: Call) -> int:
    left, right, _ = call.windows[0]
    return left + 1 + right


def block_shape(block: int, c: Call) -> tuple[int, int]:
    return -(-c.n_q // block), -(-c.n_k // block)


def same(table: Tensor) -> Tensor:
    return table


TABLES = {
    "slopes": Table(lambda c: (c.heads,), same, slopes),
    "toeplitz": Table(
        lambda c: (c.heads, slot_count(c)), same, lambda t, c, n: slots(t[None, :, None], c, n)
    ),
    "slots": Table(
        lambda c: (c.heads, c.n_q, slot_count(c)), same, lambda t, c, n: slots(t[None], c, n)
    ),
    "slots_of_examples": Table(
        lambda c: (c.batch, c.heads, c.n_q, slot_count(c)), sparse_attn.SlotBias, slots
    ),
    "toeplitz_of_examples": Table(
        lambda c: (c.batch, c.heads, 1, slot_count(c)), sparse_attn.SlotBias, slots
    ),
    "dense": Table(lambda c: (c.batch, c.heads, c.n_q, c.n_k), same, blocks(1)),
    "dense_shared": Table(lambda c: (1, 1, c.n_q, c.n_k), same, blocks(1)),
    "dense_of_heads": Table(lambda c: (1, c.heads, c.n_q, c.n_k), same, blocks(1)),
    "blocks": Table(
        lambda c: (1, c.heads, *block_shape(16, c)),
        lambda t: sparse_attn.BlockBias(t, 16),
        blocks(16),
    ),
    "blocks_of_examples": Table(
        lambda c: (c.batch, 1, *block_shape(7, c)), lambda t: sparse_attn.BlockBias(t, 7), blocks(7)
    ),
    "blocks_shared": Table(
        lambda c: (1, 1, *block_shape(16, c)), lambda t: sparse_attn.BlockBias(t, 16), blocks(16)
    ),
    "blocks_of_a_hundred": Table(
        lambda c: (c.batch, c.heads, *block_shape(100, c)),
        lambda t: sparse_attn.BlockBias(t, 100),
        blocks(100),
    ),
}
SLOTTED = {name for name in TABLES if "slots" in name or "toeplitz" in name}


def kept_pairs(call: Call, p: float, seed: int) -> Tensor:
    """Which pairs dropout keeps, (batch, heads, n_q, n_k): 16 of Philox's bits for each."""
    b, h, i, j = np.ogrid[: call.batch, : call.heads, : call.n_q, : call.n_k]
    words = philox((j // 8, i, b * call.heads + h, 3), seed_key(seed))
    chosen = np.take_along_axis(words, np.broadcast_to(j % 8 // 2, words.shape[1:])[None], 0)[0]
    bits = chosen >> (16 * (j % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    return torch.from_numpy(bits.astype(np.int64) >= round(p * 65536)).to(DEVICE)


class Recomputed(torch.autograd.Function):
    """Softmax of logits times values whose backward knows the output and the log-sum-exp alone.

    All fused kernels work so, torch's too, and their output is of the inputs' type: they round more
    than a softmax that kept its results.
    """

    @staticmethod
    def forward(ctx, logits, value, factors, dtype):
        empty = logits.isneginf().all(-1)
        lse = torch.where(empty[..., None], 0, logits).logsumexp(-1).masked_fill(empty, -math.inf)
        finite = lse.masked_fill(empty, 0)
        output = (torch.exp(logits - finite[..., None]) * factors) @ value
        output = output.to(dtype).to(value.dtype)
        ctx.save_for_backward(logits, value, factors, output, finite)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        logits, value, factors, output, lse = ctx.saved_tensors
        weights = torch.exp(logits - lse[..., None])
        delta = (grad_output * output).sum(-1) - torch.where(lse.isinf(), 0, grad_lse)
        grad_logits = weights * (grad_output @ value.mT * factors - delta[..., None])
        return grad_logits, (weights * factors).mT @ grad_output, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    factors: Tensor | None = None,
    scale: float | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; bias and gate are spread, `factors` multiply the probabilities.

    Half types are computed in float32.
    """
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    query, key, value = (x.to(wide) for x in (query, key, value))
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if gate is not None:
        logits = logits * gate.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        allowed = allowed & ~bias.isneginf()
        logits = logits + torch.where(bias.isneginf(), 0, bias).to(wide)
    logits = logits.masked_fill(~allowed, -math.inf)
    factors = torch.ones((), dtype=wide, device=DEVICE) if factors is None else factors.to(wide)
    empty = ~allowed.any(-1).expand(logits.shape[:-1])
    if recompute:
        output, lse = Recomputed.apply(logits, value, factors, dtype)
    else:
        lse = torch.where(empty[..., None], 0, logits).logsumexp(-1).masked_fill(empty, -math.inf)
        weights = torch.exp(logits - lse.masked_fill(empty, 0)[..., None])
        output = (weights * factors) @ value
    if sink is not None:
        share = torch.sigmoid(lse.masked_fill(empty, 0) - sink.to(wide)[:, None])
        output = output * share[..., None]
    return output.to(dtype), lse


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    leaves: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    output, lse = function(*leaves)
    finite = torch.where(lse.isinf(), 0, lse)
    loss = (output.double() * cotangents[0].double()).sum() + (finite * cotangents[1]).sum()
    made = torch.autograd.grad(loss, leaves, allow_unused=True)
    made = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, made, strict=True)]
    return [x.detach() for x in (output, lse, *made)]


def check(
    ours: Callable[..., tuple[Tensor, Tensor]],
    dense: Callable[..., tuple[Tensor, Tensor]],
    leaves: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor],
) -> None:
    """Hold results and gradients of `ours` to twice the error of `dense` in the same dtype."""
    exact = gradients(dense, [x.double() for x in leaves], cotangents)
    torchs = [
        gradients(function, leaves, cotangents)
        for function in (dense, functools.partial(dense, recompute=True))
    ]
    results = gradients(ours, leaves, cotangents)
    for i, (result, *others, truth) in enumerate(zip(results, *torchs, exact, strict=True)):
        name = ("output", "log-sum-exp")[i] if i < 2 else f"gradient {i - 2}"
        reference.assert_within_budget(name, result, others, truth)
