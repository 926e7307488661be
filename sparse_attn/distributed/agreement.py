"""Whether all ranks make the same call: a checksum that they exchange, and what differs if not."""

from __future__ import annotations

import hashlib
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn.distributed.exchange import named_error
from sparse_attn.distributed.shards import Shards
from sparse_attn.patterns import BlockLayout, KeyLists, Mask, Pattern
from sparse_attn.patterns.tensors import GeneratedLayout

#: (queries, keys) of each rank.
Lengths = tuple[tuple[int, int], ...]

#: What a call is, in words: equal on all ranks, or it is an error.
Description = dict[str, str]


@dataclass(frozen=True)
class Agreement:
    """What the ranks found out about each other: their shards, and the first rank's seed.

    With `is_new` they had no such call before, and make one again until it is accepted.
    """

    shards: Shards
    seed: Tensor
    is_new: bool
    _known: set[tuple[str, Lengths]]
    _call: tuple[str, Lengths]

    def accept(self) -> None:
        """The call is in order, on all ranks alike."""
        if len(self._known) >= _MOST_COMPARED:  # on all ranks in the same call
            self._known.clear()
        self._known.add(self._call)


#: So many calls are remembered: masks made at run time are another call every time.
_MOST_COMPARED = 1024

#: The calls that the ranks of a group have compared, with the lengths of their shards.
_compared: weakref.WeakKeyDictionary[dist.ProcessGroup, set[tuple[str, Lengths]]] = (
    weakref.WeakKeyDictionary()
)


def agree(
    group: dist.ProcessGroup,
    description: Description,
    own: tuple[int, int],
    lengths: Lengths | None = None,
    seed: Tensor | None = None,
    draws: bool = False,
) -> Agreement:
    """Compares the call with those of the other ranks, and collects the lengths of the shards.

    With `lengths` the ranks know their shards: they compare a call once and exchange nothing
    afterwards, unless they draw a seed.

    Args:
        group: The ranks.
        description: What must be the same on all of them.
        own: Lengths of the rank's queries and keys.
        lengths: Of all shards, if they are given.
        seed: Of dropout.
        draws: The seed is what this rank drew, and that of the first one holds; else all have the
            same.

    Raises:
        ValueError: The calls differ, on every rank alike; or the rank's shard has another length
            than the one that is given.
    """
    if lengths is not None:
        description = {**description, "lengths": str(lengths)}
    text = repr(sorted(description.items()))
    known = _compared.setdefault(group, set())
    if lengths is not None and not draws and (text, lengths) in known:
        rank = dist.get_rank(group)
        if own != lengths[rank]:
            raise ValueError(
                f"sparse_attn: expected the shard of rank {rank} to have the (queries, keys) that "
                f"lengths says, {lengths[rank]}, got {own}"
            )
        return Agreement(_shards(lengths), torch.zeros(()), False, known, (text, lengths))
    rows = _gather(group, text, own, seed)
    if len(set(rows[:, 0].tolist())) > 1:
        _name_difference(group, description)
    found = tuple((n_q, n_k) for _, n_q, n_k, _ in rows.tolist())
    if lengths is not None and found != lengths:
        raise ValueError(
            "sparse_attn: expected lengths to be those of the ranks' shards, (queries, keys) "
            f"{list(found)}, got {list(lengths)}"
        )
    if not draws and len(set(seeds := rows[:, 3].tolist())) > 1:
        raise ValueError(f"sparse_attn: expected the same dropout_seed on all ranks, got {seeds}")
    call = (text, found)
    return Agreement(_shards(found), rows[0, 3], call not in known, known, call)


def in_words(pattern: Pattern) -> str:
    """A pattern with checksums of its tensors: ranks derive from both what they send each other."""
    sums = data_in_words(_data_of(pattern))
    return f"{pattern!r} of {sums}" if sums else repr(pattern)


def data_in_words(tensors: Sequence[Tensor]) -> str:
    """Shapes and checksums."""
    return ", ".join(
        f"{tuple(t.shape)} with checksum {zlib.crc32(t.cpu().contiguous().numpy().tobytes())}"
        for t in tensors
    )


def has_generated_data(pattern: Pattern) -> bool:
    """Whether some of its tensors are made for the length, which must be known first."""
    return any(isinstance(one, GeneratedLayout) for one in _elementary(pattern))


def _data_of(pattern: Pattern) -> list[Tensor]:
    held = (BlockLayout, KeyLists, Mask)
    parts = (one for one in _elementary(pattern) if isinstance(one, held))
    return [tensor for part in parts for tensor in part.tensors(0, 0)]


def _elementary(pattern: Pattern) -> Iterator[Pattern]:
    parts = getattr(pattern, "parts", ()) or getattr(pattern, "patterns", ())
    if not parts:
        yield pattern
    for part in parts:
        yield from _elementary(part)


def _shards(lengths: Lengths) -> Shards:
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
    with named_error("what the calls of all ranks are"):
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
