"""The weights of attention, computed pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.merging import softmax_of_two
from sparse_attn.patterns import Pattern
from sparse_attn.sparse_weights import SparseWeights
from sparse_attn.tables import DENSE, SLOPES, SLOTS, BlockBias, SlotBias, encode_table, slot_windows


def attention_weights(
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    lse: Tensor | None = None,
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
) -> SparseWeights:
    """The weights of `attention` with these arguments, without the values.

    The pairs are listed on the host, so masks and tensors of the pattern are read from the device.

    Args:
        query: As for `attention`, and so are the arguments that are not named here.
        key: (batch, heads_kv, n_k, head_dim).
        pattern: A `Pattern`.
        lse: The log-sum-exp that `attention` returned for the same arguments, if at hand: saves a
            pass over the pairs. Derivatives do not go through it.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device or value does not fit.

    >>> query, key = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16)
    >>> weights = attention_weights(query, key, Window(4), enable_gqa=True)
    >>> torch.allclose(weights.to_dense().sum(-1), torch.ones(1, 4, 50))
    True
    """
    query, key = _under_autocast(query, key)
    batch, heads, n_q, n_k = _sizes(query, key, enable_gqa)
    crow, col = ops._pattern_pairs(
        pattern.encode(),
        pattern.tensors(n_q, n_k),
        n_q,
        n_k,
        batch,
        heads,
        key_padding_mask=key_padding_mask,
        global_mask=global_mask,
    )
    crow, col = crow.to(query.device), col.to(query.device)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = ops.pair_products(query, key, crow, col) * scale
    pairs = SparseWeights(logits, crow, col, n_k, pattern, key_padding_mask, global_mask)
    if gate is not None:
        logits = logits * _of_pairs("gate", gate, pairs)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + _of_pairs("bias", bias, pairs)
    values = _softmax(logits, pairs, lse, sink)
    if dropout_p > 0:
        if dropout_seed is None:
            dropout_seed = torch.randint(2**63 - 1, ())
        kept = ops._pair_dropout(dropout_seed, dropout_p, crow, col)
        values = values * kept * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return replace(pairs, values=values)


def _under_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """As the op casts them; float64 stays float64."""
    for tensor in tensors:
        kind = tensor.device.type
        if not tensor.is_meta and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
            tensor = tensor.to(torch.get_autocast_dtype(kind))
        yield tensor


def _sizes(query: Tensor, key: Tensor, enable_gqa: bool) -> tuple[int, int, int, int]:
    if query.is_meta:
        raise NotImplementedError(
            "sparse_attn: expected query with data for its weights, whose number follows from the "
            "pattern, got one on device meta"
        )
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(
                f"sparse_attn: expected {name} of shape (batch, heads, length, size), 4 "
                f"dimensions, got shape {tuple(tensor.shape)}"
            )
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"sparse_attn: expected key with {query.shape[1]} heads, as query (enable_gqa=True "
            f"allows a divisor), got {key.shape[1]}"
        )
    return (*query.shape[:3], key.shape[2])


def _softmax(
    logits: Tensor, pairs: SparseWeights, lse: Tensor | None, sink: Tensor | None
) -> Tensor:
    """exp(logit − m) over the row's sum, times what the sink leaves; m only keeps exp finite."""
    batch, heads, n_q, n_k = pairs.shape
    indices = pairs.crow_indices, pairs.col_indices
    # The ops of pairs with columns of 1 sum rows, and hand a row's number to its pairs.
    ones = logits.new_ones(1).expand(batch, 1, n_k, 1)
    if lse is None:
        offsets = pairs._offsets()
        lse = torch.segment_reduce(
            logits.detach(), "max", offsets=offsets, initial=-math.inf, unsafe=True
        ).view(batch, heads, n_q)
    largest = lse.detach()
    largest = largest.masked_fill(largest == -math.inf, 0)
    powers = torch.exp(logits - ops.pair_products(largest[..., None], ones, *indices))
    total = ops.pair_sums(powers, ones, *indices)
    total = torch.where(total == 0, 1, total)  # no keys, or a bias of −inf for each
    weights = powers / ops.pair_products(total, ones, *indices)
    if sink is None:
        return weights
    lead = largest + total.squeeze(-1).log() - sink.to(logits.dtype)[:, None]
    share, _ = softmax_of_two(lead)
    return weights * ops.pair_products(share[..., None], ones, *indices)


def _of_pairs(name: str, given: Tensor | SlotBias | BlockBias, pairs: SparseWeights) -> Tensor:
    """The number of a table of bias or gate for each pair."""
    table, kind = encode_table(name, given, pairs.pattern)
    table = table.to(pairs.dtype)
    heads, n_q = pairs.shape[1:3]
    row = pairs._rows()
    example, head = row // max(1, n_q * heads), row // max(1, n_q) % max(1, heads)
    query, key = row % max(1, n_q), pairs.col_indices
    if kind == SLOPES:
        _check_table(name, table, pairs.shape, 1, 1)
        return -_looked_up(table, example, head) * pairs._distance(row).abs()
    if kind == SLOTS:
        _check_table(name, table, pairs.shape, n_q, table.shape[-1])
        windows = slot_windows(name, pairs.pattern)
        left, step = (pairs._of_heads([w[i] for w in windows])[head] for i in (0, 2))
        distance = pairs._distance(row)
        slot = distance // step + left
        on_slot = (distance % step == 0) & (slot >= 0) & (slot < table.shape[-1])
        found = _looked_up(table, example, head, query, slot.clamp(0, table.shape[-1] - 1))
        return torch.where(on_slot, found, 1 if name == "gate" else 0)
    block = 1 if kind == DENSE else kind
    _check_table(name, table, pairs.shape, -(-n_q // block), -(-pairs.n_k // block))
    return _looked_up(table, example, head, query // block, key // block)


def _check_table(name: str, table: Tensor, shape: torch.Size, rows: int, columns: int) -> None:
    expected = (*shape[:2], rows, columns)
    alike = (True, True, rows == shape[2], False)  # where 1 stands for all
    sizes = zip(table.shape, expected, alike, strict=True)
    if not all(given == size or (given == 1 and one) for given, size, one in sizes):
        raise ValueError(
            f"sparse_attn: expected {name}'s table of shape {expected} (batch or 1, heads or 1, "
            f"rows, columns), got {tuple(table.shape)}"
        )


def _looked_up(table: Tensor, *index: Tensor) -> Tensor:
    """table[index], where a dimension of 1 is the same for all."""
    place = index[0].new_zeros(index[0].shape)
    for one, size, stride in zip(index, table.shape, table.contiguous().stride(), strict=False):
        if size > 1:
            place = place + one * stride
    # Which of the two has a deterministic derivative depends on the device.
    return table.flatten()[place] if table.is_cuda else table.flatten().index_select(0, place)


@torch.library.register_fake("sparse_attn::_pattern_pairs")
def _fake_pairs(pattern, pattern_tensors, n_q, n_k, batch, heads, **masks):
    pairs = torch.library.get_ctx().new_dynamic_size()
    crow = torch.empty(batch, heads, n_q + 1, dtype=torch.int64)
    return crow, torch.empty(pairs, dtype=torch.int64)


@torch.library.register_fake("sparse_attn::_pair_dropout")
def _fake_dropout(seed, p, crow_indices, col_indices):
    return torch.empty_like(col_indices, dtype=torch.bool)
