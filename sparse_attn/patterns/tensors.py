"""Patterns that are data: layouts of blocks, masks, lists of keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_attn.patterns import words
from sparse_attn.patterns.arguments import index, word
from sparse_attn.patterns.base import Pattern


def _check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], least: int) -> None:
    """A tensor of one of `dtypes`, with `least` dimensions and at most heads and batch before."""
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"sparse_attn: expected {name} to be a {kinds} tensor, got {type(tensor).__name__}"
        )
    if tensor.dtype not in dtypes:
        raise TypeError(f"sparse_attn: expected {name} of dtype {kinds}, got {tensor.dtype}")
    if not least <= tensor.dim() <= least + 2:
        raise ValueError(
            f"sparse_attn: expected {name} with {least} to {least + 2} dimensions, got shape "
            f"{list(tensor.shape)}"
        )


def _heads(tensor: Tensor, inner: int) -> int:
    return tensor.shape[-inner - 1] if tensor.dim() > inner else 1


class _Data(Pattern):
    """What patterns that hold tensors share: they hash and compare by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout(_Data):
    """Query i sees key j when layout[…, ⌊i / block⌋, ⌊j / block⌋] is true.

    The layout may be made at run time, from the data: the tiles to visit are listed at each call,
    on its device, and changes in place are seen. Memory grows with the layout, not with the
    square of the length. Rows are raw: query i, not its position. Hashed and compared by
    identity.

    Args:
        layout: (blocks of queries, blocks of keys) bool, (heads, …) or (batch, heads, …), either of
            which may be 1 for all. The last blocks may be partial.
        block: Tokens of a block, at least 1.

    Raises:
        TypeError: layout is no bool tensor, or block no int.
        ValueError: layout has another number of dimensions, or block is less than 1. When used:
            its shape does not fit the lengths.

    >>> BlockLayout(torch.eye(2, dtype=torch.bool), 2).mask(3).int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    layout: Tensor
    block: int

    def __post_init__(self) -> None:
        _check_tensor("layout", self.layout, (torch.bool,), 2)
        object.__setattr__(self, "block", index("block", self.block, 1))
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.BLOCK_LAYOUT, word(self.block))

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        return (self.layout,)

    @property
    def heads(self) -> int:
        return _heads(self.layout, 2)

    def _expression(self) -> str:
        return f"BlockLayout(<{_describe(self.layout)}>, {self.block})"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Mask(_Data):
    """Query i sees key j when mask[…, i, j] is true: for what no other pattern says.

    Only what is true is computed: tiles that are false are skipped, and pairs that are few in their
    tile are taken one by one. Hashed and compared by identity.

    Args:
        mask: (n_q, n_k) bool, (heads, …) or (batch, heads, …), either of which may be 1 for all.

    Raises:
        TypeError: mask is no bool tensor.
        ValueError: mask has another number of dimensions. When used: its shape does not fit.

    >>> Mask(torch.tensor([[True, False], [True, True]])).cost(2).pairs
    3
    """

    dense: Tensor

    def __init__(self, mask: Tensor) -> None:
        _check_tensor("mask", mask, (torch.bool,), 2)
        object.__setattr__(self, "dense", mask)
        self.__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.BLOCK_LAYOUT, 1)

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        return (self.dense,)

    @property
    def heads(self) -> int:
        return _heads(self.dense, 2)

    def _expression(self) -> str:
        return f"Mask(<{_describe(self.dense)}>)"


@dataclass(frozen=True, eq=False, repr=False)
class KeyLists(_Data):
    """Every query sees a list of keys of its own, found at run time: top-k, hashing, retrieval.

    Memory grows with the lists. A key that is listed twice counts once. Hashed and compared by
    identity.

    Args:
        indices: (n_q, k) int64 or int32, (heads, …) or (batch, heads, …), either of which may be 1
            for all: k keys for each query, in any order.
        counts: How many of the k hold, (n_q), (heads, …) or (batch, heads, …); all if None.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A tensor has another number of dimensions. When used: its shape does not fit, or
            an index or a count is out of range.

    >>> KeyLists(torch.tensor([[0, 0], [2, 1], [1, 9]]), torch.tensor([2, 2, 1])).mask(3).int()
    tensor([[1, 0, 0],
            [0, 1, 1],
            [0, 1, 0]], dtype=torch.int32)
    """

    indices: Tensor
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        _check_tensor("indices", self.indices, (torch.int64, torch.int32), 2)
        if self.counts is not None:
            _check_tensor("counts", self.counts, (torch.int64, torch.int32), 1)
        super().__post_init__()

    def _encode(self) -> tuple[int, ...]:
        return (words.KEY_LISTS, int(self.counts is not None))

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        return (self.indices,) if self.counts is None else (self.indices, self.counts)

    @property
    def heads(self) -> int:
        counts = 1 if self.counts is None else _heads(self.counts, 1)
        return max(_heads(self.indices, 2), counts)

    def _expression(self) -> str:
        return f"KeyLists(<{_describe(self.indices)}>)"


@dataclass(frozen=True, eq=False, repr=False)
class GeneratedLayout(_Data):
    """The layout that a configuration makes for each length, made once."""

    config: Any
    block: int
    made: dict[int, Tensor] = field(default_factory=dict)

    def _encode(self) -> tuple[int, ...]:
        return (words.BLOCK_LAYOUT, word(self.block))

    def tensors(self, n_q: int, n_k: int) -> tuple[Tensor, ...]:
        if n_q != n_k:
            raise ValueError(
                "sparse_attn: expected as many queries as keys for a layout that is made by "
                f"make_layout(length), got {n_q} and {n_k}"
            )
        length = -(-n_q // self.block) * self.block
        if length not in self.made:
            self.made[length] = _layout(self.config.make_layout(length))
        return (self.made[length],)

    @property
    def heads(self) -> int:
        return getattr(self.config, "num_heads", 1)

    def _expression(self) -> str:
        return f"Pattern.from_deepspeed(<{type(self.config).__name__}>)"


def _layout(layout: object) -> Tensor:
    return torch.as_tensor(layout) != 0


def from_deepspeed(config: Any) -> Pattern:
    """See `Pattern.from_deepspeed`."""
    block = getattr(config, "block", None)
    if block is None:
        raise TypeError(
            "sparse_attn: expected config with a block size, as DeepSpeed's SparsityConfig, got "
            f"{type(config).__name__} without block"
        )
    block = index("block", block, 1)
    if getattr(config, "layout", None) is not None:
        return BlockLayout(_layout(config.layout), block)
    if callable(getattr(config, "make_layout", None)):
        return GeneratedLayout(config, block)
    raise TypeError(
        "sparse_attn: expected config with make_layout(length) or a layout, as DeepSpeed's "
        f"SparsityConfig, got {type(config).__name__} with neither"
    )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
