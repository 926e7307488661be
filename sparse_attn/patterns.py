"""Patterns: which query sees which key, as small immutable values with `|` (union) and `&`
(intersection).

The dataclasses only carry parameters. What they mean is defined once, in C++ (`csrc/patterns/`);
`mask`, `cost` and `plan` ask there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn._library import ops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The words of csrc/patterns/expression.h.
_WINDOW, _GLOBAL_KEYS, _GLOBAL_QUERIES, _UNION, _INTERSECTION, _PER_HEAD = range(1, 7)
_INFINITE = 2**63 - 1
_MOST_TOKENS = 2**59  # beyond any tensor; keeps the arithmetic of tokens from overflowing


@dataclass(frozen=True)
class Cost:
    """What attention with a pattern takes, for one batch element and one head (see `Pattern.cost`).

    Attributes:
        pairs: Allowed (query, key) pairs, exactly.
        flops: Floating-point operations of the forward pass on these pairs: 4 · pairs · head_dim.
        bytes: Query, key and value read once and the output written once.
        visited: Pairs in the tiles that the plan visits.
        overhead: visited ÷ pairs, 1 at best.
    """

    pairs: int
    flops: int
    bytes: int
    visited: int
    overhead: float


@dataclass(frozen=True, repr=False)
class Pattern:
    """A set of allowed (query, key) pairs. The base of all patterns.

    Positions are end-aligned: query i stands at position i + n_k − n_q. Patterns are hashable,
    compare by value, and combine: `a | b` allows what either allows, `a & b` what both do. A key
    that several parts allow counts once.

    >>> Window(1).mask(4).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    _words: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_words", self._encode())

    def _encode(self) -> tuple[int, ...]:
        raise TypeError(
            f"sparse_attn: expected one of the patterns, got {type(self).__name__} itself"
        )

    def _expression(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._expression()

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return _combine(Union, self, other)

    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return _combine(Intersection, self, other)

    def encode(self) -> tuple[int, ...]:
        """The list of ints that stands for the pattern in `torch.ops.sparse_attn.attention`.

        >>> Window(2, 0).encode()
        (1, 2, 0, 1)
        """
        return self._words

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, as far as the expression's form tells.

        True for `Window(…, 0)`, `Causal()`, a union of causal patterns and an intersection with
        one.

        >>> (Window(8, 0) | Global([0])).causal, ((Window(8) | Global([0])) & Causal()).causal
        (False, True)
        """
        return ops._pattern_causal(self.encode())

    def mask(self, n_q: int, n_k: int | None = None, heads: int | None = None) -> Tensor:
        """The dense definition, for tests and pictures.

        Args:
            n_q: Number of queries.
            n_k: Number of keys; as many as queries if None.
            heads: Number of heads; needed for `PerHead`.

        Returns:
            A bool tensor (n_q, n_k), or (heads, n_q, n_k) if heads are given; True = allowed.

        Raises:
            ValueError: A token is out of range, or `heads` does not fit a `PerHead`.

        >>> Window(1, 0).mask(2, 3).tolist()
        [[True, True, False], [False, True, True]]
        """
        heads = None if heads is None else _index("heads", heads, 1)
        return ops._pattern_mask(self.encode(), *check_sizes(n_q, n_k), heads)

    def cost(
        self,
        n_q: int,
        n_k: int | None = None,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        tile: tuple[int, int] | None = None,
    ) -> Cost:
        """What one batch element and head take, exactly, before running; no dense mask is made.

        Args:
            n_q: Number of queries.
            n_k: Number of keys; as many as queries if None.
            head_dim: Size of queries, keys and values.
            dtype: Data type, for the bytes.
            tile: (rows, keys) of the tiles, each at most 64, instead of those that would run.

        Returns:
            A `Cost`; for a `PerHead`, the sum over its list.

        Raises:
            ValueError: A token or the tile is out of range.

        >>> cost = Window(256).cost(16384)
        >>> cost.pairs, round(cost.overhead, 2)
        (8339200, 1.12)
        """
        n_q, n_k = check_sizes(n_q, n_k)
        if tile is not None and (not isinstance(tile, Iterable) or len(tuple(tile)) != 2):
            raise ValueError(f"sparse_attn: expected tile to be (rows, keys), got {tile!r}")
        sides = None if tile is None else [_index("tile", side, 1) for side in tile]
        pairs, visited, *_ = ops._pattern_cost(self.encode(), n_q, n_k, sides)
        heads = len(self.patterns) if isinstance(self, PerHead) else 1
        return Cost(
            pairs=pairs,
            flops=4 * pairs * head_dim,
            bytes=heads * 2 * (n_q + n_k) * head_dim * dtype.itemsize,
            visited=visited,
            overhead=visited / pairs if pairs else 1.0,
        )

    def plan(self, n_q: int, n_k: int | None = None) -> str:
        """The plan that would run, in words: which tiles of keys each tile of queries visits.

        >>> print(Window(1).plan(3).rstrip())
        plan: 3 queries x 3 keys, tiles 64 x 64, 7 pairs, 9 visited, 1 masks, ... bytes
        pass in steps of 1
          rows 0..2: keys 0..2 (mask 0)
        """
        return ops._pattern_plan(self.encode(), *check_sizes(n_q, n_k))

    def plot(self, n: int, n_k: int | None = None, ax: Axes | None = None) -> Any:
        """Draw the mask with matplotlib: queries down, keys across.

        Args:
            n: Number of queries.
            n_k: Number of keys; as many as queries if None.
            ax: Axes to draw on; new ones if None. A `PerHead` always gets new ones, a panel for
                each pattern.

        Returns:
            The axes, or a list of them for a `PerHead`.

        >>> Window(8).plot(64).get_ylabel()
        'query'
        """
        from matplotlib import pyplot

        if isinstance(self, PerHead):
            _, axes = pyplot.subplots(1, len(self.patterns), squeeze=False)
            pairs = zip(self.patterns, axes[0], strict=True)
            return [pattern.plot(n, n_k, panel) for pattern, panel in pairs]
        if ax is None:
            _, ax = pyplot.subplots()
        ax.imshow(self.mask(n, n_k), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        ax.set(title=repr(self), xlabel="key", ylabel="query")
        return ax


def check_pattern(pattern: object) -> None:
    """Raise TypeError unless `pattern` is a Pattern."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "sparse_attn: expected pattern to be a Pattern, such as Window(256), got "
            f"{type(pattern).__name__}"
        )


