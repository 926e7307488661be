"""Matrix products over the length of a sequence, whose bits do not depend on the threads.

A library that sums along a length of thousands cuts the sum where its threads meet, so that longer
sums are cut here. Up to 768 terms MKL was seen to give the same bits for 1 to 8 threads, unless the
second matrix is stored by columns. Gradients are products of the same kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 512

_one_at_a_time = Lock()


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, (…, length, m) and (…, length, n) to (…, m, n)."""
    return _SumOfProducts.apply(a, b)


def gram(x: Tensor) -> Tensor:
    """xᵀ x."""
    return sum_of_products(x, x.view_as(x))  # torch.compile wants two tensors


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, (…, length, m) and (…, m, n) of few m, to (…, length, n)."""
    return _Times.apply(x, matrix.expand(*x.shape[:-2], *matrix.shape[-2:]))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, however many columns a has."""
    return _SumOfProducts.apply(a.mT, b)


class _SumOfProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return (_chunked(a).mT @ _chunked(b).contiguous()).sum(-3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return times(b, grad.mT), times(a, grad)


class _Times(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, matrix = ctx.saved_tensors
        return times(grad, matrix.mT), sum_of_products(x, grad)


def _chunked(x: Tensor) -> Tensor:
    """(…, length, size) as (…, chunks, rows of a chunk, size), with zeros behind the end."""
    length = x.shape[-2]
    rows = min(CHUNK, max(length, 1))
    chunks = -(-length // rows)
    if length % rows:
        x = pad(x, (0, 0, 0, chunks * rows - length))
    return x.unflatten(-2, (chunks, rows))


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
