"""Checks of what one rank gives, and words for what all must give alike."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn.distributed.agreement import Description, in_words
from sparse_attn.functional._common import autocast_is_on, check_flag, check_numbers, check_padding
from sparse_attn.patterns import Pattern, check_pattern
from sparse_attn.tables import DENSE, SLOTS, BlockBias, SlotBias, encode_table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Arguments:
    """What a rank gives to a call.

    Attributes:
        pattern: Of the whole sequence.
        tensors: query, key and value.
        masks: key_padding_mask and global_mask, or None.
        tables: bias and gate: the table, or None, and its kind.
        numbers: dropout_p, scale and softcap as floats, or None.
        enable_gqa: Whether keys may have fewer heads.
        dropout_seed: As given.
        sink: As given.
    """

    pattern: Pattern
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor | None]
    tables: dict[str, tuple[Tensor | None, int]]
    numbers: dict[str, float | None]
    enable_gqa: bool
    dropout_seed: Tensor | None
    sink: Tensor | None

    @property
    def own_lengths(self) -> tuple[int, int]:
        """Of the rank's queries and keys."""
        return self.tensors["query"].shape[2], self.tensors["key"].shape[2]

    def describe(self) -> Description:
        """All that the ranks must have in common. Lengths along the sequence are theirs."""
        kind = self.tensors["query"].device.type
        autocast = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else None
        described = {name: repr(number) for name, number in self.numbers.items()}
        described |= {
            "enable_gqa": str(self.enable_gqa),
            "pattern": in_words(self.pattern),
            "autocast": str(autocast),
            "dropout_seed": "None" if self.dropout_seed is None else "a tensor",
        }
        for name, tensor in self.tensors.items():
            batch, heads, _, size = tensor.shape
            described[f"{name} (batch, heads, size, dtype)"] = f"{batch, heads, size, tensor.dtype}"
            described[f"gradient of {name}"] = _gradient(tensor)
        for name, mask in self.masks.items():
            described[name] = "None" if mask is None else "a tensor"
        for name, (table, kind_of_table) in {**self.tables, "sink": (self.sink, DENSE)}.items():
            described[name] = "None"
            if table is not None:
                own_rows = name != "sink" and kind_of_table in (SLOTS, DENSE)
                shape = [n for i, n in enumerate(table.shape) if not (own_rows and i == 2)]
                described[name] = f"a table of kind {kind_of_table}, {shape}, {table.dtype}"
                described[f"gradient of {name}"] = _gradient(table)
        return described

    def options(self) -> dict[str, Any]:
        """Those of the op that are given and the same for all its calls."""
        given: dict[str, Any] = dict(self.numbers)
        for name, (table, kind) in self.tables.items():
            given |= {name: table, f"{name}_kind": None if table is None else kind}
        given["enable_gqa"] = self.enable_gqa
        return {name: value for name, value in given.items() if value is not None}


def read_arguments(
    pattern: Pattern,
    tensors: dict[str, Tensor],
    masks: dict[str, Tensor | None],
    tables: dict[str, Tensor | SlotBias | BlockBias | None],
    numbers: dict[str, float | None],
    enable_gqa: bool,
    dropout_seed: Tensor | None,
    sink: Tensor | None,
) -> Arguments:
    """Raise TypeError or ValueError for what one rank can see to be wrong."""
    check_pattern(pattern)
    bare = {name: getattr(table, "table", table) for name, table in tables.items()}
    for name, table in bare.items():
        _check_local(name, table)
    _check_tensors(tensors, {**masks, "dropout_seed": dropout_seed, "sink": sink})
    check_numbers(**numbers)
    check_flag("enable_gqa", enable_gqa)
    query, key, value = tensors.values()
    if value.shape[2] != key.shape[2]:
        raise ValueError(
            f"sparse_attn: expected value with key's {key.shape[2]} tokens, got {value.shape[2]}"
        )
    for name, mask in masks.items():
        if mask is not None:
            check_padding(mask, key, name)
    encoded = {name: encode_table(name, table, pattern) for name, table in tables.items()}
    for name, (table, kind) in encoded.items():
        if table is None:
            continue
        rows = {SLOTS: (1, query.shape[2]), DENSE: (query.shape[2],)}.get(kind)
        if rows is not None and table.shape[2] not in rows:
            raise ValueError(
                f"sparse_attn: expected {name} with a row for each of the rank's {query.shape[2]} "
                f"queries, got {table.shape[2]}"
            )
    with_places = {**tensors, **bare, "dropout_seed": dropout_seed, "sink": sink}
    for name, tensor in with_places.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(
                f"sparse_attn: expected {name} on device {query.device}, got {tensor.device}"
            )
    given = {name: None if x is None else float(x) for name, x in numbers.items()}
    return Arguments(pattern, tensors, masks, encoded, given, enable_gqa, dropout_seed, sink)


def group_of(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """The ranks that a call is for; raises TypeError or ValueError if there are none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "sparse_attn: expected an initialized process group, got none: call "
            "torch.distributed.init_process_group first"
        )
    from torch.distributed.device_mesh import DeviceMesh  # not there without torch.distributed

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "sparse_attn: expected group to be a DeviceMesh of one dimension, such as "
                f"mesh['cp'], got one of {group.ndim}"
            )
        group = group.get_group()
    if group is None:
        return dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "sparse_attn: expected group to be one that this process is in, got one without it"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "sparse_attn: expected group to be a ProcessGroup or a DeviceMesh, got "
            f"{type(group).__name__}"
        )
    return group


def lengths_of(
    lengths: Sequence[int] | Sequence[tuple[int, int]], ranks: int
) -> tuple[tuple[int, int], ...]:
    """(queries, keys) of each rank. Raises ValueError unless there are two for each, or one."""
    given = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    try:
        pairs = tuple(
            tuple(map(operator.index, n)) if isinstance(n, Iterable) else (operator.index(n),) * 2
            for n in given
        )
    except TypeError:
        pairs = ()
    if len(pairs) != ranks or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(
            "sparse_attn: expected lengths to be an int or (queries, keys) for each of the "
            f"{ranks} ranks, got {lengths!r}"
        )
    return pairs


def _gradient(tensor: Tensor) -> str:
    return str(torch.is_grad_enabled() and tensor.requires_grad)


def check_tensor(name: str, tensor: object) -> None:
    """Raise TypeError unless it is a Tensor, and the rank's own."""
    _check_local(name, tensor)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"sparse_attn: expected {name} to be a Tensor, got {type(tensor).__name__}")


def _check_local(name: str, tensor: object) -> None:
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"sparse_attn: expected {name} to be the rank's own shard, got a DTensor: pass "
            f"{name}.to_local(), sharded along the sequence"
        )


def _check_tensors(required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    for name, tensor in {**required, **optional}.items():
        if tensor is not None or name in required:
            check_tensor(name, tensor)
    for name, tensor in required.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"sparse_attn: expected {name} of shape (batch, heads, length, size), 4 "
                f"dimensions, got shape {list(tensor.shape)}"
            )