def _index(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int of at least `least` and at most `most`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"sparse_attn: expected {name} to be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"sparse_attn: expected {name} to be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"sparse_attn: expected {name} to be at most {most}, got {number}")
    return number


def check_sizes(n_q: object, n_k: object) -> tuple[int, int]:
    """Numbers of queries and keys; as many keys as queries if None."""
    queries = _index("n_q", n_q, 0)
    return queries, queries if n_k is None else _index("n_k", n_k, 0)


def _side(name: str, value: object) -> int | float:
    """One side of a window: an int of at least 0, or math.inf."""
    if isinstance(value, float) and value == math.inf:
        return math.inf
    return _index(name, value, 0)


def _word(side: int | float) -> int:
    return _INFINITE if side == math.inf else min(int(side), _INFINITE)


def _combine(kind: type[Union] | type[Intersection], a: Pattern, b: Pattern) -> Pattern:
    """a and b joined; joins of one kind are flattened, and a PerHead is joined head by head."""
    if isinstance(a, PerHead) or isinstance(b, PerHead):
        left = a.patterns if isinstance(a, PerHead) else (a,)
        right = b.patterns if isinstance(b, PerHead) else (b,)
        heads = math.lcm(len(left), len(right))
        left, right = (
            [p for p in part for _ in range(heads // len(part))] for part in (left, right)
        )
        return PerHead([_combine(kind, x, y) for x, y in zip(left, right, strict=True)])
    parts = [part for p in (a, b) for part in (p.parts if isinstance(p, kind) else (p,))]
    return kind(tuple(parts))


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    """Query i sees key j when j = i + m · dilation with −left ≤ m ≤ right (Longformer, section
    3.1).

    Args:
        left: Keys on the left, at least 0, or `math.inf`.
        right: Keys on the right; as many as on the left if None. 0 makes the window causal.
        dilation: Distance between neighboring keys, at least 1.

    Raises:
        TypeError: An argument is no int (or `math.inf` for a side).
        ValueError: A side is negative, or dilation is less than 1.

    >>> Window(2, 0, dilation=2).mask(5).int()[4].tolist()
    [1, 0, 1, 0, 1]
    """

    left: int | float
    right: int | float | None = None
    dilation: int = 1

    def __post_init__(self) -> None:
        right = self.left if self.right is None else self.right
        object.__setattr__(self, "left", _side("left", self.left))
        object.__setattr__(self, "right", _side("right", right))
        object.__setattr__(self, "dilation", _index("dilation", self.dilation, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (_WINDOW, _word(self.left), _word(self.right), _word(self.dilation))

    def _expression(self) -> str:
        sides = [self.left] if self.left == self.right else [self.left, self.right]
        words = ["math.inf" if side == math.inf else str(side) for side in sides]
        if self.dilation != 1:
            words.append(f"dilation={self.dilation}")
        return f"Window({', '.join(words)})"

    @classmethod
    def from_longformer(cls, attention_window: int, dilation: int = 1) -> Window:
        """Hugging Face's Longformer and LED: half of `attention_window` on each side, and the query
        itself.

        >>> Window.from_longformer(512)
        Window(256)
        """
        half = _index("attention_window", attention_window, 0) // 2
        return cls(half, half, dilation)

    @classmethod
    def from_flash(cls, left: int, right: int) -> Window:
        """FlashAttention's `window_size`: keys on each side, −1 = unbounded.

        >>> Window.from_flash(128, 0), Window.from_flash(-1, 0)
        (Window(128, 0), Window(math.inf, 0))
        """
        sides = {"left": _index("left", left, -1), "right": _index("right", right, -1)}
        return cls(*(math.inf if side == -1 else side for side in sides.values()))

    @classmethod
    def from_mistral(cls, sliding_window: int) -> Window:
        """Mistral and other causal models: `sliding_window` keys up to and including the query's
        own.

        >>> Window.from_mistral(4096)
        Window(4095, 0)
        """
        return cls(_index("sliding_window", sliding_window, 1) - 1, 0)


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key.

    >>> Full().mask(2).tolist()
    [[True, True], [True, True]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (_WINDOW, _INFINITE, _INFINITE, 1)

    def _expression(self) -> str:
        return "Full()"


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """Query i sees key j when j ≤ i.

    >>> Causal().mask(2).tolist()
    [[True, False], [True, True]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (_WINDOW, _INFINITE, 0, 1)

    def _expression(self) -> str:
        return "Causal()"


@dataclass(frozen=True, repr=False)
class _Tokens(Pattern):
    """What the patterns of listed tokens share."""

    tokens: Sequence[int]

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str) or not isinstance(self.tokens, Iterable):
            raise TypeError(
                f"sparse_attn: expected tokens to be a sequence of ints, got {self.tokens!r}"
            )
        tokens = {_index("tokens", t, -_MOST_TOKENS, _MOST_TOKENS) for t in self.tokens}
        object.__setattr__(self, "tokens", tuple(sorted(tokens)))
        super().__post_init__()

    def _runs(self) -> tuple[int, ...]:
        """The number of runs of consecutive tokens, then their starts and stops; none crosses 0."""
        runs: list[int] = []
        for token in self.tokens:
            if runs and runs[-1] == token and token != 0:
                runs[-1] = token + 1
            else:
                runs += [token, token + 1]
        return (len(runs) // 2, *runs)

    def _expression(self) -> str:
        return f"{type(self).__name__}({list(self.tokens)})"


@dataclass(frozen=True, repr=False)
class GlobalKeys(_Tokens):
    """Every query sees the keys `tokens`: the column half of `Global`.

    Args:
        tokens: Ints; negative ones count from the end. Using one that does not exist raises
            ValueError.

    >>> GlobalKeys([0]).mask(2).tolist()
    [[True, False], [True, False]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (_GLOBAL_KEYS, *self._runs())


@dataclass(frozen=True, repr=False)
class GlobalQueries(_Tokens):
    """The queries at positions `tokens` see every key: the row half of `Global`.

    Args:
        tokens: Ints; negative ones count from the end. Using one that does not exist raises
            ValueError.

    >>> GlobalQueries([0]).mask(2).tolist()
    [[True, True], [False, False]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (_GLOBAL_QUERIES, *self._runs())


@dataclass(frozen=True, repr=False)
class Global(_Tokens):
    """`tokens` see all keys, and all queries see them: symmetric, as in Longformer, section 3.1.

    A causal model writes `(Window(w, 0) | Global([0])) & Causal()`.

    Args:
        tokens: Ints; negative ones count from the end. Using one that does not exist raises
            ValueError.

    >>> Global([0]).mask(2).tolist()
    [[True, True], [True, False]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (_UNION, 2, _GLOBAL_KEYS, *self._runs(), _GLOBAL_QUERIES, *self._runs())


@dataclass(frozen=True, repr=False)
class _Join(Pattern):
    """What unions and intersections share."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if isinstance(self.parts, Pattern) or not isinstance(self.parts, Iterable):
            raise TypeError(
                f"sparse_attn: expected parts to be a sequence of patterns, got {self.parts!r}"
            )
        parts = tuple(self.parts)
        if not parts:
            raise ValueError("sparse_attn: expected parts to hold at least one pattern, got none")
        for part in parts:
            check_pattern(part)
            if isinstance(part, PerHead):
                raise ValueError(
                    "sparse_attn: expected PerHead to be outermost, got it as a part; join "
                    "patterns with | and & instead"
                )
        object.__setattr__(self, "parts", parts)
        super().__post_init__()

    def _joined(self) -> tuple[int, ...]:
        return (len(self.parts), *(word for part in self.parts for word in part.encode()))


@dataclass(frozen=True, repr=False)
class Union(_Join):
    """What any of `parts` allows; `a | b` makes one.

    >>> Window(1, 0) | GlobalKeys([0])
    Window(1, 0) | GlobalKeys([0])
    """

    def _encode(self) -> tuple[int, ...]:
        return (_UNION, *self._joined())

    def _expression(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Intersection(_Join):
    """What all of `parts` allow; `a & b` makes one.

    >>> (Window(4) | Global([0])) & Causal()
    (Window(4) | Global([0])) & Causal()
    """

    def _encode(self) -> tuple[int, ...]:
        return (_INTERSECTION, *self._joined())

    def _expression(self) -> str:
        return " & ".join(
            f"({part!r})" if isinstance(part, Union) else repr(part) for part in self.parts
        )


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Head h uses `patterns[h]`; a list whose length divides the heads serves them in equal groups.

    Args:
        patterns: Patterns, none of them a PerHead.

    Raises:
        TypeError: `patterns` is no sequence of patterns.
        ValueError: It is empty, or holds a PerHead.

    >>> PerHead([Window(8), Window(8, dilation=2)]).mask(16, heads=4).shape
    torch.Size([4, 16, 16])
    """

    patterns: Sequence[Pattern]

    def __post_init__(self) -> None:
        if isinstance(self.patterns, Pattern) or not isinstance(self.patterns, Iterable):
            raise TypeError(
                "sparse_attn: expected patterns to be a sequence of patterns, got "
                f"{self.patterns!r}"
            )
        patterns = tuple(self.patterns)
        if not patterns:
            raise ValueError("sparse_attn: expected patterns to hold at least one, got none")
        for pattern in patterns:
            check_pattern(pattern)
            if isinstance(pattern, PerHead):
                raise ValueError(
                    "sparse_attn: expected PerHead to be outermost, got one inside another"
                )
        object.__setattr__(self, "patterns", patterns)
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        words = (word for pattern in self.patterns for word in pattern.encode())
        return (_PER_HEAD, len(self.patterns), *words)

    def _expression(self) -> str:
        return f"PerHead([{', '.join(map(repr, self.patterns))}])"
