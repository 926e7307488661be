"""Keys and values of a sequence that is decoded step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from sparse_attn._beams import chosen_sequences
from sparse_attn._distance_tables import DistanceTable
from sparse_attn._store import Call, Store
from sparse_attn.patterns import Pattern, PerHead, check_pattern
from sparse_attn.patterns.arguments import index as integer
from sparse_attn.patterns.decoding import check_decodable
from sparse_attn.tables import SlotBias

#: New tokens that are masked pair by pair at a time, so that memory stays linear.
_PIECE = 256


class KVCache:
    """Keys and values for causal decoding: each call appends tokens and gives their rows.

    What no later query can see is dropped: a window keeps its reach and the tokens that stay
    visible, whatever the length, so memory and time of a token are those of the window. Patterns
    that look back without end (`Causal()`, `Strided`) keep what they need of it. Heads of a
    `PerHead` keep each their own.

    Args:
        pattern: A causal one. What a query sees must not depend on the final length: no negative
            tokens, no `FirstLast` with last > 0, no `RandomBlocks` or `BigBird`, no `Mask`,
            `BlockLayout` or `KeyLists`. A token that it names and that is yet to come counts from
            then on; `Global` tokens keep all keys until they have come.
        batch_size: Number of sequences.
        num_heads_kv: Heads of key and value.
        head_dim: Size of query and key.
        value_dim: Size of value; head_dim if None.
        dtype: Of key and value; torch's default if None.
        device: Of key and value.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The pattern cannot be decoded, or a size is out of range.

    >>> from sparse_attn import Causal, Global, Window, attention
    >>> pattern = (Window(128, 0) | Global([0])) & Causal()
    >>> cache = KVCache(pattern, batch_size=2, num_heads_kv=4, head_dim=32)
    >>> query, key, value = (torch.randn(2, 4, 300, 32) for _ in range(3))
    >>> steps = zip(query.split(1, 2), key.split(1, 2), value.split(1, 2))
    >>> rows = torch.cat([cache.attend(*step) for step in steps], 2)
    >>> torch.allclose(rows, attention(query, key, value, pattern), atol=1e-5)
    True
    >>> cache.length, cache.nbytes < 2 * 129 * 2 * 4 * 2 * 32 * 4
    (300, True)
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        batch_size: int,
        num_heads_kv: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_pattern(pattern)
        check_decodable(pattern)
        self.pattern = pattern
        self.num_heads_kv = integer("num_heads_kv", num_heads_kv, 1)
        self.head_dim = integer("head_dim", head_dim, 1)
        self.value_dim = self.head_dim if value_dim is None else integer("value_dim", value_dim, 0)
        self._first_batch_size = integer("batch_size", batch_size, 1)
        like = torch.empty(0, dtype=dtype, device=device)
        if not like.is_floating_point():
            raise TypeError(f"sparse_attn: expected a floating-point dtype, got {dtype}")
        self.dtype, self.device = like.dtype, like.device
        self.reset()

    @property
    def length(self) -> int:
        """How many tokens have been appended."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers: what is kept, and room for the next tokens."""
        return sum(store.nbytes for store in self._stores)

    def __repr__(self) -> str:
        return f"KVCache({self.pattern!r}, length={self.length}, nbytes={self.nbytes})"

    def reset(self) -> None:
        """Forget all tokens, and have as many sequences as at first."""
        self.batch_size = self._first_batch_size
        self._length = 0
        sizes = self.head_dim, self.value_dim
        self._stores = [
            Store(pattern, heads, sizes, self.batch_size, self.dtype, self.device)
            for pattern, heads in _split_heads(self.pattern, self.num_heads_kv)
        ]

    def reorder(self, index: Tensor | Iterable[int]) -> None:
        """Go on with chosen sequences: sequence b becomes what sequence index[b] was.

        Args:
            index: (new batch size,) int64 or int32, in [0, batch_size): sequences may be repeated
                or left out, as beam search does.

        Raises:
            TypeError: index holds no ints.
            ValueError: It is empty or out of range, or has more dimensions.
        """
        chosen = chosen_sequences(index, self.batch_size, self.device)
        for store in self._stores:
            store.reorder(chosen)
        self.batch_size = len(chosen)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        bias: Tensor | SlotBias | None = None,
        gate: Tensor | SlotBias | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append new tokens, and attend from them to all tokens so far.

        The rows are the last ones of `attention` over the whole sequence. They are differentiable
        with respect to the arguments of this call; what is kept is detached. A call that raises
        appends nothing.

        Args:
            query: (batch, heads, new, head_dim), new ≥ 1; heads a multiple of num_heads_kv.
            key: (batch, num_heads_kv, new, head_dim).
            value: (batch, num_heads_kv, new, value_dim).
            key_padding_mask: (batch, new) bool, True = no query ever sees this new key.
            global_mask: Must be None.
            bias: By distance: slopes (heads,), a table (heads, slots), or a `SlotBias` with one
                row.
            gate: As bias, without slopes.
            dropout_p: Must be 0.
            scale: As in `attention`, as are softcap and sink.
            softcap: See scale.
            sink: (heads,), see scale.
            enable_gqa: Implied by the number of heads.
            return_lse: Also return the log-sum-exp (batch, heads, new).
            return_weights: Must be False.

        Returns:
            (batch, heads, new, value_dim); with `return_lse` the pair (output, log-sum-exp).

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape, device or value does not fit, or a bias or gate is not by distance.
            NotImplementedError: global_mask or return_weights is given.
        """
        if global_mask is not None or return_weights:
            name = "return_weights=True" if global_mask is None else "global_mask"
            raise NotImplementedError(f"sparse_attn: expected no {name} in a KVCache")
        if dropout_p != 0:
            raise ValueError(
                f"sparse_attn: expected dropout_p=0 in a KVCache, which decodes, got {dropout_p}"
            )
        self._check(query, key, value, key_padding_mask)
        tables = {
            name: DistanceTable.of(name, given, self.pattern, query)
            for name, given in (("bias", bias), ("gate", gate))
            if given is not None
        }
        if sink is not None and (not isinstance(sink, Tensor) or sink.shape != query.shape[1:2]):
            got = tuple(sink.shape) if isinstance(sink, Tensor) else type(sink).__name__
            raise ValueError(
                f"sparse_attn: expected sink of shape ({query.shape[1]},), one for each head, got "
                f"{got}"
            )
        call = Call(query, key, value, key_padding_mask, tables, sink, scale, softcap)
        output, lse = self._attend_pieces(call)
        return (output, lse) if return_lse else output

    def _attend_pieces(self, call: Call) -> tuple[Tensor, Tensor]:
        """All new tokens at once, or piece by piece where pairs are masked one by one."""
        new = call.query.shape[2]
        pairwise = any(store.pairwise(new, bool(call.tables)) for store in self._stores)
        if new <= _PIECE or not pairwise or call.tracked:  # of pieces, later ones are detached
            return self._attend(call)
        pieces = [self._attend(call.tokens(i, i + _PIECE)) for i in range(0, new, _PIECE)]
        output, lse = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
        return output, lse

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        group = call.query.shape[1] // self.num_heads_kv
        parts = [store.attend(call.of_heads(store.heads, group)) for store in self._stores]
        for store in self._stores:
            store.commit()
        self._length += call.query.shape[2]
        if len(parts) == 1:
            return parts[0]
        output, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return output, lse

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"sparse_attn: expected {name} to be a Tensor, got {type(x).__name__}"
                )
            if x.dtype != self.dtype:
                raise TypeError(
                    f"sparse_attn: expected {name} of dtype {self.dtype}, the cache's, got "
                    f"{x.dtype}"
                )
            if x.device != self.device:
                raise ValueError(
                    f"sparse_attn: expected {name} on {self.device}, the cache's, got {x.device}"
                )
        heads = query.shape[1] if query.dim() == 4 else 0
        new = query.shape[2] if query.dim() == 4 else 0
        many = math.lcm(self.num_heads_kv, self.pattern.heads)
        if heads == 0 or heads % many or new == 0:
            raise ValueError(
                f"sparse_attn: expected query of shape (batch, a multiple of {many} heads, new "
                f"tokens, {self.head_dim}), got {tuple(query.shape)}"
            )
        for name, x, own_heads, size in (
            ("query", query, heads, self.head_dim),
            ("key", key, self.num_heads_kv, self.head_dim),
            ("value", value, self.num_heads_kv, self.value_dim),
        ):
            shape = (self.batch_size, own_heads, new, size)
            if x.shape != shape:
                raise ValueError(
                    f"sparse_attn: expected {name} of shape {shape}, got {tuple(x.shape)}"
                )
        _check_padding(key_padding_mask, (self.batch_size, new), self.device)


def _check_padding(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"sparse_attn: expected key_padding_mask of dtype bool, got {got}")
    if mask.shape != shape or mask.device != device:
        raise ValueError(
            f"sparse_attn: expected key_padding_mask of shape {shape} (batch, new tokens) on "
            f"{device}, got {tuple(mask.shape)} on {mask.device}"
        )


def _split_heads(pattern: Pattern, heads_kv: int) -> list[tuple[Pattern, slice]]:
    """Runs of heads of key and value whose queries have the same pattern, or the same list."""
    patterns = pattern.patterns if isinstance(pattern, PerHead) else (pattern,)
    parts = math.lcm(len(patterns), heads_kv)
    group = parts // heads_kv

    def of_head(head: int) -> tuple[Pattern, ...]:
        own = [p * len(patterns) // parts for p in range(head * group, (head + 1) * group)]
        return tuple(patterns[i] for i in own)

    runs = []
    for own, run in groupby(range(heads_kv), of_head):
        heads = list(run)
        one = own[0] if len(set(own)) == 1 else PerHead(own * len(heads))
        runs.append((one, slice(heads[0], heads[-1] + 1)))
    return runs
