"""Whether all ranks make the same call: a checksum that they exchange, and what differs if not."""

from __future__ import annotations

import hashlib
import weakref
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn.distributed.exchange import named_error
from sparse_attn.distributed.shards import Shards
from sparse_attn.patterns import BlockLayout, KeyLists, Mask, Pattern

#: What a call is, in words: equal on all ranks, or it is an error.
Description = dict[str, str]


@dataclass(frozen=True)
class Agreement:
    """What the ranks found out about each other: their shards, and the first rank's number."""

    shards: Shards
    seed: Tensor


#: So many calls are remembered: masks made at run time are another call every time.
_MOST_COMPARED = 1024

#: The calls that the ranks of a group have compared.
_compared: weakref.WeakKeyDictionary[dist.ProcessGroup, set[str]] = weakref.WeakKeyDictionary()


def agree(
    group: dist.ProcessGroup,
    description: Description,
    own: tuple[int, int],
    lengths: tuple[tuple[int, int], ...] | None,
    seed: Tensor | None,
) -> Agreement:
    """Compares the call with those of the other ranks, and collects the lengths of the shards.

    With `lengths` the ranks know their shards: they compare a call once and exchange nothing
    afterwards, unless a seed is to be shared.

    Raises:
        ValueError: The calls differ, on every rank alike.
    """
    if lengths is not None:
        description = {**description, "lengths": str(lengths)}
    text = repr(sorted(description.items()))
    known = _compared.setdefault(group, set())
    if lengths is not None and seed is None and text in known:
        return Agreement(_shards(lengths), torch.zeros(()))
    rows = _gather(group, text, own, seed)
    if len(set(rows[:, 0].tolist())) > 1:
        _name_difference(group, description)
    found = tuple((n_q, n_k) for _, n_q, n_k, _ in rows.tolist())
    if lengths is not None and found != lengths:
        raise ValueError(
            "sparse_attn: expected lengths to be those of the ranks' shards, (queries, keys) "
            f"{list(found)}, got {list(lengths)}"
        )
    if len(known) >= _MOST_COMPARED:  # on all ranks in the same call
        known.clear()
    known.add(text)
    return Agreement(_shards(found), rows[0, 3])


def in_words(pattern: Pattern) -> str:
    """A pattern with checksums of its tensors: ranks derive from both what they send each other."""
    sums = [
        f"{tuple(t.shape)} with checksum {zlib.crc32(t.cpu().contiguous().numpy().tobytes())}"
        for t in _data_of(pattern)
    ]
    return f"{pattern!r} of {', '.join(sums)}" if sums else repr(pattern)


def _data_of(pattern: Pattern) -> list[Tensor]:
    parts = getattr(pattern, "parts", ()) or getattr(pattern, "patterns", ())
    if parts:
        return [tensor for part in parts for tensor in _data_of(part)]
    return list(pattern.tensors(0, 0)) if isinstance(pattern, (BlockLayout, KeyLists, Mask)) else []


def _shards(lengths: tuple[tuple[int, int], ...]) -> Shards:
    queries, keys = zip(*lengths, strict=True)
    return Shards(queries, keys)


def _gather(
    group: dist.ProcessGroup, text: str, own: tuple[int, int], seed: Tensor | None
) -> Tensor:
    """(ranks, 4): checksum, lengths of queries and keys, seed of each rank."""
    checksum = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    device = seed.device if seed is not None else _device_of(group)
    mine = torch.tensor([checksum, *own, 0], dtype=torch.int64, device=device)
    if seed is not None:
        mine[3] = seed
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with named_error("the checksum and the lengths of the shards of all ranks"):
        dist.all_gather(rows, mine, group=group)
    return torch.stack(rows)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _name_difference(group: dist.ProcessGroup, description: Description) -> None:
    """Raises what differs between the first rank and the first one that is unlike it."""
    all_of_them: list[Description] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(all_of_them, description, group=group)
    first = all_of_them[0]
    for rank, other in enumerate(all_of_them):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"sparse_attn: expected the same {name} on all ranks, got "
                    f"{first.get(name, 'none')} on rank 0 and {other.get(name, 'none')} on rank "
                    f"{rank}"
                )
