"""Matrix products over the length of a sequence, whose bits do not depend on the threads.

A library that sums along a length of thousands cuts the sum where its threads meet. Up to 768 terms
MKL was seen to give the same bits for 1 to 8 threads, so that longer sums are cut here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 512

_one_at_a_time = Lock()


def chunked(x: Tensor) -> Tensor:
    """(…, length, size) as (…, chunks, rows of a chunk, size), with zeros behind the end."""
    length = x.shape[-2]
    rows = min(CHUNK, max(length, 1))
    chunks = -(-length // rows)
    if length % rows:
        x = pad(x, (0, 0, 0, chunks * rows - length))
    return x.unflatten(-2, (chunks, rows))


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, (…, length, m) and (…, length, n) to (…, m, n)."""
    return (chunked(a).mT @ chunked(b)).sum(-3)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, however many columns a has."""
    return sum_of_products(a.mT, b)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, (…, length, m) and (…, m, n), whose gradient for the matrix is such a sum."""
    return (chunked(x) @ matrix.unsqueeze(-3)).flatten(-3, -2)[..., : x.shape[-2], :]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """A decomposition on the CPU whose bits would depend on the threads, as from size 100 on.

    Compiled graphs leave the threads alone.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield
        return
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
