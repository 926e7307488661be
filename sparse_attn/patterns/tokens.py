"""Patterns of single tokens: global ones, the first and the last, random pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparse_attn.patterns import words
from sparse_attn.patterns.arguments import index, word
from sparse_attn.patterns.base import Pattern
from sparse_attn.patterns.seeded import Seeded

_MOST_TOKENS = 2**59  # beyond any tensor; keeps the arithmetic of tokens from overflowing


@dataclass(frozen=True, repr=False)
class _Tokens(Pattern):
    """What the patterns of listed tokens share."""

    tokens: Sequence[int]

    def __post_init__(self) -> None:
        is_scalar = getattr(self.tokens, "ndim", 1) == 0  # of torch or NumPy: iterable by type only
        if isinstance(self.tokens, str) or not isinstance(self.tokens, Iterable) or is_scalar:
            raise TypeError(
                f"sparse_attn: expected tokens to be a sequence of ints, got {self.tokens!r}"
            )
        tokens = {index("tokens", t, -_MOST_TOKENS, _MOST_TOKENS) for t in self.tokens}
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
        return (words.GLOBAL_KEYS, *self._runs())


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
        return (words.GLOBAL_QUERIES, *self._runs())


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
        runs = self._runs()
        return (words.UNION, 2, words.GLOBAL_KEYS, *runs, words.GLOBAL_QUERIES, *runs)


@dataclass(frozen=True, repr=False)
class FirstLast(Pattern):
    """Every query sees the first `first` and the last `last` keys of the sequence.

    "First k" and "last k" are also said of neighbors: the k keys before a query and itself are
    `Window(k, 0)`, those after it `Window(0, k)`.

    Args:
        first: Keys at the start, at least 0: attention sinks (Xiao et al. 2023), a prompt.
        last: Keys at the end, at least 0.

    Raises:
        TypeError: An argument is no int.
        ValueError: An argument is negative.

    >>> FirstLast(1, 2).mask(5).int()[0].tolist()
    [1, 0, 0, 1, 1]
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", index("first", self.first, 0))
        object.__setattr__(self, "last", index("last", self.last, 0))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.EDGE_KEYS, 1, word(self.first), word(self.last))


@dataclass(frozen=True, repr=False)
class RandomTokens(Seeded):
    """Every pair is allowed with the same probability, independently of all others.

    The number that decides on a pair is a function of seed, position and key alone (Philox,
    Salmon et al. 2011): it is the same for every example, head, device and run, and drawing it
    touches no generator of torch, NumPy or Python.

    Args:
        keep_prob: Probability of a pair, from 0 to 1, in steps of 2⁻³².
        seed: Another int gives other pairs.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    >>> pairs = RandomTokens(0.25, seed=1).mask(200).sum().item()
    >>> abs(pairs / 200**2 - 0.25) < 0.02
    True
    """

    keep_prob: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not hasattr(self.keep_prob, "__float__"):
            raise TypeError(
                f"sparse_attn: expected keep_prob to be a number, got {self.keep_prob!r}"
            )
        object.__setattr__(self, "keep_prob", float(self.keep_prob))
        if not 0.0 <= self.keep_prob <= 1.0:  # NaN neither
            raise ValueError(f"sparse_attn: expected keep_prob in [0, 1], got {self.keep_prob}")
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        threshold = max(round(self.keep_prob * 2**32), math.ceil(self.keep_prob))
        return (words.RANDOM_TOKENS, threshold, self.seed)
