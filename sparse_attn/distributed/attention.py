"""Attention over a sequence that no rank holds whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn._uncompiled import uncompiled
from sparse_attn.distributed.agreement import agree, data_in_words, has_generated_data
from sparse_attn.distributed.arguments import group_of, lengths_of, read_arguments
from sparse_attn.distributed.call import Call
from sparse_attn.distributed.exchange import count, named_error
from sparse_attn.distributed.shards import Shards, find_needs, part_words, with_global_tokens
from sparse_attn.functional._common import as_autocast, autocast_is_on
from sparse_attn.patterns import Full, Pattern
from sparse_attn.tables import DENSE, SLOTS, BlockBias, SlotBias

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@uncompiled
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    lengths: Sequence[int] | Sequence[tuple[int, int]] | None = None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_attn.attention` over a sequence that is sharded over the ranks of a process group.

    Rank r holds the queries, keys and values that follow those of rank r − 1; shards may differ in
    length, be shorter than a window, or empty. Each rank receives the keys that its queries see,
    and no others: of a window the halos of left · dilation and right · dilation tokens, of global
    keys these, of block lists and random patterns what they name. Queries that see (nearly) all
    keys go the other way: every rank computes them over its own keys, and their rank joins the
    parts by their log-sum-exps (`sparse_attn.merge`). Only patterns that need all keys, such as
    `Full()`, gather them all; `pattern.communication(n, ranks)` says what is sent. The rank's own
    keys are attended while the messages are under way, forward and backward.

    The numbers are those of the single process on the whole sequence, to rounding: random patterns
    and dropout draw by the tokens of the whole. Every rank must make the same call, in the same
    order, and go backward through it alike. The gradients of what all ranks share (bias tables,
    slopes, sink) are the rank's share of them: sum them over the group, as those of parameters.

    Source: ring attention (Liu et al. 2023) and torch's context parallelism move all keys; halos
    are those of convolutions and stencils, the merge that of FlashAttention (Dao et al. 2022).

    Args:
        query: (batch, heads, n_q of the rank, head_dim); float64, float32, bfloat16 or float16.
        key: (batch, heads_kv, n_k of the rank, head_dim), as query.
        value: (batch, heads_kv, n_k of the rank, value_dim), as query.
        pattern: A `Pattern` of the whole sequence; its tensors, if it has any, are whole too and
            the same on all ranks.
        group: A process group, or a `DeviceMesh` of one dimension, such as `mesh["cp"]`; the
            default group if None. gloo on CPUs, NCCL on CUDA; all communication is its.
        lengths: The length of each rank's shard, or (queries, keys) of each: the same on all ranks.
            If None, the ranks tell each other, some bytes in every call; with it they compare their
            calls once, and wait for nothing afterwards.
        key_padding_mask: (batch, n_k of the rank) bool, True = ignore this key.
        global_mask: (batch, n_k of the rank) bool, True = a global token of this example. All ranks
            gather its bytes, and the keys of tokens that are global in any example.
        bias: As in `attention`. Tables with a row for each query hold the rank's rows, those with a
            column for each key all columns: (batch or 1, heads or 1, n_q of the rank, n_k of the
            whole). Others, `BlockBias` too, are whole and the same on all ranks.
        gate: As bias.
        dropout_p: As in `attention`.
        dropout_seed: The same on all ranks; that of the first one, which draws it, if None.
        scale: As in `attention`.
        softcap: As in `attention`.
        sink: As in `attention`, the same on all ranks.
        enable_gqa: As in `attention`.
        return_lse: Also return the log-sum-exp, (batch, heads, n_q of the rank).

    Returns:
        The rank's rows of the output, (batch, heads, n_q of the rank, value_dim); with `return_lse`
        a tuple of these and the log-sum-exp.

    Raises:
        TypeError: An argument has the wrong type or dtype; a DTensor, whose `to_local()` is wanted.
        ValueError: A shape does not fit, the process is not in the group, or the ranks' calls
            differ: in pattern, sizes, dtype or options. All ranks raise alike; with `lengths`, a
            rank that knows its own arguments to be wrong raises alone.
        RuntimeError: torch.distributed failed, or a rank did not answer within the group's timeout;
            says what was being exchanged.
        NotImplementedError: A second derivative.

    >>> import os, tempfile
    >>> import torch.distributed as dist
    >>> from sparse_attn import Window, attention
    >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> query, key, value = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> output = context_parallel_attention(query, key, value, Window(8))
    >>> torch.equal(output, attention(query, key, value, Window(8)))
    True
    >>> dist.destroy_process_group()
    """
    group = group_of(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    try:
        given = read_arguments(
            pattern,
            {"query": query, "key": key, "value": value},
            {"key_padding_mask": key_padding_mask, "global_mask": global_mask},
            {"bias": bias, "gate": gate},
            {"dropout_p": dropout_p, "scale": scale, "softcap": softcap},
            enable_gqa,
            dropout_seed,
            sink,
        )
        known = None if lengths is None else lengths_of(lengths, ranks)
    except (TypeError, ValueError) as error:
        if lengths is None:  # the ranks meet before anything is sent
            agree(group, {"arguments": str(error)}, (0, 0))
        raise
    draws = dropout_p > 0 and dropout_seed is None
    seed = torch.randint(2**63 - 1, (), device=query.device) if draws else dropout_seed
    agreement = agree(group, given.describe(), given.own_lengths, known, seed, draws)
    shards = agreement.shards
    if has_generated_data(pattern):
        made = data_in_words(pattern.tensors(*shards.sizes))
        agree(group, {"layout of the pattern": made}, given.own_lengths, known).accept()
    options = given.options() | {"dropout_seed": agreement.seed if draws else dropout_seed}
    expression = pattern
    if global_mask is not None:
        whole_mask = _gather_mask(global_mask, shards.keys, group)
        options["global_mask"] = whole_mask
        expression = with_global_tokens(pattern, whole_mask.any(0).nonzero().flatten().tolist())
    row_tables = any(_has_rows(table, kind, shards) for table, kind in given.tables.values())
    routed_share = 0.0 if row_tables else _routed_share(query, key)
    needs = find_needs(expression, shards, routed_share, rank)
    call = Call(pattern, needs, rank, group, options, row_tables)
    tensors = _as_autocast(query, key, value)
    if agreement.is_new:
        call.check(*tensors, key_padding_mask, sink)
        agreement.accept()
    output, lse = call.run(*tensors, key_padding_mask)
    if sink is not None:
        some = lse.masked_fill(lse == -math.inf, 0.0)  # without keys the output is 0, whatever
        share = torch.sigmoid(some - sink.to(lse.dtype)[:, None])
        output = (output.to(lse.dtype) * share[..., None]).to(output.dtype)
    return (output, lse) if return_lse else output


def attention_to_shared_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sharded queries over keys that all ranks have, all of which they see: output and log-sum-exp.

    Dropout draws by the queries of the whole, from a seed of the first rank.
    """
    group = group_of(group)
    words = {"shared keys": f"{tuple(key.shape)}, dropout {dropout_p}"}
    seed = torch.randint(2**63 - 1, (), device=query.device)
    agreement = agree(group, words, (query.shape[2], 0), seed=seed, draws=True)
    start, stop = agreement.shards.query_run(dist.get_rank(group))
    n_q, n_k = sum(agreement.shards.queries), key.shape[2]
    queries = [(start, stop)] if stop > start else []
    keys = [(0, 0, n_k)] if n_k > 0 else []
    return ops.attention(
        query,
        key,
        value,
        part_words(Full(), (n_q, n_k), queries, keys),
        [],
        dropout_p=dropout_p,
        dropout_seed=agreement.seed,
    )


def _gather_mask(mask: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """(batch, n_k of the whole): every rank's part, a byte for each token."""
    room = mask.new_zeros(mask.shape[0], max(lengths), dtype=torch.uint8)
    room[:, : mask.shape[1]] = mask
    parts = [torch.empty_like(room) for _ in lengths]
    with named_error("the global masks of all ranks"):
        dist.all_gather(parts, room, group=group)
    count(room.numel() * (len(parts) - 1), "forward")
    held = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(held, 1).to(torch.bool)


def _has_rows(table: Tensor | None, kind: int, shards: Shards) -> bool:
    """Whether it may have a row for each query, which stays where the query is. Next to a shard of
    one query a table of one row says nothing, so that all ranks take it for one of rows.
    """
    if table is None or kind not in (SLOTS, DENSE):
        return False
    return kind == DENSE or table.shape[2] != 1 or 1 in shards.queries


def _routed_share(query: Tensor, key: Tensor) -> float:
    """Up to which share of the keys global queries are sent to the keys: there and back they are
    as much as the keys.
    """
    return key.shape[1] / (2 * query.shape[1]) if query.shape[1] else 0.0


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As the op casts them, before they travel."""
    kind = tensors[0].device.type
    if not autocast_is_on(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(as_autocast(x, dtype) for x in tensors)
