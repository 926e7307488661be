"""Tables of numbers for (query, key) pairs: what `bias` adds to the logits, what `gate` multiplies.

Every shape that a user may give becomes one form for the op: a table of four dimensions and its
kind, an int that says what the last two dimensions stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.patterns import Pattern, PerHead, Window
from sparse_attn.patterns.arguments import index
from sparse_attn.patterns.base import Intersection, Union

#: Kinds of tables. Positive ones are blocks of that side: [.., i // kind, j // kind].
SLOPES, SLOTS, DENSE = -1, 0, 1


@dataclass(frozen=True, eq=False)
class SlotBias:
    """A bias (or gate) for the slots of the pattern's window, for each query or for all alike.

    Slot m of `left + 1 + right` belongs to the key at distance (m − left) · dilation from the
    query, so slot 0 is the furthest on the left. A pair falls on its slot by geometry, whichever
    part of the pattern allows it; off the slots the bias is 0 and the gate 1.

    Args:
        table: (batch or 1, heads, n_q or 1, slots). With one row it is Toeplitz: a relative bias.

    Raises:
        TypeError: `table` is no Tensor.
        ValueError: `table` does not have 4 dimensions.

    >>> import sparse_attn
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> relative = SlotBias(torch.randn(1, 4, 1, 33))
    >>> sparse_attn.attention(query, key, value, Window(16), bias=relative).shape
    torch.Size([2, 4, 100, 32])
    """

    table: Tensor

    def __post_init__(self) -> None:
        _check_table("SlotBias", self.table, "(batch or 1, heads, n_q or 1, slots)")


@dataclass(frozen=True, eq=False)
class BlockBias:
    """A bias (or gate) that is the same for all pairs of a block of queries and a block of keys.

    Args:
        table: (batch or 1, heads or 1, ⌈n_q / block⌉, ⌈n_k / block⌉); query i and key j take
            table[…, i // block, j // block].
        block: Side of the blocks, at least 1.

    Raises:
        TypeError: `table` is no Tensor, or `block` no int.
        ValueError: `table` does not have 4 dimensions, or `block` is less than 1.

    >>> import sparse_attn
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> bias = BlockBias(torch.randn(1, 4, 7, 7), 16)
    >>> sparse_attn.attention(query, key, value, Window(16), bias=bias).shape
    torch.Size([2, 4, 100, 32])
    """

    table: Tensor
    block: int

    def __post_init__(self) -> None:
        _check_table("BlockBias", self.table, "(batch or 1, heads or 1, query blocks, key blocks)")
        object.__setattr__(self, "block", index("block", self.block, 1, 2**31 - 1))


def alibi_slopes(
    num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The slopes of ALiBi (Press et al. 2022, section 3), for `attention(…, bias=slopes)`.

    They are 2^(−8/n), 2^(−16/n), … for n heads. Where n is no power of two, those of the next lower
    power come first, then every other one of twice that power.

    Args:
        num_heads: Number of heads, at least 1.
        device: Of the result.
        dtype: Of the result.

    Returns:
        (num_heads,).

    Raises:
        TypeError: `num_heads` is no int.
        ValueError: `num_heads` is less than 1.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    heads = index("num_heads", num_heads, 1)
    power = 2 ** int(math.log2(heads))

    def slopes(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    numbers = slopes(power) + slopes(2 * power)[::2][: heads - power]
    return torch.tensor(numbers, device=device, dtype=dtype)


def encode_table(
    name: str, given: Tensor | SlotBias | BlockBias | None, pattern: Pattern
) -> tuple[Tensor | None, int]:
    """What crosses to the op: the table with its four dimensions, and its kind.

    Raises:
        TypeError: `given` is none of the types.
        ValueError: Its rank says nothing, it is a gate of slopes, or the pattern has no slots.
    """
    table, kind = _kind_of(name, given)
    if table is not None and kind == SLOTS:
        slots = {left + 1 + right for left, right, _ in slot_windows(name, pattern)}
        if slots != {table.shape[-1]}:
            raise ValueError(
                f"sparse_attn: expected {name} with {'/'.join(map(str, sorted(slots)))} slots, "
                f"left + 1 + right of the window of {pattern!r}, got {table.shape[-1]}"
            )
    return table, kind


def slot_windows(name: str, pattern: Pattern) -> list[tuple[int, int, int]]:
    """(left, right, dilation) of the window whose slots a table has, for each pattern of a PerHead.

    Raises:
        ValueError: A pattern does not hold exactly one finite `Window`.
    """
    found = []
    for one in pattern.patterns if isinstance(pattern, PerHead) else [pattern]:
        windows = list(dict.fromkeys(_finite_windows(one)))
        if len(windows) != 1:
            raise ValueError(
                f"sparse_attn: expected a pattern with exactly one finite Window for the slots of "
                f"{name}, got {one!r}"
            )
        found.append((windows[0].left, windows[0].right, windows[0].dilation))
    return found


def _check_table(name: str, table: object, shape: str) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(
            f"sparse_attn: expected {name}'s table to be a Tensor, got {type(table).__name__}"
        )
    if table.dim() != 4:
        raise ValueError(
            f"sparse_attn: expected {name}'s table of shape {shape}, got {tuple(table.shape)}"
        )


def _kind_of(name: str, given: Tensor | SlotBias | BlockBias | None) -> tuple[Tensor | None, int]:
    if given is None:
        return None, DENSE
    if isinstance(given, SlotBias):
        return given.table, SLOTS
    if isinstance(given, BlockBias):
        return given.table, given.block
    if not isinstance(given, Tensor):
        raise TypeError(
            f"sparse_attn: expected {name} to be a Tensor, a SlotBias or a BlockBias, got "
            f"{type(given).__name__}"
        )
    rank = given.dim()
    if rank == 4:
        return given, DENSE
    if rank == 3:
        return given[None], SLOTS
    if rank == 2:
        return given[None, :, None], SLOTS
    if rank == 1 and name == "bias":
        return given[None, :, None, None], SLOPES
    shapes = "(heads, slots), (heads, n_q, slots) or (batch or 1, heads or 1, n_q, n_k)"
    raise ValueError(
        f"sparse_attn: expected {name} of shape {'(heads,), ' if name == 'bias' else ''}{shapes}, "
        f"got {tuple(given.shape)}"
    )


def _finite_windows(pattern: Pattern) -> Iterator[Window]:
    if isinstance(pattern, Window) and math.inf not in (pattern.left, pattern.right):
        yield pattern
    elif isinstance(pattern, (Union, Intersection)):
        for part in pattern.parts:
            yield from _finite_windows(part)
