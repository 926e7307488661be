"""Functions of the leading eigenvalues of a symmetric matrix, differentiable where they repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_attn.functional._products import one_thread, product


def projector(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The projector P onto the `rank` leading eigenvectors, and these, V: P = V Vᵀ. Those of an
    eigenvalue of 0 are left out, as columns of 0.

    V, (…, n, rank), carries the gradient of whatever depends on V Vᵀ alone. It is right and finite
    where eigenvalues repeat among the leading ones or among the others. Where the two groups meet
    in one eigenvalue, P is not unique, and directions between the two get no gradient.
    """
    whole, vectors = _Spectral.apply(gram, rank, 0)[:2]
    return whole, product(whole, vectors)


def inverse(gram: Tensor, rank: int) -> Tensor:
    """Σ vᵢ vᵢᵀ / λᵢ over the `rank` largest eigenvalues, as far as they are not 0."""
    return _Spectral.apply(gram, rank, -1)[0]


class _Spectral(torch.autograd.Function):
    """Σ vᵢ f(λᵢ) vᵢᵀ, f(λ) = λ^power for the `rank` largest eigenvalues, as far as they are not 0
    to rounding, and 0 for the others.

    The derivative along dG has the entries vᵢᵀ dG vⱼ · (f(λᵢ) − f(λⱼ)) / (λᵢ − λⱼ) in the basis of
    the eigenvectors (Daleckii and Krein 1965; Bhatia, Matrix Analysis, theorem V.3.3). For power 0
    only pairs of a leading and another eigenvalue have one that is not 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, rank: int, power: int) -> tuple[Tensor, ...]:
        finite = gram.isfinite().all(-1).all(-1)[..., None, None]
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        with one_thread(gram.device):
            values, vectors = torch.linalg.eigh(torch.where(finite, gram, identity))
        values, vectors = values.flip(-1), torch.where(finite, vectors.flip(-1), torch.nan)
        factors = _factors(values, rank, power)
        whole = product(vectors * factors[..., None, :], vectors.mT)
        return whole, vectors[..., :rank], values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.rank, ctx.power = inputs
        ctx.save_for_backward(*output[2:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        values, vectors = ctx.saved_tensors
        inner = product(product(vectors.mT, (grad + grad.mT) / 2), vectors)
        inner = inner * _divided_differences(values, ctx.rank, ctx.power)
        return product(product(vectors, inner), vectors.mT), None, None


def _tolerance(values: Tensor) -> Tensor:
    """What rounding leaves of an eigenvalue of 0, or of the difference of two equal ones."""
    return values.shape[-1] * torch.finfo(values.dtype).eps * values[..., :1].abs()


def _factors(values: Tensor, rank: int, power: int) -> Tensor:
    """f of the eigenvalues, in descending order; eigenvalues of 0 stay 0."""
    kept = torch.arange(values.shape[-1], device=values.device) < rank
    kept = kept & (values > _tolerance(values))
    return torch.where(kept, torch.where(kept, values, 1) ** power, 0)


def _divided_differences(values: Tensor, rank: int, power: int) -> Tensor:
    factors = _factors(values, rank, power)
    gap = values[..., :, None] - values[..., None, :]
    kept = factors != 0
    across = kept[..., :, None] != kept[..., None, :]
    apart = across & (gap.abs() > _tolerance(values)[..., None])
    rise = factors[..., :, None] - factors[..., None, :]
    slope = torch.where(apart, rise / torch.where(apart, gap, 1), 0)
    # Among the kept, (1/λᵢ − 1/λⱼ) / (λᵢ − λⱼ) = −1 / (λᵢ λⱼ), also where they are equal.
    return slope if power == 0 else slope - factors[..., :, None] * factors[..., None, :]
