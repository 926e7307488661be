"""What a pattern is, and how patterns join.

The dataclasses only carry parameters. What they mean is defined once, in C++ (`csrc/patterns/`);
`mask`, `cost` and `plan` ask there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.patterns import words
from sparse_attn.patterns.arguments import check_sizes, index

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparse_attn.distributed.communication import Communication
    from sparse_attn.patterns.receptive_field import ReceptiveField


@dataclass(frozen=True)
class Cost:
    """What attention with a pattern takes, for one batch element and one head (see `Pattern.cost`).

    Attributes:
        pairs: Allowed (query, key) pairs, exactly.
        flops: Floating-point operations of the forward pass on these pairs: 4 · pairs · head_dim.
        bytes: Query, key and value read once and the output written once.
        visited: Pairs that a CPU computes in the tiles that the plan visits.
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
        """The call that makes it, without the arguments that are at their defaults."""
        arguments = []
        for parameter in fields(self):
            value = getattr(self, parameter.name) if parameter.init else MISSING
            if value is MISSING or value == parameter.default:
                continue
            required = parameter.default is MISSING
            arguments.append(repr(value) if required else f"{parameter.name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"

    def __repr__(self) -> str:
        return self._expression()

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return combine(Union, self, other)

    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return combine(Intersection, self, other)

    def encode(self) -> tuple[int, ...]:
        """The list of ints that stands for the pattern in `torch.ops.sparse_attn.attention`.

        >>> Window(2, 0).encode()
        (1, 2, 0, 1)
        """
        return self._words

    def reseeded(self, seed: int) -> Pattern:
        """The same pattern with another draw of what is random in it.

        Args:
            seed: Added to every seed in the pattern, modulo 2⁶⁴, so that parts that draw apart go
                on to.

        Returns:
            A pattern; one equal to this one if nothing in it is random.

        Raises:
            TypeError: seed is no int.
            ValueError: seed does not fit in 64 bits.

        >>> (Window(8) | RandomTokens(0.1) | BigBird(16, seed=4)).reseeded(3)
        Window(8) | RandomTokens(0.1, seed=3) | BigBird(16, seed=7)
        """
        return self

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        """The tensors that go with `encode()` for these sizes: those of layouts, masks and lists.

        >>> Window(2, 0).tensors(8, 8)
        ()
        """
        return ()

    @property
    def heads(self) -> int:
        """How many heads it tells apart: 1 for most, the number of patterns for a `PerHead`.

        >>> Window(2).heads, PerHead([Window(2), Window(4)]).heads
        (1, 2)
        """
        return 1

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, as far as the expression's form tells.

        True for `Window(…, 0)`, `Causal()`, `Strided`, `Fixed`, a union of causal patterns and an
        intersection with one.

        >>> (Window(8, 0) | Global([0])).causal, ((Window(8) | Global([0])) & Causal()).causal
        (False, True)
        """
        return ops._pattern_causal(self.encode())

    def mask(self, n_q: int, n_k: int | None = None, heads: int | None = None) -> Tensor:
        """The dense definition, for tests and pictures.

        Args:
            n_q: Number of queries.
            n_k: Number of keys; as many as queries if None.
            heads: Number of heads; needed for patterns that differ among heads.

        Returns:
            A bool tensor (n_q, n_k), or (heads, n_q, n_k) if heads are given; True = allowed. With
            a layout that has examples, (batch, heads or 1, n_q, n_k).

        Raises:
            ValueError: A token is out of range, or `heads` or a layout does not fit.

        >>> Window(1, 0).mask(2, 3).tolist()
        [[True, True, False], [False, True, True]]
        """
        heads = None if heads is None else index("heads", heads, 1)
        sizes = check_sizes(n_q, n_k)
        return ops._pattern_mask(self.encode(), self.tensors(*sizes), *sizes, heads)

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
            A `Cost`; for patterns that differ among heads or examples, the sum over these.

        Raises:
            ValueError: A token or the tile is out of range, or a layout does not fit.

        >>> cost = Window(256).cost(16384)
        >>> cost.pairs, round(cost.overhead, 2)
        (8339200, 1.03)
        """
        sizes = check_sizes(n_q, n_k)
        head_dim = index("head_dim", head_dim, 1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"sparse_attn: expected dtype to be a torch.dtype, got {dtype!r}")
        sides = None if tile is None else _two_sides(tile)
        pairs, visited, *_, heads = ops._pattern_cost(
            self.encode(), self.tensors(*sizes), *sizes, sides
        )
        return Cost(
            pairs=pairs,
            flops=4 * pairs * head_dim,
            bytes=heads * 2 * sum(sizes) * head_dim * dtype.itemsize,
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
        sizes = check_sizes(n_q, n_k)
        return ops._pattern_plan(self.encode(), self.tensors(*sizes), *sizes)

    def communication(
        self,
        n: int | Sequence[int],
        ranks: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        heads_kv: int | None = None,
        head_dim: int = 64,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        key_padding_mask: bool = False,
        global_mask: bool = False,
    ) -> Communication:
        """What `sparse_attn.distributed.context_parallel_attention` sends, before anything runs.

        Args:
            n: Length of the sequence, split as evenly as can be; or the lengths of the shards.
            ranks: Number of ranks; that of the shards if n lists them.
            batch: Examples.
            heads: Of the queries.
            heads_kv: Of keys and values; as many as heads if None.
            head_dim: Size of queries and keys.
            value_dim: Size of values; head_dim if None.
            dtype: Of queries, keys and values.
            key_padding_mask: Whether there is one: a byte for each key that is sent.
            global_mask: Whether there is one: all ranks gather its bytes. The keys and queries of
                its tokens come on top; those of a `Global` pattern are as many.

        Returns:
            A `Communication`: bytes sent and received by each rank, forward and backward, beside
            those of an all-gather and of a ring.

        Raises:
            TypeError: A number is no int, or dtype no floating one.
            ValueError: A number is too small, the heads do not fit each other or the pattern, ranks
                and n differ, or a token does not exist.

        >>> sparse = Window(256).communication(65536, ranks=4)
        >>> sparse.keys, sparse.received  # halos: 256 keys and values from each neighbor
        ((256, 512, 512, 256), (131072, 262144, 262144, 131072))
        >>> sparse.all_gather, sparse.all_keys
        (25165824, False)
        """
        from sparse_attn.distributed.communication import communication  # needs Pattern itself

        return communication(
            self,
            tuple(n) if isinstance(n, Iterable) else n,
            ranks,
            batch=batch,
            heads=heads,
            heads_kv=heads_kv,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype,
            key_padding_mask=key_padding_mask,
            global_mask=global_mask,
        )

    def receptive_field(self, n: int, layers: int | Sequence[Pattern]) -> ReceptiveField:
        """How far information travels through stacked layers of attention.

        Args:
            n: Number of tokens.
            layers: Number of layers, all with this pattern; or the patterns of the layers above a
                first one with this pattern, such as windows of growing dilation.

        Returns:
            A `ReceptiveField`: which tokens reach which after each layer, how far, after how many
            layers all do, and a plot. Heads count together, and so does the residual connection:
            a token always reaches itself.

        Raises:
            TypeError: layers is neither an int nor patterns.
            ValueError: n or layers is less than 1.

        >>> field = Window(2).receptive_field(16, layers=10)
        >>> field.distance[:3], field.layers_to_connect
        ((2, 4, 6), 8)
        """
        from sparse_attn.patterns.receptive_field import trace  # needs Pattern itself

        if isinstance(layers, Iterable):
            above = list(layers)
            for pattern in above:
                check_pattern(pattern)
            return trace([self, *above], index("n", n, 1))
        return trace([self] * index("layers", layers, 1), index("n", n, 1))

    @staticmethod
    def from_deepspeed(config: object) -> Pattern:
        """The pattern of one of DeepSpeed's sparsity configurations.

        Args:
            config: An object with `block`, and with `make_layout(length)`, which gives a layout
                (heads, blocks, blocks), or with such a `layout` itself; not 0 = allowed. A length
                that is no multiple of the block takes the layout of the next one.

        Returns:
            A pattern with exactly the pairs of the layout. Layouts for one direction end at whole
            blocks; `& Causal()` cuts within the blocks of the diagonal.

        Raises:
            TypeError: config lacks `block`, or both of the others.

        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(block=16, layout=torch.eye(4, dtype=torch.long)[None])
        >>> Pattern.from_deepspeed(config).cost(64).pairs
        1024
        """
        from sparse_attn.patterns.tensors import from_deepspeed  # needs Pattern itself

        return from_deepspeed(config)

    def plot(self, n: int, n_k: int | None = None, ax: Axes | None = None) -> Any:
        """Draw the mask with matplotlib: queries down, keys across.

        Args:
            n: Number of queries.
            n_k: Number of keys; as many as queries if None.
            ax: Axes to draw on; new ones if None. A pattern that differs among heads always gets
                new ones, a panel for each.

        Returns:
            The axes, or a list of them if heads differ. Of a layout with examples, the first.

        >>> Window(8).plot(64).get_ylabel()
        'query'
        """
        from matplotlib import pyplot

        heads = self.heads
        masks = self.mask(n, n_k, heads=heads)
        if heads > 1 or ax is None:
            _, panels = pyplot.subplots(1, heads, squeeze=False)
        else:
            panels = [[ax]]
        for mask, panel in zip(masks[0] if masks.dim() == 4 else masks, panels[0], strict=True):
            panel.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
            panel.set(title=repr(self), xlabel="key", ylabel="query")
        return list(panels[0]) if heads > 1 else panels[0][0]


def _two_sides(tile: object) -> list[int]:
    if not isinstance(tile, Sequence):
        raise TypeError(f"sparse_attn: expected tile to be (rows, keys), got {tile!r}")
    if len(tile) != 2:
        raise ValueError(f"sparse_attn: expected tile to be (rows, keys), got {tile!r}")
    return [index("tile", side, 1) for side in tile]


def check_pattern(pattern: object) -> None:
    """Raise TypeError unless `pattern` is a Pattern."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "sparse_attn: expected pattern to be a Pattern, such as Window(256), got "
            f"{type(pattern).__name__}"
        )


def _check_list(name: str, patterns: object, nested: str) -> tuple[Pattern, ...]:
    """The patterns of a sequence, none of them a PerHead: `nested` says how one was met."""
    if isinstance(patterns, (Pattern, Tensor)) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"sparse_attn: expected {name} to be a sequence of patterns, got {patterns!r}"
        )
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError(f"sparse_attn: expected {name} to hold at least one pattern, got none")
    for pattern in patterns:
        check_pattern(pattern)
        if isinstance(pattern, PerHead):
            raise ValueError(f"sparse_attn: expected PerHead to be outermost, got {nested}")
    return patterns


def _encode_all(patterns: Sequence[Pattern]) -> tuple[int, ...]:
    return (len(patterns), *(word for pattern in patterns for word in pattern.encode()))


def _tensors_of_all(patterns: Sequence[Pattern], n_q: int, n_k: int) -> tuple[Tensor, ...]:
    return tuple(tensor for pattern in patterns for tensor in pattern.tensors(n_q, n_k))


def combine(kind: type[Union] | type[Intersection], a: Pattern, b: Pattern) -> Pattern:
    """a and b joined; joins of one kind are flattened, and a PerHead is joined head by head."""
    if isinstance(a, PerHead) or isinstance(b, PerHead):
        left = a.patterns if isinstance(a, PerHead) else (a,)
        right = b.patterns if isinstance(b, PerHead) else (b,)
        heads = math.lcm(len(left), len(right))
        left, right = (
            [p for p in part for _ in range(heads // len(part))] for part in (left, right)
        )
        return PerHead([combine(kind, x, y) for x, y in zip(left, right, strict=True)])
    parts = [part for p in (a, b) for part in (p.parts if isinstance(p, kind) else (p,))]
    return kind(tuple(parts))


@dataclass(frozen=True, repr=False)
class _Join(Pattern):
    """What unions and intersections share."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        nested = "it as a part; join patterns with | and & instead"
        object.__setattr__(self, "parts", _check_list("parts", self.parts, nested))
        super().__post_init__()

    def reseeded(self, seed: int) -> Pattern:
        return type(self)(tuple(part.reseeded(seed) for part in self.parts))

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        return _tensors_of_all(self.parts, n_q, n_k)

    @property
    def heads(self) -> int:
        return math.lcm(*(part.heads for part in self.parts))


@dataclass(frozen=True, repr=False)
class Union(_Join):
    """What any of `parts` allows; `a | b` makes one.

    >>> Window(1, 0) | GlobalKeys([0])
    Window(1, 0) | GlobalKeys([0])
    """

    def _encode(self) -> tuple[int, ...]:
        return (words.UNION, *_encode_all(self.parts))

    def _expression(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Intersection(_Join):
    """What all of `parts` allow; `a & b` makes one.

    >>> (Window(4) | Global([0])) & Causal()
    (Window(4) | Global([0])) & Causal()
    """

    def _encode(self) -> tuple[int, ...]:
        return (words.INTERSECTION, *_encode_all(self.parts))

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
        patterns = _check_list("patterns", self.patterns, nested="one inside another")
        object.__setattr__(self, "patterns", patterns)
        super().__post_init__()

    def reseeded(self, seed: int) -> Pattern:
        return PerHead([pattern.reseeded(seed) for pattern in self.patterns])

    def _encode(self) -> tuple[int, ...]:
        return (words.PER_HEAD, *_encode_all(self.patterns))

    def _expression(self) -> str:
        return f"PerHead([{', '.join(map(repr, self.patterns))}])"

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        return _tensors_of_all(self.patterns, n_q, n_k)

    @property
    def heads(self) -> int:
        return math.lcm(len(self.patterns), *(part.heads for part in self.patterns))
