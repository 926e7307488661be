"""The methods beyond fixed patterns, here and in the packages that they are known from."""

from collections.abc import Callable

import torch
from torch import Tensor

OURS = "sparse_attn"

#: A computation, and the leaves whose gradients its backward pass makes.
Call = tuple[Callable[[], Tensor], list[Tensor]]

#: By who computes it.
Calls = dict[str, Call]


def leaf(seed: int, *shape: int) -> Tensor:
    """Normal numbers that want a gradient, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, requires_grad=True)


def leaves(args) -> list[Tensor]:
    """Query, key and value, (batch, heads, length, head_dim)."""
    shape = (args.batch, args.heads, args.length, args.head_dim)
    return [leaf(args.seed + i, *shape) for i in range(3)]


def check_equal(calls: Calls, tolerance: float) -> None:
    """Raises unless all compute the same, to a share of the norm."""
    with torch.no_grad():
        ours = calls[OURS][0]()
        for name, (call, _) in calls.items():
            error = ((call() - ours).norm() / ours.norm()).item()
            if not error <= tolerance:
                raise AssertionError(f"{name} differs by {error:.1e} of the norm")
