"""Attention through landmarks that stand for segments of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.functional._common import (
    check_inputs,
    check_options,
    check_padding,
    in_autocast_dtype,
    scale_of,
    without_padding,
)
from sparse_attn.functional._products import one_thread, product
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full
from sparse_attn.patterns.arguments import index


@in_autocast_dtype
def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_landmarks: int,
    *,
    iterations: int | None = 6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Nyströmformer's attention (Xiong et al. 2021, section 3): with landmarks Q̃, K̃, the means of
    segments of queries and keys, S(Q K̃ᵀ) S(Q̃ K̃ᵀ)⁺ S(Q̃ Kᵀ) V, where S is the softmax of the scaled
    products and ⁺ the pseudo-inverse.

    Segments are runs of tokens that are no padding, as equal in length as can be: any length has
    as many landmarks as any other, or one for each token if it has fewer. The softmax over the
    landmarks and that over all keys are fused, so no matrix but the middle one is stored. Every
    landmark holds later keys, so there is no causal form.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads, n_k, head_dim), as query.
        value: (batch, heads, n_k, value_dim), as query.
        num_landmarks: At least 1. Where there are no more queries, or no more keys, than that, it
            is dense attention.
        iterations: Steps of the iteration of the paper (equation 11) towards the pseudo-inverse,
            which starts from the transpose over its norms, those of each matrix by itself; None
            for the pseudo-inverse itself, by singular values.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        query_padding_mask: (batch, n_q) bool, True = leave this query out of the landmarks. If
            None and n_q = n_k, it is the mask of the keys, as in self-attention.
        scale: Factor of the products; 1 / √head_dim if None.
        **options: dropout_p and dropout_seed, for the softmax over the landmarks, and enable_gqa,
            as in `attention`.

    Returns:
        (batch, heads, n_q, value_dim), in query's dtype.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> import torch
    >>> from sparse_attn.functional import nystrom_attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> nystrom_attention(query, key, value, 16).shape
    torch.Size([2, 4, 100, 32])
    """
    check_options("nystrom_attention", options, ("dropout_p", "dropout_seed", "enable_gqa"))
    gqa = options.pop("enable_gqa", False)
    check_inputs(query, key, value, key_padding_mask, enable_gqa=gqa)
    if query_padding_mask is not None:
        check_padding(query_padding_mask, query, name="query_padding_mask")
    elif query.shape[2] == key.shape[2]:
        query_padding_mask = key_padding_mask
    landmarks = index("num_landmarks", num_landmarks, 1)
    iterations = None if iterations is None else index("iterations", iterations, 1)
    scale = scale_of(scale, query.shape[-1])
    if landmarks >= min(query.shape[2], key.shape[2]):
        return attention(
            *(query, key, value, Full()),
            key_padding_mask=key_padding_mask,
            scale=scale,
            enable_gqa=gqa,
            **options,
        )
    key, value = (without_padding(x, key_padding_mask) for x in (key, value))
    of_queries, _ = _segment_means(query, query_padding_mask, landmarks)
    of_keys, empty = _segment_means(key, key_padding_mask, landmarks)
    group = query.shape[1] // max(key.shape[1], 1)
    of_keys = of_keys.repeat_interleave(group, 1)
    gathered = attention(
        *(of_queries.to(query.dtype), key, value, Full()),
        key_padding_mask=key_padding_mask,
        scale=scale,
        enable_gqa=gqa,
    )
    middle = _softmax(scale * product(of_queries, of_keys.mT), empty)
    mixed = product(_pseudo_inverse(middle, iterations), gathered.to(middle.dtype))
    if empty is not None:  # where each key is a landmark, there is nothing to approximate
        of_values = _segment_means(value, key_padding_mask, landmarks)[0]
        few = (~key_padding_mask).sum(-1) <= landmarks
        mixed = torch.where(few[:, None, None, None], of_values.repeat_interleave(group, 1), mixed)
    return attention(
        *(query, of_keys.to(query.dtype), mixed.to(query.dtype), Full()),
        key_padding_mask=empty,
        scale=scale,
        **options,
    )


def _segment_means(
    x: Tensor, padding: Tensor | None, segments: int
) -> tuple[Tensor, Tensor | None]:
    """(batch, heads, segments, size), float32 for half types, and which segments are empty.

    Segment s has the tokens number ⌊s · n / segments⌋ and on, before the next, of the n that are
    no padding. Each token is gathered once, so that the gradient has no sums of chance order.
    """
    length = x.shape[2]
    longest = -(-length // segments)
    number = torch.arange(segments + 1, device=x.device)
    if padding is None:
        bounds = number[None] * length // segments
    else:
        bounds = number * (~padding).sum(-1, keepdim=True) // segments
    place = bounds[:, :-1, None] + torch.arange(longest, device=x.device)
    inside = place < bounds[:, 1:, None]
    tokens = place.clamp(max=length - 1).flatten(1)
    if padding is not None:
        tokens = padding.to(torch.uint8).argsort(dim=-1, stable=True).gather(1, tokens)
    tokens = tokens[:, None, :, None].expand(len(x), x.shape[1], -1, x.shape[3])
    rows = x.gather(2, tokens).unflatten(2, (segments, longest))
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = rows.to(wide).masked_fill(~inside[:, None, ..., None], 0).sum(3)
    counts = inside.sum(-1)
    means = sums / counts.clamp(min=1)[:, None, :, None]
    return means, None if padding is None else counts == 0


def _softmax(logits: Tensor, empty: Tensor | None) -> Tensor:
    """Over the landmarks of the keys that are not empty; 0 if all are.

    torch.softmax has a backward pass whose bits depend on the threads.
    """
    excluded = None if empty is None else empty[:, None, None]
    lowest = torch.finfo(logits.dtype).min
    logits = logits if empty is None else logits.masked_fill(excluded, lowest)
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    weights = weights if empty is None else weights.masked_fill(excluded, 0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)


def _pseudo_inverse(matrix: Tensor, iterations: int | None) -> Tensor:
    if iterations is None:
        with one_thread(matrix.device):
            return torch.linalg.pinv(matrix)
    norms = matrix.sum(-1).amax(-1) * matrix.sum(-2).amax(-1)
    tiny = torch.finfo(matrix.dtype).tiny  # where no key is left, the matrix is 0
    guess = matrix.mT / norms.clamp(min=tiny)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        near = product(matrix, guess)  # to the identity
        polynomial = 15 * identity - product(near, 7 * identity - near)
        guess = product(guess, 13 * identity - product(near, polynomial)) / 4
    return guess
