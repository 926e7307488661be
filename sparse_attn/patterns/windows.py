"""Patterns of distance: windows, dilated ones, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_attn.patterns import words
from sparse_attn.patterns.arguments import INFINITE, index, side, word
from sparse_attn.patterns.base import Pattern
from sparse_attn.patterns.blocks import LocalBlocks


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
        object.__setattr__(self, "left", side("left", self.left))
        object.__setattr__(self, "right", side("right", right))
        object.__setattr__(self, "dilation", index("dilation", self.dilation, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.WINDOW, word(self.left), word(self.right), word(self.dilation))

    def _expression(self) -> str:
        sides = [self.left] if self.left == self.right else [self.left, self.right]
        arguments = ["math.inf" if keys == math.inf else str(keys) for keys in sides]
        if self.dilation != 1:
            arguments.append(f"dilation={self.dilation}")
        return f"Window({', '.join(arguments)})"

    @classmethod
    def from_longformer(cls, attention_window: int, dilation: int = 1) -> Window:
        """Hugging Face's Longformer and LED: half of `attention_window` on each side, and the query
        itself.

        >>> Window.from_longformer(512)
        Window(256)
        """
        half = index("attention_window", attention_window, 0) // 2
        return cls(half, half, dilation)

    @classmethod
    def from_flash(cls, left: int, right: int) -> Window:
        """FlashAttention's `window_size`: keys on each side, −1 = unbounded.

        >>> Window.from_flash(128, 0), Window.from_flash(-1, 0)
        (Window(128, 0), Window(math.inf, 0))
        """
        sides = {"left": index("left", left, -1), "right": index("right", right, -1)}
        return cls(*(math.inf if keys == -1 else keys for keys in sides.values()))

    @classmethod
    def from_mistral(cls, sliding_window: int) -> Window:
        """Mistral and other causal models: `sliding_window` keys up to and including the query's
        own.

        >>> Window.from_mistral(4096)
        Window(4095, 0)
        """
        return cls(index("sliding_window", sliding_window, 1) - 1, 0)


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key.

    >>> Full().mask(2).tolist()
    [[True, True], [True, True]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (words.WINDOW, INFINITE, INFINITE, 1)


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """Query i sees key j when j ≤ i.

    >>> Causal().mask(2).tolist()
    [[True, False], [True, True]]
    """

    def _encode(self) -> tuple[int, ...]:
        return (words.WINDOW, INFINITE, 0, 1)


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """The strided set of the Sparse Transformer (Child et al. 2019, section 4.2), causal.

    Query i sees key j ≤ i when i − stride < j, or when (i − j) mod stride = 0. For images, stride
    is the width: the pixels before it, and the column above it.

    Args:
        stride: Length of the local part and distance of the keys of the other, at least 1.

    Raises:
        TypeError: stride is no int.
        ValueError: stride is less than 1.

    >>> Strided(3).mask(7).int()[6].tolist()
    [1, 0, 0, 1, 1, 1, 1]
    """

    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", index("stride", self.stride, 1))
        super().__post_init__()

    @property
    def factors(self) -> tuple[Pattern, Pattern]:
        """The two head types that the paper factors it into: `PerHead(Strided(128).factors)`.

        >>> Strided(3).factors
        (Window(2, 0), Window(math.inf, 0, dilation=3))
        """
        return Window(self.stride - 1, 0), Window(math.inf, 0, self.stride)

    def _encode(self) -> tuple[int, ...]:
        local, column = self.factors
        return (local | column).encode()


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    """The fixed set of the Sparse Transformer (Child et al. 2019, section 4.2), causal.

    Query i sees key j ≤ i when both lie in one segment of `stride` tokens, or when j is one of the
    last `summary` tokens of its segment.

    Args:
        stride: Length of a segment, at least 1.
        summary: Summary tokens of each segment, from 0 to stride.

    Raises:
        TypeError: An argument is no int.
        ValueError: An argument is out of range.

    >>> Fixed(3, 1).mask(7).int()[6].tolist()
    [0, 0, 1, 0, 0, 1, 1]
    """

    stride: int
    summary: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", index("stride", self.stride, 1))
        object.__setattr__(self, "summary", index("summary", self.summary, 0, self.stride))
        super().__post_init__()

    @property
    def factors(self) -> tuple[Pattern, Pattern]:
        """The two head types that the paper factors it into: `PerHead(Fixed(128, 8).factors)`.

        >>> Fixed(3, 1).factors[0]
        LocalBlocks(3) & Causal()
        """
        return LocalBlocks(self.stride) & Causal(), _Summaries(self.stride, self.summary)

    def _encode(self) -> tuple[int, ...]:
        segment, summaries = self.factors
        return (segment | summaries).encode()


@dataclass(frozen=True, repr=False)
class _Summaries(Pattern):
    """Query i sees key j ≤ i if it is one of the last `summary` tokens of its segment."""

    stride: int
    summary: int

    def _encode(self) -> tuple[int, ...]:
        summaries = (words.PERIODIC_KEYS, word(self.stride), word(self.summary))
        return (words.INTERSECTION, 2, *summaries, *Causal().encode())

    def _expression(self) -> str:
        return f"Fixed({self.stride}, {self.summary}).factors[1]"


@dataclass(frozen=True, repr=False)
class Radial(Pattern):
    """A window whose keys thin out with distance, by half for each octave (Radial Attention, Li et
    al. 2025; LogSparse Transformer, Li et al. 2019, for radius 1).

    With d = |i − j|, query i sees key j when d ≤ radius, or when d lies in (radius · 2^(k−1),
    radius · 2^k] for a k ≥ 1 and d mod 2^k = 0: radius · log(n) keys in all.

    Args:
        radius: Keys on each side that are all seen, at least 0.

    Raises:
        TypeError: radius is no int.
        ValueError: radius is negative.

    >>> Radial(2).mask(9).int()[0].tolist()
    [1, 1, 1, 0, 1, 0, 0, 0, 1]
    """

    radius: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", index("radius", self.radius, 0))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.RADIAL, word(self.radius))
