"""What a model looks at: numbers from the attention weights of its layers, in linear memory."""

from collections.abc import Sequence

import torch

import sparse_attn
from long_text.model import ByteModel
from sparse_attn import SparseWeights


@torch.no_grad()
def layer_weights(model: ByteModel, tokens: torch.Tensor) -> list[SparseWeights]:
    """The weights of each layer on a text of n bytes."""
    turns = model.turns(0, len(tokens), tokens.device)
    x, layers = model.embedding(tokens[None], tokens.new_zeros(1, 2)), []
    for number, block in enumerate(model.blocks):
        heads = block.query_key_value(block.norm1(x), turns)
        pattern = model.config.pattern(number)
        layers.append(sparse_attn.attention(*heads, pattern, return_weights=True)[1])
        x = block(x, turns)
    return layers


def pairs_of(weights: SparseWeights) -> tuple[torch.Tensor, ...]:
    """Head, query, key and weight of each pair, flat."""
    _, heads, n, _ = weights.shape
    counts = weights.crow_indices.diff().flatten()
    row = torch.repeat_interleave(torch.arange(heads * n), counts)
    return row // n, row % n, weights.col_indices, weights.values


def stretch(weights: SparseWeights, start: int, stop: int) -> torch.Tensor:
    """The dense weights (heads, stop − start, stop − start) among the bytes of a stretch."""
    head, query, key, value = pairs_of(weights)
    inside = (query >= start) & (query < stop) & (key >= start) & (key < stop)
    size = stop - start
    place = (head * size + query - start) * size + key - start
    dense = value.new_zeros(weights.shape[1] * size * size)
    return dense.scatter(0, place[inside], value[inside]).view(-1, size, size)


def distance_profile(weights: SparseWeights, skipped: int = 0) -> torch.Tensor:
    """(heads, n): the mean weight of the pairs at each distance to the left; NaN if there are none.

    The first `skipped` keys, which are global, are left out.
    """
    _, heads, n, _ = weights.shape
    head, query, key, value = pairs_of(weights)
    place = (head * n + query - key)[key >= skipped]
    sums = torch.bincount(place, value[key >= skipped], minlength=heads * n)
    return (sums / torch.bincount(place, minlength=heads * n)).view(heads, n)


def share_of_first(weights: SparseWeights, count: int) -> torch.Tensor:
    """(heads,): how much of its weight a query pays to the first `count` keys, on average."""
    _, heads, n, _ = weights.shape
    head, _, key, value = pairs_of(weights)
    return torch.bincount(head[key < count], value[key < count], minlength=heads) / n


def rollout(layers: Sequence[SparseWeights], queries: Sequence[int]) -> torch.Tensor:
    """Where the queries' information comes from: rows of attention rollout, (queries, n).

    Abnar and Zuidema 2020, section 3: the product over the layers of (A + I) / 2, where A is the
    mean of the heads and I the residual connection. Only the rows asked for are multiplied, from
    the top layer down, each time by a sparse matrix.
    """
    _, heads, n, _ = layers[0].shape
    rows = torch.zeros(n, len(queries))
    rows[list(queries), range(len(queries))] = 1
    for weights in reversed(layers):
        spread = rows.expand(1, heads, n, len(queries))
        rows = (weights.transposed_matmul(spread).mean(1)[0] + rows) / 2
    return rows.T
