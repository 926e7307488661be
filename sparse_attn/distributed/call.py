"""One rank's share of a call: what it sends, what it attends, what it joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.distributed.exchange import Chain, Exchange
from sparse_attn.distributed.routes import Route, key_route, query_route, result_route
from sparse_attn.distributed.shards import Needs, part_words, runs_of
from sparse_attn.merging import merge
from sparse_attn.patterns import Pattern


@dataclass(frozen=True)
class Call:
    """One rank's share of a call: its own keys, those that it receives, the queries of others."""

    pattern: Pattern
    needs: Needs
    rank: int
    group: dist.ProcessGroup
    options: dict[str, Any]
    row_tables: bool  # there is a bias or a gate with a row for each query

    def check(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, sink: Tensor | None
    ) -> None:
        """Raises what the op has against its arguments, before anything is sent."""

        def on_meta(x: Any) -> Any:
            return x.detach().to("meta") if isinstance(x, Tensor) else x

        start, stop = self.needs.shards.key_run(self.rank)
        sizes = self.needs.shards.sizes
        ops.attention(
            *map(on_meta, (query, key, value)),
            self._words([self.needs.shards.query_run(self.rank)], [(0, start, stop)]),
            [on_meta(tensor) for tensor in self.pattern.tensors(*sizes)],
            key_padding_mask=on_meta(padding),
            sink=on_meta(sink),
            **{name: on_meta(option) for name, option in self.options.items()},
        )

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rank's queries."""
        chain = Chain(self.group, query, key, value)
        try:
            return self._run(chain, query, key, value, padding)
        except (TypeError, ValueError, NotImplementedError):
            chain.settle()
            raise

    def _run(self, chain: Chain, query, key, value, padding):
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

        padding_under_way = self._send_padding(chain, keys, padding)
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

    def _words(self, queries, keys, blind=()):
        queries = [run for run in queries if run[1] > run[0]]
        keys = [run for run in keys if run[2] > run[1]]
        return part_words(self.pattern, self.needs.shards.sizes, queries, keys, blind)

    def _attend(self, queries, keys, query, key, value, padding, blind=()):
        return ops.attention(
            query,
            key,
            value,
            self._words(queries, keys, blind),
            self.pattern.tensors(*self.needs.shards.sizes),
            key_padding_mask=padding,
            **self.options,
        )

    def _send_padding(self, chain: Chain, keys: Route, padding: Tensor | None) -> Exchange | None:
        if padding is None:
            return None
        route = replace(keys, what="key padding")
        exchange = chain.watch(Exchange(route, self.group, _PADDING))
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
