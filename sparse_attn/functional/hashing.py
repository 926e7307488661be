"""Locality-sensitive hashing: vectors that point alike share buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.functional._common import without_autocast

# Products that are made at a time, and read while they are in a cache: 1 MiB of float32.
_PRODUCTS = 2**18


def lsh_buckets(
    x: Tensor, rotations: Tensor, num_buckets: int | Sequence[int] | None = None
) -> Tensor:
    """The bucket of each vector in each round of hashing: argmax([xR; −xR]).

    The angular hash of Andoni et al. (2015), as in Reformer (Kitaev et al. 2020, section 2): the
    nearest of the axes of a random rotation, and of their opposites. Norms do not matter, ties go
    to the lower bucket. No gradient passes. Half types are hashed in float32.

    Args:
        x: (batch, heads, length, size).
        rotations: (heads or 1, size, rounds, axes), for twice as many buckets as axes.
        num_buckets: The numbers of buckets of several hashes that are combined, all even, their sum
            twice the number of axes: for [b0, b1] the first b0 / 2 axes give a bucket in [0, b0),
            the others one in [0, b1), which counts b0 times. One hash over all axes if None.

    Returns:
        (batch, heads, rounds, length) int64: numbers from 0 to the product of num_buckets.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The shapes do not fit.

    >>> x = torch.tensor([[1.0, 0.1], [0.2, -3.0], [0.1, 1.0]])[None, None]
    >>> lsh_buckets(x, torch.eye(2)[None, :, None]).tolist()  # two axes: four buckets
    [[[[0, 3, 1]]]]
    """
    for name, tensor in (("x", x), ("rotations", rotations)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"sparse_attn: expected {name} to be a floating Tensor, got {got}")
    factors = bucket_factors(2 * rotations.shape[-1] if num_buckets is None else num_buckets)
    _check_rotations(x, rotations, factors)
    with torch.no_grad(), without_autocast(x):
        x = x.detach()
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.to(wide).flatten(0, 1)
        rotations = rotations.detach().to(wide).expand(x.shape[1], -1, -1, -1)
        rounds = [
            _hash(rows, rotations[:, :, r].repeat(x.shape[0], 1, 1), factors)
            for r in range(rotations.shape[2])
        ]
        return torch.stack(rounds, 1).unflatten(0, x.shape[:2])


def bucket_factors(num_buckets: int | Sequence[int]) -> tuple[int, ...]:
    """num_buckets as a tuple of even numbers."""
    listed = isinstance(num_buckets, Sequence) and not isinstance(num_buckets, str)
    factors = tuple(num_buckets) if listed else (num_buckets,)
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, torch.SymInt)):
            raise TypeError(
                "sparse_attn: expected num_buckets to be an int"
                f"{' or a list of ints' if listed else ''}, got {num_buckets!r}"
            )
    if not factors or any(factor < 2 or factor % 2 for factor in factors):
        raise ValueError(f"sparse_attn: expected num_buckets to be even, got {num_buckets}")
    return factors


def draw_rotations(
    seed: int | torch.Generator | None, shape: tuple[int, int, int, int], like: Tensor
) -> Tensor:
    """Normal numbers of (heads, size, rounds, axes): from a seed always the same, on any device.

    A generator goes on from where it stands; None takes torch's own.
    """
    if seed is None:
        return torch.randn(shape, device=like.device)
    if isinstance(seed, torch.Generator):
        return torch.randn(shape, generator=seed, device=seed.device).to(like.device)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(
            "sparse_attn: expected seed to be an int or a torch.Generator, got "
            f"{type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"sparse_attn: expected seed to have 64 bits, got {seed}")
    return _seeded_normal(seed, shape).to(like.device)


@torch.library.custom_op("sparse_attn::_seeded_normal", mutates_args=())
def _seeded_normal(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@_seeded_normal.register_fake
def _(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape))


def check_rounds(buckets: Tensor, num_hashes: int) -> None:
    """Raise ValueError unless the rotations that gave the buckets had as many rounds."""
    if buckets.shape[2] != num_hashes:
        raise ValueError(
            f"sparse_attn: expected rotations of num_hashes = {num_hashes} rounds, got "
            f"{buckets.shape[2]}"
        )


def _check_rotations(x: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"sparse_attn: expected x of shape (batch, heads, length, size), got {tuple(x.shape)}"
        )
    heads, size, axes = x.shape[1], x.shape[3], sum(factors) // 2
    fits = rotations.dim() == 4 and rotations.shape[0] in (1, heads)
    if not fits or rotations.shape[1] != size or rotations.shape[3] != axes:
        raise ValueError(
            f"sparse_attn: expected rotations of shape ({heads} or 1, {size}, rounds, {axes}), got "
            f"{tuple(rotations.shape)}"
        )
    if rotations.shape[2] < 1:
        raise ValueError("sparse_attn: expected rotations of at least 1 round, got 0")
    if rotations.device != x.device:
        raise ValueError(
            f"sparse_attn: expected rotations on device {x.device}, got {rotations.device}"
        )


def _hash(rows: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(sets, length, size) by (sets, size, axes) to (sets, length) of buckets, some rows at a time:
    memory does not grow with length · axes."""
    sets, length, _ = rows.shape
    step = max(1, _PRODUCTS // max(1, sets * rotations.shape[-1]))
    parts = [
        _combine(torch.bmm(rows[:, first : first + step], rotations), factors)
        for first in range(0, length, step)
    ]
    return torch.cat(parts, 1) if parts else rows.new_zeros((sets, 0), dtype=torch.int64)


def _combine(products: Tensor, factors: tuple[int, ...]) -> Tensor:
    buckets = [
        _nearest_axis(part) * math.prod(factors[:i])
        for i, part in enumerate(products.split([factor // 2 for factor in factors], -1))
    ]
    return sum(buckets[1:], buckets[0])


def _nearest_axis(products: Tensor) -> Tensor:
    """argmax([products; −products])."""
    largest, positive = products.max(-1)
    smallest, negative = products.min(-1)
    return torch.where(largest >= -smallest, positive, negative + products.shape[-1])
