"""Softmax attention over a pattern or over listed keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.functional._common import check_flag, check_numbers
from sparse_attn.patterns import KeyLists, Pattern, check_pattern
from sparse_attn.sparse_weights import SparseWeights
from sparse_attn.tables import BlockBias, SlotBias, encode_table
from sparse_attn.weights import attention_weights


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    key_padding_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    bias: Tensor | SlotBias | BlockBias | None = None,
    gate: Tensor | SlotBias | BlockBias | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor | SparseWeights, ...]:
    """Softmax attention over the pairs that a pattern allows, fused, in memory linear in the
    length.

    output[b, h, i] = Σ_j softmax_j(logit[b, h, i, j]) value[b, h, j], over the keys j that query i
    sees, with logit = softcap(gate · scale · query[b, h, i] · key[b, h, j]) + bias. A query that
    sees none gives output 0, log-sum-exp −inf and gradient 0.

    All of it is differentiable twice, in reverse and in forward mode.

    What padded keys hold does not matter. NaN or infinity in a key or value that only the pattern
    or a bias of −inf excludes may reach other queries, as in torch: 0 · NaN is NaN.

    Args:
        query: (batch, heads, n_q, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads_kv, n_k, head_dim), as query. With n_q ≠ n_k the ends are aligned: query
            i stands at position i + n_k − n_q.
        value: (batch, heads_kv, n_k, value_dim), as query.
        pattern: A `Pattern`; `PerHead` for one per head.
        key_padding_mask: (batch, n_k) bool, True = ignore this key.
        global_mask: (batch, n_k) bool, True = a global token of this example. Allowed are then the
            pairs of the pattern and of the rows and columns of these tokens, intersected with
            `Causal()` if the pattern is causal (of a `PerHead`, head by head).
        bias: Added to the logits; −inf excludes a key. (heads,): ALiBi's slopes, adding
            −slope · |i − j|. (heads, slots): Toeplitz, a number for each slot of the pattern's
            window, `left + 1 + right` of them, the furthest left first; for each query apart with
            (heads, n_q, slots). (batch or 1, heads or 1, n_q, n_k): for each pair. `SlotBias` and
            `BlockBias` take tables of other shapes. Query's dtype, or that of the log-sum-exp.
        gate: Multiplies the scaled products; shapes as bias, without slopes. For a learned gate
            pass `torch.sigmoid(parameter)`.
        dropout_p: Probability that a key's weight is dropped; those kept are divided by 1 −
            dropout_p.
        dropout_seed: int64 tensor of no dimensions, on query's device: the same seed drops the
            same pairs, whatever the device or the number of threads. Drawn if None.
        scale: Factor of the products; 1 / √head_dim if None.
        softcap: Bounds the logits, before the bias, smoothly: softcap · tanh(logit / softcap).
        sink: (heads,), a logit without a value in each head's softmax. The log-sum-exp does not
            count it.
        enable_gqa: Let heads be a multiple of heads_kv: query head h uses key head h // (heads /
            heads_kv).
        return_lse: Also return the log-sum-exp of the scaled logits, natural logarithm, (batch,
            heads, n_q); float32 for half types. It is differentiable.
        return_weights: Also return the `SparseWeights`, differentiable any number of times, in
            memory linear in the pairs. Which pairs there are is listed on the host, which waits
            for the masks where they are on a device.

    Returns:
        The output (batch, heads, n_q, value_dim), in query's dtype; with `return_lse` or
        `return_weights` a tuple: output, log-sum-exp, weights, as far as asked for. Half types are
        summed in float32. The same inputs give bitwise the same results for any number of threads.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit, or a token does not exist.
        NotImplementedError: On CUDA, heads of more than 256.

    >>> import torch
    >>> from sparse_attn import Global, Window, alibi_slopes, attention
    >>> query, key, value = (torch.randn(2, 4, 100, 32, requires_grad=True) for _ in range(3))
    >>> output, lse = attention(query, key, value, Window(16) | Global([0]), return_lse=True)
    >>> output.shape, lse.shape
    (torch.Size([2, 4, 100, 32]), torch.Size([2, 4, 100]))
    >>> output.sum().backward()
    >>> attention(query, key, value, Window(16, 0), bias=alibi_slopes(4)).shape
    torch.Size([2, 4, 100, 32])
    """
    check_pattern(pattern)
    _check_tensors(
        query=query,
        key=key,
        value=value,
        key_padding_mask=key_padding_mask,
        global_mask=global_mask,
        dropout_seed=dropout_seed,
        sink=sink,
    )
    check_numbers(dropout_p=dropout_p, scale=scale, softcap=softcap)
    _check_flags(enable_gqa=enable_gqa, return_lse=return_lse, return_weights=return_weights)
    bias_table, bias_kind = encode_table("bias", bias, pattern)
    gate_table, gate_kind = encode_table("gate", gate, pattern)
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (), device=query.device)
    options = {
        "key_padding_mask": key_padding_mask,
        "global_mask": global_mask,
        "bias": bias_table,
        "bias_kind": bias_kind if bias is not None else None,
        "gate": gate_table,
        "gate_kind": gate_kind if gate is not None else None,
        "dropout_seed": dropout_seed,
        "scale": scale,
        "softcap": softcap,
        "sink": sink,
        "enable_gqa": enable_gqa or None,
    }
    output, lse = ops.attention(
        query,
        key,
        value,
        pattern.encode(),
        pattern.tensors(_length(query), _length(key)),
        dropout_p=dropout_p,
        # Each keyword takes torch 0.3 us, one at its default as well.
        **{name: given for name, given in options.items() if given is not None},
    )
    results = (output, lse) if return_lse else (output,)
    if return_weights:
        weights = attention_weights(
            query,
            key,
            pattern,
            lse,
            key_padding_mask=key_padding_mask,
            global_mask=global_mask,
            bias=bias,
            gate=gate,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            scale=scale,
            softcap=softcap,
            sink=sink,
            enable_gqa=enable_gqa,
        )
        results = (*results, weights)
    return results if len(results) > 1 else output


def index_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of each query over a list of keys of its own: `attention` with `KeyLists`.

    Keys and values are gathered row by row inside the kernel. What is not computed costs nothing,
    a key that is listed twice counts once, and the backward pass, over the transposed lists, is
    deterministic.

    Args:
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads_kv, n_k, head_dim).
        value: (batch, heads_kv, n_k, value_dim).
        indices: (batch or 1, heads or 1, n_q, k) int64 or int32: keys in [0, n_k), in any order.
        counts: How many of the k hold for each query, (batch or 1, heads or 1, n_q); all if None.
        **options: Those of `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or device does not fit, or an index or a count is out of range.

    >>> import torch
    >>> query, key, value = (torch.randn(1, 4, 100, 32) for _ in range(3))
    >>> nearest = (query @ key.mT).topk(8).indices
    >>> index_attention(query, key, value, nearest).shape
    torch.Size([1, 4, 100, 32])
    """
    return attention(query, key, value, KeyLists(indices, counts), **options)


def _length(tensor: Tensor) -> int:
    return tensor.shape[-2] if tensor.dim() > 1 else 0


_REQUIRED = ("query", "key", "value")


def _check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if argument is None and name not in _REQUIRED:
            continue
        if not isinstance(argument, Tensor):
            raise TypeError(
                f"sparse_attn: expected {name} to be a Tensor, got {type(argument).__name__}"
            )
        if argument.is_nested:
            raise TypeError(f"sparse_attn: expected {name} to be a dense Tensor, got a nested one")


def _check_flags(**arguments: object) -> None:
    for name, argument in arguments.items():
        check_flag(name, argument)
