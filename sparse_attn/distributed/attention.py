"""Attention over a sequence that no rank holds whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.distributed.agreement import agree, in_words
from sparse_attn.distributed.exchange import Chain, Exchange, named_error
from sparse_attn.distributed.routes import Route, key_route, query_route, result_route
from sparse_attn.distributed.shards import (
    Needs,
    find_needs,
    part_words,
    runs_of,
    with_global_tokens,
)
from sparse_attn.merging import merge
from sparse_attn.patterns import Pattern, check_pattern
from sparse_attn.tables import DENSE, SLOTS, BlockBias, SlotBias, encode_table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
            differ: in pattern, sizes, dtype or options. All ranks raise alike.
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
    check_pattern(pattern)
    tensors = {"query": query, "key": key, "value": value}
    masks = {"key_padding_mask": key_padding_mask, "global_mask": global_mask}
    _check_tensors(**tensors, **masks, dropout_seed=dropout_seed, sink=sink)
    group = _group(group)
    tables = {
        "bias": encode_table("bias", bias, pattern),
        "gate": encode_table("gate", gate, pattern),
    }
    options = {"dropout_p": dropout_p, "scale": scale, "softcap": softcap, "enable_gqa": enable_gqa}
    draws = dropout_p > 0 and dropout_seed is None
    ranks = dist.get_world_size(group)
    agreement = agree(
        group,
        _description(pattern, tensors, masks, tables, options, sink, dropout_seed),
        (query.shape[2], key.shape[2]),
        None if lengths is None else _lengths(lengths, ranks),
        torch.randint(2**63 - 1, (), device=query.device) if draws else None,
    )
    if draws:
        dropout_seed = agreement.seed
    shards, rank = agreement.shards, dist.get_rank(group)
    whole_mask = None if global_mask is None else _gather_mask(global_mask, shards.keys, group)
    expression = pattern
    if whole_mask is not None:
        expression = with_global_tokens(pattern, whole_mask.any(0).nonzero().flatten().tolist())
    row_tables = any(_has_rows(table, kind) for table, kind in tables.values())
    routed_share = 0.0 if row_tables else _routed_share(query, key)
    needs = find_needs(expression, shards, routed_share, rank)
    call = _Call(
        pattern,
        needs,
        rank,
        group,
        {
            **{name: value for name, value in options.items() if value is not None},
            **{name: table for name, (table, _) in tables.items() if table is not None},
            **{f"{name}_kind": kind for name, (table, kind) in tables.items() if table is not None},
            "global_mask": whole_mask,
            "dropout_seed": dropout_seed,
        },
        row_tables,
    )
    output, lse = call.run(query, key, value, key_padding_mask)
    if sink is not None:
        share = torch.sigmoid(lse - sink.to(lse.dtype)[:, None])
        output = (output.to(lse.dtype) * share[..., None]).to(output.dtype)
    return (output, lse) if return_lse else output


@dataclass(frozen=True)
class _Call:
    """One rank's share of a call: its own keys, those that it receives, the queries of others."""

    pattern: Pattern
    needs: Needs
    rank: int
    group: dist.ProcessGroup
    options: dict[str, Any]
    row_tables: bool  # there is a bias or a gate with a row for each query

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rank's queries."""
        needs, device = self.needs, query.device
        own_queries = (needs.shards.query_run(self.rank),)
        far_queries = own_queries if self.row_tables and needs.far else needs.far
        route, buffer = key_route(needs, self.rank, far_queries)
        keys = route.on(device)
        queries = query_route(needs, self.rank).on(device)
        results = result_route(needs, self.rank).on(device)
        routes_queries = any(len(part) for of_rank in needs.queries for part in of_rank)
        start, stop = needs.shards.key_run(self.rank)
        own_keys = [(0, start, stop)]

        chain = Chain(self.group, query, key, value)
        padding_under_way = self._send_padding(keys, padding)
        keys_under_way = chain.send(keys, key, value)
        queries_under_way = chain.send(queries, query) if routes_queries else None
        own = self._attend(own_queries, own_keys, query, key, value, padding)
        if queries_under_way:
            (foreign,) = chain.receive(queries_under_way)
            runs = runs_of(torch.cat(queries.tokens))
            found = self._attend(runs, own_keys, foreign, key, value, padding)
            results_under_way = chain.send(results, *_as_rows(*found))
        far_key, far_value = chain.receive(keys_under_way)
        far_padding = _receive_padding(padding_under_way)
        if buffer.length > 0:
            received = (far_key, far_value, far_padding)
            own = self._merge_far(own, far_queries, buffer.runs, query, *received)
        if queries_under_way:
            own = _merge_rows(own, chain.receive(results_under_way), results, queries)
        return chain.end(*own)

    def _merge_far(self, own, queries, keys, query, key, value, padding):
        """Attends received keys from the queries that see some, and joins that with the rest."""
        start, stop = self.needs.shards.query_run(self.rank)
        blind = runs_of(self.needs.blind[self.rank])
        if queries == ((start, stop),):
            return merge(*own, *self._attend(queries, keys, query, key, value, padding, blind))
        rows = torch.cat([torch.arange(a - start, b - start) for a, b in queries]).to(query.device)
        some = query.index_select(2, rows)
        far = self._attend(queries, keys, some, key, value, padding, blind)
        return _merge_into(own, rows, *far)

    def _attend(self, queries, keys, query, key, value, padding, blind=()):
        queries = [run for run in queries if run[1] > run[0]]
        keys = [run for run in keys if run[2] > run[1]]
        sizes = self.needs.shards.sizes
        return ops.attention(
            query,
            key,
            value,
            part_words(self.pattern, sizes, queries, keys, blind),
            self.pattern.tensors(*sizes),
            key_padding_mask=padding,
            **self.options,
        )

    def _send_padding(self, keys: Route, padding: Tensor | None) -> Exchange | None:
        if padding is None:
            return None
        exchange = Exchange(replace(keys, what="key padding"), self.group, _PADDING)
        exchange.send([padding.to(torch.uint8)[:, None, :, None]])
        return exchange


