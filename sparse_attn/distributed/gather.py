"""All of a sharded tensor, for what needs it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn._uncompiled import uncompiled
from sparse_attn.distributed.agreement import agree
from sparse_attn.distributed.arguments import check_tensor, group_of, lengths_of
from sparse_attn.distributed.exchange import Chain
from sparse_attn.distributed.routes import Route
from sparse_attn.patterns.arguments import index

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@uncompiled
def gather_sequence(
    x: Tensor,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    dim: int = 2,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The whole of a tensor that is sharded along a dimension, on every rank; differentiable.

    For what cannot do with less than all keys, such as attention whose buckets or clusters take
    tokens by their content: gather query, key and value, attend (`functional.lsh_attention`,
    `routing_attention`), and keep the rank's own rows. A rank receives all rows of the others, and
    backward their gradients for its own.

    Args:
        x: The rank's shard, of any shape; shards may differ in their length, or be empty.
        group: As in `context_parallel_attention`.
        dim: The dimension that is sharded.
        lengths: The length of each rank's shard; if None, the ranks tell each other.

    Returns:
        The shards behind each other, in the order of the ranks.

    Raises:
        TypeError: x is no Tensor, or a DTensor.
        ValueError: dim does not exist, or the ranks' shapes do not fit.
        RuntimeError: torch.distributed failed.

    >>> import os, tempfile
    >>> import torch.distributed as dist
    >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> gather_sequence(torch.arange(6.0).view(2, 3), dim=1)
    tensor([[0., 1., 2.],
            [3., 4., 5.]])
    >>> dist.destroy_process_group()
    """
    group = group_of(group)
    check_tensor("x", x)
    dim = index("dim", dim, -x.dim(), x.dim() - 1)
    by_token = x.movedim(dim, 0)
    rest = by_token.shape[1:]
    shape = f"{tuple(rest)}, {x.dtype}, gradient {torch.is_grad_enabled() and x.requires_grad}"
    known = None if lengths is None else lengths_of(lengths, dist.get_world_size(group))
    agreement = agree(group, {"shard to gather": shape}, (x.shape[dim],) * 2, known)
    agreement.accept()
    route, own = _route(agreement.shards.keys, dist.get_rank(group))
    rows = by_token.reshape(1, 1, x.shape[dim], rest.numel())
    chain = Chain(group, rows)
    (others,) = chain.receive(chain.send(route.on(x.device), rows))
    (whole,) = chain.end(others.index_copy(2, own.to(x.device), rows))
    return whole.reshape(whole.shape[2], *rest).movedim(0, dim)


def _route(lengths: Sequence[int], rank: int) -> tuple[Route, Tensor]:
    """All rows to all ranks; and where the rank's own ones stand."""
    tokens = torch.arange(sum(lengths)).split(list(lengths))
    own, none = tokens[rank], torch.arange(0)
    received = tuple(none if r == rank else tokens[r] for r in range(len(lengths)))
    sent = tuple(none if r == rank else own - own[:1].sum() for r in range(len(lengths)))
    sent_tokens = tuple(none if r == rank else own for r in range(len(lengths)))
    return Route("rows", sent, received, sum(lengths), received, sent_tokens), own
