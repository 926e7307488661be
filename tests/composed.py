"""What the tests of the attentions that are composed of others share: definitions and budgets."""

from __future__ import annotations

import math
import statistics
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


def assert_as_good_on_average(
    ours: Callable, definition: Callable, draws: Sequence[Sequence[Tensor]]
):
    """The same by the medians of many draws: for single numbers and for functions that magnify
    roundings, whose error on one draw is chance."""
    errors = {ours: [], definition: []}
    for tensors in draws:
        exact = with_gradients(definition, [x.double() for x in tensors])
        for function, found in errors.items():
            results = with_gradients(function, tensors)
            found.append([
                (x.double() - true).square().mean().sqrt().item()
                for x, true in zip(results, exact, strict=True)
            ])  # fmt: skip
    medians = (map(statistics.median, zip(*found, strict=True)) for found in errors.values())
    for i, (mine, torchs) in enumerate(zip(*medians, strict=True)):
        assert mine <= 2 * torchs, f"result {i}: error {mine:.3g}, torch {torchs:.3g}"


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


def unpadded(x, padding):
    return x if padding is None else x.masked_fill(padding[:, None, :, None], 0)


def of_rank(key, rank):
    """The best approximation of this rank, by the singular value decomposition."""
    wide = torch.promote_types(key.dtype, torch.float32)
    left, sizes, right = torch.linalg.svd(key.to(wide), full_matrices=False)
    truncated = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
    return truncated.to(key.dtype)


def low_rank_definition(*tensors, rank, padding=None, scale=None):
    def one(query, key, value):
        return dense(query, of_rank(key, rank), value, scale=scale)

    return by_example(one, tensors, padding)


def along(x, factor, mode):
    """x times factor along one dimension."""
    return torch.tensordot(x, factor, ([mode], [0])).movedim(-1, mode)


def leading(x, mode, rank):
    """The leading singular vectors of an unfolding."""
    return torch.linalg.svd(x.movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :rank]


def tucker(x, ranks, iterations):
    """Truncated higher-order SVD of (heads, keys, features), and sweeps of orthogonal iteration."""
    factors = [leading(x, mode, rank) for mode, rank in enumerate(ranks)]

    def core(but=None):
        result = x
        for mode in range(3):
            result = result if mode == but else along(result, factors[mode], mode)
        return result

    for mode in [1, 0, 2] * iterations + [1] * (iterations > 0):
        factors[mode] = leading(core(but=mode), mode, ranks[mode])
    result = core()
    for mode in range(3):
        result = along(result, factors[mode].T, mode)
    return result


def tucker_definition(*tensors, ranks, iterations=0, padding=None):
    def one(query, key, value):
        wide = torch.promote_types(key.dtype, torch.float32)
        truncated = tucker(key[0].to(wide), ranks, iterations).to(key.dtype)
        return dense(query, truncated[None], value)

    return by_example(one, tensors, padding)


def linformer_definition(query, key, value, proj_k, proj_v=None, padding=None):
    proj_v = proj_k if proj_v is None else proj_v
    n_k = key.shape[2]
    key, value = unpadded(key, padding), unpadded(value, padding)
    output = dense(query, proj_k[..., :n_k, :].mT @ key, proj_v[..., :n_k, :].mT @ value)
    return (
        output if padding is None else output.masked_fill(padding.all(-1)[:, None, None, None], 0)
    )
