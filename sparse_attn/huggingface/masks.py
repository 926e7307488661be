"""Masks of transformers' models without their pairs: distances, padding, packed sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparse_attn.huggingface.mask_functions import Band, band_of
from sparse_attn.patterns import Window


@dataclass(eq=False)
class BandMask:
    """A mask (batch, 1, n_q, n_k), True = allowed, without its pairs.

    transformers' models hand it from `attention_mask` to `attention_forward` like a tensor. Whoever
    looks into it gets that tensor, which takes n_q · n_k bytes.
    """

    #: Which of the first `keys` keys a query sees; their ends are aligned.
    pattern: Window
    #: The rest is room in a cache.
    keys: int
    #: (batch, keys) bool, True = ignore.
    padding: Tensor | None
    #: Of each example the lengths of the sequences that it packs.
    lengths: list[list[int]] | None
    shape: tuple[int, int, int, int]
    #: Makes the tensor.
    dense: Callable[[], Tensor]

    ndim = 4
    dtype = torch.bool

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether it was made for these."""
        return self.shape[2:] == (query.shape[2], key.shape[2])

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> tuple[int, ...] | int:
        return self.shape if dim is None else self.shape[dim]

    def to(self, target: Any, **options: Any) -> BandMask | Tensor:
        """On another device it is what it was."""
        if isinstance(target, torch.dtype) or "dtype" in options:
            return self.dense().to(target, **options)
        padding = None if self.padding is None else self.padding.to(target, **options)
        return replace(self, padding=padding, dense=lambda: self.dense().to(target, **options))

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in BandMask.__dataclass_fields__:
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(**arguments: Any) -> BandMask | Tensor:
    """The mask of a model, as transformers' `AttentionMaskInterface` asks for it.

    Args:
        **arguments: Those of `transformers.masking_utils.sdpa_mask`.

    Returns:
        A `BandMask` where the mask function allows a band of distances (causal, sliding windows,
        all) or packed sequences of one, with padding or without; otherwise `sdpa_mask`'s tensor.
    """
    padding = arguments.get("attention_mask")
    if isinstance(padding, BandMask):
        return padding
    dense = partial(_dense, arguments)
    if torch.compiler.is_compiling() and not any(arguments.get(name) for name in _SKIPS):
        # Of a program that is traced only the mask functions of transformers itself are read.
        return dense()
    band = band_of(arguments["mask_function"])
    if band is None or (padding is not None and padding.dim() != 2):
        return dense()
    lengths = _lengths(band, **arguments) if band.packed else None
    keys = _keys(band, **arguments)
    if keys is None or (band.packed and lengths is None):
        return dense()
    if padding is not None:
        padding = _ignored(padding, arguments.get("kv_offset", 0), keys)
    return BandMask(
        Window(-band.lowest, band.highest),
        keys,
        padding,
        lengths if band.packed and max(map(len, lengths)) > 1 else None,
        (arguments["batch_size"], 1, _queries(**arguments), arguments["kv_length"]),
        dense,
    )


#: Arguments that ask for a tensor if both are false.
_SKIPS = ("allow_is_causal_skip", "allow_is_bidirectional_skip")


def _dense(arguments: dict[str, Any]) -> Tensor:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**arguments, **dict.fromkeys(_SKIPS, False)})


def _queries(q_length: int | None = None, cache_position: Tensor | None = None, **_: Any) -> int:
    return len(cache_position) if q_length is None else q_length


def _keys(band: Band, kv_length: int, kv_offset: int = 0, **arguments: Any) -> int | None:
    """How many keys stand up to the last query; None if no `Window` over them is the band."""
    if band.lowest == -math.inf and band.highest == math.inf:
        return kv_length
    end = _end(kv_length=kv_length, kv_offset=kv_offset, **arguments)
    if end is None or not band.lowest <= 0 <= band.highest:
        return None
    keys = end - kv_offset
    return keys if keys == kv_length or (0 < keys < kv_length and band.highest == 0) else None


def _end(
    kv_length: int,
    kv_offset: int,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    **arguments: Any,
) -> int | None:
    """The position behind the last query; None if the queries do not stand side by side, or if it
    is not known before the program runs.
    """
    queries = _queries(cache_position=cache_position, **arguments)
    if torch.compiler.is_compiling():
        if cache_position is None and isinstance(q_offset, int):
            return q_offset + queries
        # Queries stand at positions that have keys: here that leaves one place.
        return kv_offset + kv_length if kv_length == queries else None
    if cache_position is None:
        return int(q_offset) + queries
    first, last = cache_position[[0, -1]].tolist()
    return last + 1 if last - first + 1 == queries else None


def _ignored(padding: Tensor, offset: int, keys: int) -> Tensor:
    """transformers' padding, True = a token, as this library's; what it does not reach is none."""
    tokens = padding.to(torch.bool)[:, offset : offset + keys]
    return torch.nn.functional.pad(~tokens, (0, keys - tokens.shape[1]), value=True)


def _lengths(
    band: Band, batch_size: int, kv_length: int, kv_offset: int = 0, **arguments: Any
) -> list[list[int]] | None:
    """The lengths of the sequences that each example packs; None if it is something else."""
    sequences, positions = band.sequences, band.positions
    shape = (batch_size, kv_length)
    if sequences is None or sequences.shape != shape or kv_offset != 0:
        return None
    if sequences.dtype != torch.int64:  # Numbers of sequences count; other tables are marks.
        return None
    if _queries(**arguments) != kv_length or (positions is not None and positions.shape != shape):
        return None
    steps = sequences.diff(dim=1)
    side_by_side = steps >= 0
    if positions is not None:
        side_by_side &= (positions.diff(dim=1) == 1) | (steps > 0)
    if not side_by_side.all():
        return None
    starts = [[0] for _ in range(batch_size)]
    for row, column in steps.nonzero().tolist():
        starts[row].append(column + 1)
    return [[b - a for a, b in pairwise([*row, kv_length])] for row in starts]
