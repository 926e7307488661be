"""The definitions of linear attention and Performer: every pair, or every sum, written out."""

import cases
import torch
from torch import Tensor


def allowed(query: Tensor, key: Tensor, padding: Tensor | None, is_causal: bool) -> Tensor:
    """(batch, 1, n_q, n_k) bool; one row for all unless causal."""
    n_q, n_k = query.shape[2], key.shape[2]
    rows = n_q if is_causal else 1
    pairs = torch.ones(len(query), 1, rows, n_k, dtype=torch.bool, device=query.device)
    if is_causal:
        pairs = pairs.tril(n_k - n_q)
    return pairs if padding is None else pairs & ~padding[:, None, None, :]


def by_pairs(of_query: Tensor, of_key: Tensor, value: Tensor, eps: float) -> Tensor:
    """Values by weights, divided by the sum of the weights and eps."""
    weights = (of_query.unsqueeze(3) * of_key).sum(-1)
    total = weights.sum(-1, keepdim=True) + eps
    return weights @ value / total.masked_fill(total == 0, 1)


def by_sums(of_query: Tensor, of_key: Tensor, value: Tensor, eps: float) -> Tensor:
    """The same in the order that linear attention is named for."""
    values = torch.einsum("bhijm,bhjd->bhimd", of_key, value)
    total = torch.einsum("bhim,bhim->bhi", of_query, of_key.sum(3)).unsqueeze(-1) + eps
    return torch.einsum("bhim,bhimd->bhid", of_query, values) / total.masked_fill(total == 0, 1)


def causal_products(query: Tensor, key: Tensor, value: Tensor, reverse: bool = False) -> Tensor:
    offset = key.shape[2] - query.shape[2]
    scores = query @ key.mT
    return (scores.triu(offset) if reverse else scores.tril(offset)) @ value


def linear(
    query, key, value, feature_map=None, eps=1e-6, padding=None, is_causal=False, form=by_pairs
):
    phi = feature_map or (lambda x: torch.nn.functional.elu(x) + 1)
    pairs = allowed(query, key, padding, is_causal)
    return form(phi(query), phi(key).unsqueeze(2) * pairs.unsqueeze(-1), value, eps)


def performer(
    query, key, value, projection, scale, eps=1e-4, padding=None, is_causal=False, form=by_pairs
):
    """The reference of a row's keys is the largest product of those that it sees."""
    count = projection.shape[-2]
    products = [x @ (projection * scale**0.5).mT for x in (query, key)]
    norms = [x.square().sum(-1, keepdim=True) * scale / 2 for x in (query, key)]
    pairs = allowed(query, key, padding, is_causal)
    largest = products[1].amax(-1).unsqueeze(2).masked_fill(~pairs, -torch.inf).amax(-1)
    largest = largest.masked_fill(largest == -torch.inf, 0)[..., None, None]  # (B, H, n_q, 1, 1)
    of_query = products[0] - norms[0] - products[0].amax(-1, keepdim=True)
    of_query = (of_query.exp() + eps) / count**0.5
    exponents = (products[1] - norms[1]).unsqueeze(2) - largest
    exponents = exponents.masked_fill(~pairs.unsqueeze(-1), 0)
    of_key = (exponents.exp() + eps) / count**0.5  # (B, H, n_q, n_k, m)
    return form(of_query, of_key * pairs.unsqueeze(-1), value, 0)


def check(ours, definitions, tensors: list[Tensor], budget: float = 2.0) -> None:
    """Hold outputs and gradients to `budget` times the error that the definition has in the dtype,
    in the worst of its forms, all against float64."""
    dtype = tensors[0].dtype
    leaves = [x.double().requires_grad_() for x in tensors]
    exact = definitions[0](*leaves)
    grad = cases.normal(*exact.shape, seed=5)
    expected = [exact, *torch.autograd.grad(exact, leaves, grad)]
    results = []
    for function in (ours, *definitions):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = function(*leaves)
        assert output.dtype == dtype
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(dtype))])
    names = ("output", "query", "key", "value")
    for name, truth, own, *others in zip(names, expected, *results, strict=True):
        assert own.shape == truth.shape, name
        assert own.isfinite().all(), name
        error, *theirs = ((x.double() - truth).abs().max().item() for x in (own, *others))
        least = torch.finfo(dtype).eps * truth.abs().max().item()
        if dtype == torch.float64:  # what is held to be exact has such errors itself
            least *= 1000
        assert error <= budget * max(*theirs, least), (name, error, theirs, least)
