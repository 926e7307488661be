"""What a mask function of transformers allows, read by calling it with symbols.

A mask function takes the positions of queries and keys and gives the mask of the pairs it allows.
For tensors of positions that is a tensor; for the symbols here it is the `Band` of distances it
allows, or `UNKNOWN` if it does more than compare positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Symbol:
    """Something of which nothing is known: operations with it give `UNKNOWN`."""

    device = torch.device("cpu")
    __hash__ = None

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Symbol:
        return _look_up(*args) if function is Tensor.__getitem__ else UNKNOWN

    def to(self, *_: Any, **__: Any) -> Symbol:
        return self

    def _unknown(self, *_: Any, **__: Any) -> Symbol:
        return UNKNOWN

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _unknown
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _unknown
    __le__ = __lt__ = __ge__ = __gt__ = __eq__ = __ne__ = _unknown
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _unknown

    def __bool__(self) -> bool:
        raise TypeError("sparse_attn: expected a mask function that does not branch on positions")


UNKNOWN = Symbol()


class Band(Symbol):
    """The pairs with lowest ≤ key − query ≤ highest.

    With `sequences`, (batch, n), only those for which it holds the same number. With `positions`,
    (batch, n), the distances are those of the numbers it holds.
    """

    def __init__(
        self,
        lowest: float = -math.inf,
        highest: float = math.inf,
        sequences: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.lowest, self.highest = lowest, highest
        self.sequences, self.positions = sequences, positions

    def __and__(self, other: object) -> Symbol:
        other = _constant(other)
        if not isinstance(other, Band) or _differ(self, other):
            return UNKNOWN
        return Band(
            max(self.lowest, other.lowest),
            min(self.highest, other.highest),
            other.sequences if self.sequences is None else self.sequences,
            other.positions if self.positions is None else self.positions,
        )

    def __or__(self, other: object) -> Symbol:
        other = _constant(other)
        if not isinstance(other, Band) or self.packed or other.packed:
            return UNKNOWN
        if self.empty or other.empty:
            return other if self.empty else self
        if max(self.lowest, other.lowest) > min(self.highest, other.highest) + 1:
            return UNKNOWN
        return Band(min(self.lowest, other.lowest), max(self.highest, other.highest))

    __rand__ = __and__
    __ror__ = __or__

    @property
    def empty(self) -> bool:
        return self.lowest > self.highest

    @property
    def packed(self) -> bool:
        return self.sequences is not None or self.positions is not None


def _constant(value: object) -> object:
    """What a mask function gives for every pair alike, as a band."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.dim() > 0:
        return value
    return Band() if value else Band(math.inf, -math.inf)


def _differ(one: Band, other: Band) -> bool:
    pairs = ((one.sequences, other.sequences), (one.positions, other.positions))
    return any(a is not None and b is not None and a is not b for a, b in pairs)


class Position(Symbol):
    """key · (position of the key) + query · (position of the query) + offset; of `table`, (batch,
    n), what it holds for them.
    """

    def __init__(self, key: int, query: int, offset: int = 0, table: Tensor | None = None) -> None:
        self.key, self.query, self.offset, self.table = key, query, offset, table

    def new_ones(self, *_: Any, **__: Any) -> Band:
        return Band()

    def new_zeros(self, *_: Any, **__: Any) -> Band:
        return Band(math.inf, -math.inf)

    def __neg__(self) -> Position:
        return Position(-self.key, -self.query, -self.offset, self.table)

    def __add__(self, other: object) -> Symbol:
        if isinstance(other, int):
            return Position(self.key, self.query, self.offset + other, self.table)
        if not isinstance(other, Position) or other.table is not self.table:
            return UNKNOWN
        terms = (self.key + other.key, self.query + other.query, self.offset + other.offset)
        return Position(*terms, self.table)

    def __sub__(self, other: object) -> Symbol:
        return self + -other if isinstance(other, (int, Position)) else UNKNOWN

    def __rsub__(self, other: object) -> Symbol:
        return -self + other

    def __abs__(self) -> Distance:
        return Distance(self)

    def __le__(self, other: object) -> Symbol:
        return _not_positive(self - other)

    def __lt__(self, other: object) -> Symbol:
        return _not_positive(self - other + 1)

    def __ge__(self, other: object) -> Symbol:
        return _not_positive(-(self - other))

    def __gt__(self, other: object) -> Symbol:
        return _not_positive(-(self - other) + 1)

    def __eq__(self, other: object) -> Symbol:
        difference = self - other
        if difference is UNKNOWN or self.table is None:
            return (self <= other) & (self >= other)
        # Equal numbers of a table say which sequence, not how far.
        terms = (difference.key, difference.query, difference.offset)
        return Band(sequences=self.table) if terms in ((1, -1, 0), (-1, 1, 0)) else UNKNOWN

    __radd__ = __add__
    __hash__ = None


class Distance(Symbol):
    """The absolute value of a difference of positions."""

    def __init__(self, position: Position) -> None:
        self.position = position

    def __le__(self, other: object) -> Symbol:
        return (self.position <= other) & (-self.position <= other)

    def __lt__(self, other: object) -> Symbol:
        return (self.position < other) & (-self.position < other)


def _not_positive(position: Symbol) -> Symbol:
    """Where a position is at most 0."""
    if not isinstance(position, Position):
        return UNKNOWN
    key, query, offset, table = position.key, position.query, position.offset, position.table
    if (key, query) == (1, -1):
        return Band(highest=-offset, positions=table)
    if (key, query) == (-1, 1):
        return Band(lowest=offset, positions=table)
    # Positions are never negative.
    return Band() if max(key, query, offset) <= 0 and table is None else UNKNOWN


#: Stands for the number of the example; not of no dimensions, which torch.compile would read.
_BATCH = torch.zeros(1, dtype=torch.int64)


def _look_up(table: object, index: object) -> Symbol:
    """table[batch, position]."""
    batch, position = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
    if not isinstance(table, Tensor) or not isinstance(position, Position) or batch is not _BATCH:
        return UNKNOWN
    terms = (position.key, position.query, position.offset)
    if position.table is not None or terms not in ((1, 0, 0), (0, 1, 0)):
        return UNKNOWN
    return Position(*terms, table)


def band_of(mask_function: Callable) -> Band | None:
    """The band that a mask function allows, None if it is not known to be one."""
    # Under torch.compile a tensor of its own: one from outside would be an input of the graph.
    batch = torch.zeros(1, dtype=torch.int64) if torch.compiler.is_compiling() else _BATCH
    try:
        allowed = mask_function(batch, UNKNOWN, Position(0, 1), Position(1, 0))
    except Exception:  # It is the caller's, and may do anything with what it is given.
        return None
    return allowed if isinstance(allowed, Band) else None
