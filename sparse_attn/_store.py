"""What a `KVCache` keeps of keys and values, and how new queries attend to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn._distance_tables import DistanceTable
from sparse_attn.functional import attention
from sparse_attn.patterns import Mask, Pattern, PerHead
from sparse_attn.patterns.decoding import Kept, allowed_pairs, horizon, needed, relocate


@dataclass(frozen=True)
class Call:
    """The arguments of one call, for some of the heads and tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    tables: dict[str, DistanceTable]
    sink: Tensor | None
    scale: float | None
    softcap: float | None

    @property
    def tracked(self) -> bool:
        """Whether something may be differentiated, so that buffers must not change under it."""
        tensors = [self.query, self.key, self.value, *(t.table for t in self.tables.values())]
        tensors += [] if self.sink is None else [self.sink]
        by_backward = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return by_backward or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)

    def of_heads(self, heads: slice, group: int) -> Call:
        """For `heads` of key and value, each with `group` heads of the query."""
        if heads.start == 0 and heads.stop == self.key.shape[1]:
            return self
        own = slice(heads.start * group, heads.stop * group)
        return replace(
            self,
            query=self.query[:, own],
            key=self.key[:, heads],
            value=self.value[:, heads],
            tables={name: table.of_heads(own) for name, table in self.tables.items()},
            sink=None if self.sink is None else self.sink[own],
        )

    def tokens(self, start: int, stop: int) -> Call:
        """For some of the new tokens."""
        return replace(
            self,
            query=self.query[:, :, start:stop],
            key=self.key[:, :, start:stop],
            value=self.value[:, :, start:stop],
            padding=None if self.padding is None else self.padding[:, start:stop],
        )


class Store:
    """What a run of heads keeps: buffers (batch, heads, room, …) of key, value and padding."""

    def __init__(self, pattern, heads, sizes, batch_size, dtype, device) -> None:
        self.pattern = pattern
        self.heads = heads
        self.horizon = horizon(pattern)
        self.kept = Kept.of(torch.arange(0), 0)
        shape = (batch_size, heads.stop - heads.start, 0)
        self.buffers = [torch.empty(*shape, size, dtype=dtype, device=device) for size in sizes]
        self.relocated: tuple[Pattern | None] | None = None
        self.joined: list[Tensor] = []
        self.written = False

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def room(self) -> int:
        return self.buffers[0].shape[2]

    def pairwise(self, new: int, tables: bool) -> bool:
        """Whether `new` tokens need a mask or a table of pairs."""
        return self._relocated(new) is None or (tables and not self.kept.contiguous)

    def reorder(self, chosen: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = [buffer.index_select(0, chosen) for buffer in self.buffers]

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """The rows of the new tokens, which `commit` then keeps."""
        new = call.query.shape[2]
        self._join(call)
        key, value, *padding = self.joined
        pattern, relocated = self.pattern, self._relocated(new)
        kept = self.kept.append(new)
        if relocated is None:
            allowed = allowed_pairs(pattern, kept, new).to(key.device)
            heads = call.query.shape[1] // len(allowed) if len(allowed) > 1 else 1
            relocated = Mask(allowed.repeat_interleave(heads, 0))
        if kept.contiguous and not isinstance(relocated, Mask):
            tables = {name: table.given() for name, table in call.tables.items()}
        elif call.tables:
            positions = kept.positions().to(key.device)
            distance = positions - positions[-new:, None]
            tables = {name: t.dense(distance, pattern) for name, t in call.tables.items()}
        else:
            tables = {}
        return attention(
            call.query,
            key,
            value,
            relocated,
            key_padding_mask=padding[0][:, 0, :, 0] if padding else None,
            scale=call.scale,
            softcap=call.softcap,
            sink=call.sink,
            enable_gqa=call.query.shape[1] != key.shape[1],
            return_lse=True,
            **tables,
        )

    def commit(self) -> None:
        """Keep what `attend` joined: later queries may see it."""
        new = self.joined[0].shape[2] - len(self.kept)
        self.kept = self.kept.append(new)
        if not self.written:
            self._keep_needed(self.joined)
        self.joined = []

    def _join(self, call: Call) -> None:
        """Kept and new keys in one tensor each: in the buffers, where they fit."""
        tokens = [call.key, call.value, *self._padding(call)]
        count, new = len(self.kept), call.key.shape[2]
        if count + new > self.room:
            self._keep_needed([buffer[:, :, :count] for buffer in self.buffers])
            count = len(self.kept)
        self.written = count + new <= self.room
        if self.written:
            for buffer, x in zip(self.buffers, tokens, strict=True):
                buffer[:, :, count : count + new] = x.detach()
        if self.written and not call.tracked:
            self.joined = [buffer[:, :, : count + new] for buffer in self.buffers]
        else:
            kept = [buffer[:, :, :count] for buffer in self.buffers]
            self.joined = [torch.cat(both, 2) for both in zip(kept, tokens, strict=True)]

    def _padding(self, call: Call) -> list[Tensor]:
        """The padding of the new tokens, (batch, 1, new, 1), once there has been any."""
        if len(self.buffers) == 2:
            if call.padding is None:
                return []
            self.buffers.append(_no_padding(self.buffers[0]))
        given = call.padding
        return [_no_padding(call.key) if given is None else given[:, None, :, None]]

    def _keep_needed(self, rows: list[Tensor]) -> None:
        """Make new buffers of those of `rows`, the kept ones, that later queries may see."""
        positions = self.kept.positions()
        patterns = self.pattern.patterns if isinstance(self.pattern, PerHead) else [self.pattern]
        seen = torch.stack([needed(p, self.kept.stop, positions) for p in set(patterns)]).any(0)
        self.kept = Kept.of(positions[seen], self.kept.stop)
        self.relocated = None
        count = len(self.kept)
        # Copying all rows when the room is used up comes to 8 rows for each new token.
        room = count + max(4, count // 8)
        chosen = seen.nonzero().squeeze(1).to(rows[0].device)
        with torch.inference_mode(False), torch.no_grad():
            buffers = [x.new_empty((*x.shape[:2], room, x.shape[3])) for x in rows]
            for buffer, x in zip(buffers, rows, strict=True):
                buffer[:, :, :count] = x.detach().index_select(2, chosen)
        self.buffers = buffers

    def _relocated(self, new: int) -> Pattern | None:
        """`relocate`, made anew only where its answer may have changed."""
        if self.relocated is not None:
            return self.relocated[0]
        relocated = relocate(self.pattern, self.kept, new)
        if self.kept.stop >= self.horizon:
            self.relocated = (relocated,)
        return relocated


def _no_padding(like: Tensor) -> Tensor:
    """The padding, all False, of `like` (batch, heads, tokens, …)."""
    with torch.inference_mode(False):
        shape = (like.shape[0], 1, like.shape[2], 1)
        return torch.zeros(shape, dtype=torch.bool, device=like.device)
