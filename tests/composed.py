"""What the tests of the attentions that are composed of others share: definitions and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import reference
import torch
from cases import DEVICE
from torch import Tensor


def dense(query, key, value, padding=None, scale=None, gate=None, allowed=None):
    """softmax(scale · query · keyᵀ · gate) value, written out; a query without keys gives 0."""
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask[None, None] if allowed is None else mask & allowed
    if padding is not None:
        mask = mask & ~padding[:, None, None]
        key, value = (x.masked_fill(padding[:, None, :, None], 0) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = scale * query @ key.mT
    logits = logits if gate is None else logits * gate.to(logits.dtype)
    empty = ~mask.any(-1, keepdim=True)
    weights = logits.masked_fill(~mask, -math.inf).masked_fill(empty, 0).softmax(-1)
    return weights.masked_fill(empty, 0) @ value


def with_gradients(function: Callable, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, for a cotangent that is drawn in the tensors' dtype."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(output.shape, generator=generator).to(tensors[0].dtype).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def assert_as_good_as_torch(ours: Callable, definition: Callable, tensors: Sequence[Tensor]):
    """Output and gradients err at most twice as much as the definition in the same dtype.

    The definition is run with three other orders of the features too, which mean the same: its
    error is what it would be on another day, and in float64 there is no other to be had.
    """
    exact = with_gradients(definition, [x.double() for x in tensors])
    torchs = [_in_another_order(definition, tensors, seed) for seed in range(3)]
    torchs.append(with_gradients(definition, tensors))
    results = with_gradients(ours, tensors)
    names = ("output", "query", "key", "value", *(f"tensor {i}" for i in range(3, 9)))
    for name, mine, true, *own in zip(names, results, exact, *torchs, strict=False):
        reference.assert_within_budget(name, mine, own, true)


def _in_another_order(definition: Callable, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tensors[0].shape[-1], generator=generator).to(DEVICE)
    results = with_gradients(definition, [x[..., order] for x in tensors[:2]] + [*tensors[2:]])
    return [x[..., order.argsort()] if i in (1, 2) else x for i, x in enumerate(results)]


def by_example(definition: Callable, tensors: Sequence[Tensor], padding: Tensor | None) -> Tensor:
    """`definition(query, key, value)` for each example, of the keys that are no padding."""
    if padding is None:
        padding = torch.zeros(len(tensors[1]), tensors[1].shape[2], dtype=torch.bool)
    parts = []
    for query, key, value, ignored in zip(*tensors, padding, strict=True):
        kept = ~ignored
        parts.append(definition(query[None], key[None, :, kept], value[None, :, kept]))
    return torch.cat(parts)


def same_bits_for_any_threads(function: Callable, tensors: Sequence[Tensor]):
    """Output and gradients are bitwise the same with 1, 2, 5 and 8 threads."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5, 8):
            torch.set_num_threads(count)
            results.append(with_gradients(function, tensors))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