#: The number of the exchange of padding, for its messages; those of a chain are smaller.
_PADDING = 3


def _receive_padding(exchange: Exchange | None) -> Tensor | None:
    return None if exchange is None else exchange.receive()[0][:, 0, :, 0].to(torch.bool)


def _as_rows(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return output, lse[..., None]


def _merge_rows(
    own: tuple[Tensor, Tensor], found: Sequence[Tensor], results: Route, queries: Route
) -> tuple[Tensor, Tensor]:
    """Joins what other ranks found for some queries with the rank's own, in the ranks' order."""
    for rows, places in zip(queries.sent, results.received, strict=True):
        if len(rows) == 0:
            continue
        output, lse = (tensor.index_select(2, places) for tensor in found)
        own = _merge_into(own, rows, output, lse[..., 0])
    return own


def _merge_into(
    own: tuple[Tensor, Tensor], rows: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Joins what was found for some rows with all of them."""
    joined = merge(*(tensor.index_select(2, rows) for tensor in own), output, lse)
    return tuple(t.index_copy(2, rows, j) for t, j in zip(own, joined, strict=True))


def _gather_mask(mask: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """(batch, n_k of the whole): every rank's part, a byte for each token."""
    room = mask.new_zeros(mask.shape[0], max(lengths), dtype=torch.uint8)
    room[:, : mask.shape[1]] = mask
    parts = [torch.empty_like(room) for _ in lengths]
    with named_error("the global masks of all ranks"):
        dist.all_gather(parts, room, group=group)
    held = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(held, 1).to(torch.bool)


def _has_rows(table: Tensor | None, kind: int) -> bool:
    """Whether it has a row for each query, which stays where the query is."""
    return table is not None and (kind == DENSE or (kind == SLOTS and table.shape[2] > 1))


def _routed_share(query: Tensor, key: Tensor) -> float:
    """Up to which share of the keys global queries are sent to the keys: there and back they are
    as much as the keys.
    """
    return key.shape[1] / (2 * query.shape[1]) if query.shape[1] else 0.0


def _group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "sparse_attn: expected an initialized process group, got none: call "
            "torch.distributed.init_process_group first"
        )
    from torch.distributed.device_mesh import DeviceMesh  # not there without torch.distributed

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "sparse_attn: expected group to be a DeviceMesh of one dimension, such as "
                f"mesh['cp'], got one of {group.ndim}"
            )
        group = group.get_group()
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "sparse_attn: expected group to be a ProcessGroup or a DeviceMesh that this process is "
            f"in, got {type(group).__name__}"
        )
    return group


def _lengths(
    lengths: Sequence[int] | Sequence[tuple[int, int]], ranks: int
) -> tuple[tuple[int, int], ...]:
    pairs = tuple((n, n) if isinstance(n, int) else tuple(map(int, n)) for n in lengths)
    if len(pairs) != ranks or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(
            "sparse_attn: expected lengths to be an int or (queries, keys) for each of the "
            f"{ranks} ranks, got {lengths!r}"
        )
    return pairs


def _check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if argument is None and name not in ("query", "key", "value"):
            continue
        if hasattr(argument, "to_local"):
            raise TypeError(
                f"sparse_attn: expected {name} to be the rank's own shard, got a DTensor: pass "
                f"{name}.to_local(), sharded along the sequence"
            )
        if not isinstance(argument, Tensor):
            raise TypeError(
                f"sparse_attn: expected {name} to be a Tensor, got {type(argument).__name__}"
            )
    for name in ("query", "key", "value"):
        if arguments[name].dim() != 4:
            raise ValueError(
                f"sparse_attn: expected {name} of shape (batch, heads, length, size), 4 "
                f"dimensions, got shape {list(arguments[name].shape)}"
            )


def _description(pattern, tensors, masks, tables, options, sink, dropout_seed) -> dict[str, str]:
    """All that the ranks must have in common. Lengths along the sequence are theirs."""
    grad = torch.is_grad_enabled()
    described = {name: repr(value) for name, value in options.items()}
    described["pattern"] = in_words(pattern)
    for name, tensor in tensors.items():
        batch, heads, _, size = tensor.shape
        described[f"{name} (batch, heads, size, dtype)"] = f"{(batch, heads, size, tensor.dtype)}"
        described[f"gradient of {name}"] = str(grad and tensor.requires_grad)
    given = {**masks, "sink": sink, "dropout_seed": dropout_seed}
    for name, tensor in given.items():
        described[name] = "None" if tensor is None else "a tensor"
    for name, (table, kind) in tables.items():
        described[name] = "None" if table is None else f"a table of kind {kind}"
    return described
