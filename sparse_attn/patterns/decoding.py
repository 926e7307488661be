"""What decoding asks of a causal pattern: which earlier keys it may still need, and how it reads
once the others are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce, singledispatch
from operator import and_, or_

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.patterns.arguments import word
from sparse_attn.patterns.base import Intersection, Pattern, PerHead, Union
from sparse_attn.patterns.blocks import Checkerboard, LocalBlocks
from sparse_attn.patterns.tokens import FirstLast, Global, GlobalKeys, GlobalQueries, RandomTokens
from sparse_attn.patterns.windows import (
    Causal,
    Fixed,
    Full,
    Radial,
    Strided,
    Window,
    _Summaries,
)


@dataclass(frozen=True)
class Kept:
    """The positions of the keys that are kept, in ascending order.

    Attributes:
        early: (n,) int64 on the CPU: single ones, with gaps.
        start: From here on none is missing; `early` lies before.
        stop: The length so far: the position of the next query.
    """

    early: Tensor
    start: int
    stop: int

    @staticmethod
    def of(positions: Tensor, stop: int) -> Kept:
        """`positions`, ascending, in a sequence of `stop` tokens so far."""
        n = len(positions)
        run = int((positions - torch.arange(n) == stop - n).sum())
        return Kept(positions[: n - run], stop - run, stop)

    def __len__(self) -> int:
        return len(self.early) + self.stop - self.start

    def append(self, new: int) -> Kept:
        """With as many new tokens at the end."""
        return Kept(self.early, self.start, self.stop + new)

    def positions(self) -> Tensor:
        """All of them, int64 on the CPU."""
        return torch.cat([self.early, torch.arange(self.start, self.stop)])

    @property
    def contiguous(self) -> bool:
        """Whether distances among kept keys are those of the sequence."""
        return len(self.early) == 0

    def places(self, tokens: Iterable[int]) -> list[int]:
        """The places of those of `tokens` that are kept."""
        early = {position: place for place, position in enumerate(self.early.tolist())}
        shift = len(early) - self.start
        run = [t + shift for t in tokens if self.start <= t < self.stop]
        return [early[t] for t in tokens if t in early] + run


def check_decodable(pattern: Pattern) -> None:
    """Raise ValueError unless what a query sees is settled once it is there."""
    if not _causal(pattern):
        raise ValueError(
            "sparse_attn: expected a causal pattern for decoding, such as (Window(256, 0) | "
            f"Global([0])) & Causal(), got {pattern!r}"
        )
    for one in pattern.patterns if isinstance(pattern, PerHead) else [pattern]:
        needed(one, 0, torch.arange(0))


def _causal(pattern: Pattern) -> bool:
    """`pattern.causal`, and that the first key alone is no later one to any query."""
    if isinstance(pattern, Union):
        return all(map(_causal, pattern.parts))
    if isinstance(pattern, Intersection):
        return any(map(_causal, pattern.parts))
    if isinstance(pattern, PerHead):
        return all(map(_causal, pattern.patterns))
    if isinstance(pattern, GlobalKeys):
        return pattern.tokens in ((), (0,))
    if isinstance(pattern, FirstLast):
        return pattern.first <= 1 and pattern.last == 0
    return pattern.causal


@singledispatch
def needed(pattern: Pattern, position: int, keys: Tensor) -> Tensor:
    """Which earlier `keys` a query at `position` or later may see: (len(keys),) bool.

    Exact for single patterns; of an intersection, those that every part needs for some query.

    Raises:
        ValueError: What a query sees depends on tokens that are yet to come.
    """
    raise ValueError(
        f"sparse_attn: expected a pattern for decoding whose pairs do not depend on the final "
        f"length, got {pattern!r}"
    )


@needed.register
def _(pattern: Union, position: int, keys: Tensor) -> Tensor:
    return reduce(or_, (needed(part, position, keys) for part in pattern.parts))


@needed.register
def _(pattern: Intersection, position: int, keys: Tensor) -> Tensor:
    return reduce(and_, (needed(part, position, keys) for part in pattern.parts))


@needed.register
def _(pattern: Window, position: int, keys: Tensor) -> Tensor:
    return keys >= max(0, position - pattern.left * pattern.dilation)


@needed.register(Full)
@needed.register(Causal)
@needed.register(Strided)
@needed.register(Checkerboard)
@needed.register(RandomTokens)
def _(pattern: Pattern, position: int, keys: Tensor) -> Tensor:
    return keys >= 0


@needed.register
def _(pattern: Radial, position: int, keys: Tensor) -> Tensor:
    return keys >= (0 if pattern.radius else position)


@needed.register
def _(pattern: LocalBlocks, position: int, keys: Tensor) -> Tensor:
    return keys >= position // pattern.block * pattern.block


@needed.register
def _(pattern: _Summaries, position: int, keys: Tensor) -> Tensor:
    stride, summary = word(pattern.stride), word(pattern.summary)
    return keys % stride >= stride - summary


@needed.register
def _(pattern: Fixed, position: int, keys: Tensor) -> Tensor:
    return reduce(or_, (needed(factor, position, keys) for factor in pattern.factors))


@needed.register
def _(pattern: GlobalKeys, position: int, keys: Tensor) -> Tensor:
    return torch.isin(keys, torch.tensor(_tokens(pattern), dtype=torch.int64))


@needed.register
def _(pattern: GlobalQueries, position: int, keys: Tensor) -> Tensor:
    yet_to_come = any(token >= position for token in _tokens(pattern))
    return torch.full_like(keys, yet_to_come, dtype=torch.bool)


@needed.register
def _(pattern: Global, position: int, keys: Tensor) -> Tensor:
    halves = GlobalKeys(pattern.tokens), GlobalQueries(pattern.tokens)
    return reduce(or_, (needed(half, position, keys) for half in halves))


@needed.register
def _(pattern: FirstLast, position: int, keys: Tensor) -> Tensor:
    if pattern.last:
        raise ValueError(
            f"sparse_attn: expected FirstLast with last=0 for decoding, got {pattern!r}: the last "
            "keys depend on the final length"
        )
    return keys < word(pattern.first)


def _tokens(pattern: GlobalKeys | GlobalQueries | Global) -> tuple[int, ...]:
    if pattern.tokens and min(pattern.tokens) < 0:
        raise ValueError(
            "sparse_attn: expected tokens of at least 0 for decoding, where the end is yet to "
            f"come, got {pattern!r}"
        )
    return tuple(pattern.tokens)


@singledispatch
def relocate(pattern: Pattern, kept: Kept, new: int) -> Pattern | None:
    """The pattern that says of the kept keys, counted from 0, what `pattern` says of the sequence.

    It holds for `new` more tokens, and after them until other keys are dropped or a token that the
    pattern names arrives. None if no pattern says it.
    """
    return pattern if kept.contiguous and kept.start == 0 else None


@relocate.register
def _(pattern: Union, kept: Kept, new: int) -> Pattern | None:
    return _relocate_parts(pattern, kept, new)


@relocate.register
def _(pattern: Intersection, kept: Kept, new: int) -> Pattern | None:
    return _relocate_parts(pattern, kept, new)


@relocate.register
def _(pattern: PerHead, kept: Kept, new: int) -> Pattern | None:
    patterns = [relocate(one, kept, new) for one in pattern.patterns]
    return None if None in patterns else PerHead(patterns)


@relocate.register
def _(pattern: Window, kept: Kept, new: int) -> Pattern | None:
    reach = pattern.left * pattern.dilation
    in_order = reach == math.inf and pattern.dilation == 1
    return pattern if in_order or kept.contiguous or reach <= kept.stop - kept.start else None


@relocate.register(Causal)
@relocate.register(Full)
def _(pattern: Pattern, kept: Kept, new: int) -> Pattern | None:
    return pattern


@relocate.register(Strided)
@relocate.register(Radial)
def _(pattern: Pattern, kept: Kept, new: int) -> Pattern | None:
    return pattern if kept.contiguous else None


@relocate.register
def _(pattern: LocalBlocks, kept: Kept, new: int) -> Pattern | None:
    return _relocate_periodic(pattern, kept, pattern.block)


@relocate.register
def _(pattern: Checkerboard, kept: Kept, new: int) -> Pattern | None:
    return _relocate_periodic(pattern, kept, 2 * pattern.block)


@relocate.register(Fixed)
@relocate.register(_Summaries)
def _(pattern: Fixed | _Summaries, kept: Kept, new: int) -> Pattern | None:
    return _relocate_periodic(pattern, kept, pattern.stride)


@relocate.register(GlobalKeys)
@relocate.register(GlobalQueries)
@relocate.register(Global)
def _(pattern: GlobalKeys | GlobalQueries | Global, kept: Kept, new: int) -> Pattern | None:
    return type(pattern)(kept.append(new).places(pattern.tokens))


@relocate.register
def _(pattern: FirstLast, kept: Kept, new: int) -> Pattern | None:
    early = int((kept.early < word(pattern.first)).sum())
    return FirstLast(early + max(0, pattern.first - kept.start), 0)


def _relocate_parts(pattern: Union | Intersection, kept: Kept, new: int) -> Pattern | None:
    parts = [relocate(part, kept, new) for part in pattern.parts]
    return None if None in parts else type(pattern)(tuple(parts))


def _relocate_periodic(pattern: Pattern, kept: Kept, period: int) -> Pattern | None:
    return pattern if kept.contiguous and kept.start % period == 0 else None


def horizon(pattern: Pattern) -> int:
    """From this length on, all tokens that the pattern names are there."""
    if isinstance(pattern, (Union, Intersection)):
        return max(map(horizon, pattern.parts))
    if isinstance(pattern, PerHead):
        return max(map(horizon, pattern.patterns))
    tokens = getattr(pattern, "tokens", None)
    return 1 + max(tokens) if isinstance(tokens, tuple) and tokens else 0


def allowed_pairs(pattern: Pattern, kept: Kept, new: int) -> Tensor:
    """Which of the kept keys the last `new` ones see: (patterns of a PerHead or 1, new, keys)."""
    patterns = pattern.patterns if isinstance(pattern, PerHead) else [pattern]
    queries = torch.arange(kept.stop - new, kept.stop)
    keys, length = kept.positions(), max(kept.stop, horizon(pattern))
    return torch.stack([ops._pattern_allows(p.encode(), queries, keys, length) for p in patterns])
