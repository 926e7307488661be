"""Patterns of every kind that are worth trying within a budget of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from sparse_attn.analysis._blocks import BlockScores, attention_mass
from sparse_attn.analysis._exact import Exact, within
from sparse_attn.analysis._samples import Sample
from sparse_attn.patterns import (
    BigBird,
    Causal,
    Checkerboard,
    FirstLast,
    Fixed,
    GlobalKeys,
    LocalBlocks,
    Pattern,
    Radial,
    Strided,
    Window,
)

_BLOCKS = (8, 16, 32, 64, 128, 256)
_MOST_BLOCKS = 512  # on a side of a fitted layout; its memory grows with their square
_FULL = 0.99  # of the pairs: good enough
_DILATIONS = (2, 4, 8)
_GLOBALS = (1, 4, 16, 64)
_SINKS = 4


class Candidates:
    """Makes patterns of at most `most` pairs for a head and example, as large as they may be.

    Args:
        exact: The attention they are to come close to; causal ones if its reference is.
        most: Pairs.
        samples: Reads what layouts are fitted to, anew at each call.
    """

    def __init__(self, exact: Exact, most: float, samples: Callable[[], Iterable[Sample]]) -> None:
        self.exact = exact
        self.samples = samples
        self.most = most
        self.causal = exact.reference.causal
        self.n_q, self.n_k = exact.problem.sizes

    def __iter__(self) -> Iterator[Pattern]:
        """All that fit, once each."""
        made = (
            *self._windows(),
            *self._around_globals(),
            *self._blocks(),
            *self._fitted(),
            *(self._autoregressive() if self.causal else ()),
        )
        return iter(dict.fromkeys(pattern for pattern in made if pattern is not None))

    def _windows(self) -> Iterator[Pattern | None]:
        yield self._largest(self._near, self.n_k)
        for dilation in _DILATIONS:
            yield self._largest(lambda w, d=dilation: self._near(w, d), self.n_k // dilation)
        far = max(_DILATIONS)
        yield self._largest(lambda w: self._near(w) | self._near(w, far), self.n_k)
        yield self._largest(Radial, self.n_k)
        yield self._largest(lambda w: Checkerboard(16) & self._near(w), self.n_k)

    def _around_globals(self) -> Iterator[Pattern | None]:
        """A window, and keys that everyone sees: the first ones, and those with most attention."""
        first = FirstLast(min(_SINKS, self.n_k), 0)
        yield self._largest(lambda w: self._near(w) | first, self.n_k)
        order = self.exact.received().sort(descending=True, stable=True).indices.tolist()
        for number in _GLOBALS:
            keys = GlobalKeys(order[:number])
            yield self._largest(lambda w, keys=keys: self._near(w) | keys, self.n_k)

    def _blocks(self) -> Iterator[Pattern | None]:
        yield self._largest(lambda size: LocalBlocks(size + 1), self.n_k)
        for random in (1, 3):
            yield self._fullest(BigBird(block, random_blocks=random) for block in _BLOCKS)

    def _fitted(self) -> Iterator[Pattern | None]:
        """The best layouts of small blocks, and of larger ones, which run faster."""
        whole = self.n_q * self.n_k / 2 ** int(self.causal)
        longest = max(self.n_q, self.n_k)
        smallest = max(4, 2 ** math.ceil(math.log2(longest / _MOST_BLOCKS)))
        for block in (smallest, 4 * smallest):
            scores = BlockScores(block)
            for sample in self.samples():
                scores.add(sample, attention_mass)
            if scores.sizes != (self.n_q, self.n_k):
                raise ValueError(
                    f"sparse_attn: expected samples of {self.n_q} queries and {self.n_k} keys, as "
                    f"query and key, got {scores.sizes[0]} and {scores.sizes[1]}"
                )
            shares = (self.most / whole * 0.9**step for step in range(12))
            yield self._first(scores.layout(min(share, 1.0)) for share in shares)

    def _autoregressive(self) -> Iterator[Pattern | None]:
        """The Sparse Transformer's, whose strides go through all powers of two."""
        strides = [2**power for power in range(self.n_k.bit_length())]
        yield self._fullest(Strided(stride) for stride in strides)
        yield self._fullest(Fixed(stride, -(-stride // 16)) for stride in strides)

    def _near(self, keys: int, dilation: int = 1) -> Pattern:
        return Window(keys, 0 if self.causal else keys, dilation)

    def _fitting(self, pattern: Pattern) -> Pattern | None:
        """The part of the pattern within the reference, if that is few enough pairs."""
        pattern = within(Causal(), pattern) if self.causal else pattern
        return pattern if self.exact.problem.pairs(pattern) <= self.most else None

    def _first(self, patterns: Iterable[Pattern]) -> Pattern | None:
        """The first that fits."""
        return next((fit for p in patterns if (fit := self._fitting(p)) is not None), None)

    def _fullest(self, patterns: Iterable[Pattern]) -> Pattern | None:
        """Of those that fit the one with the most pairs."""
        fitting = [fit for p in patterns if (fit := self._fitting(p)) is not None]
        return max(fitting, key=self.exact.problem.pairs, default=None)

    def _largest(self, make: Callable[[int], Pattern], limit: int) -> Pattern | None:
        """make(k) for the largest k in [0, limit] at which it fits, to a percent of the pairs."""
        best, low, high = None, 0, limit
        while low <= high:
            middle = (low + high) // 2
            fit = self._fitting(make(middle))
            if fit is None:
                high = middle - 1
                continue
            best, low = fit, middle + 1
            if self.exact.problem.pairs(fit) >= _FULL * self.most:
                break
        return best
