"""Routing Transformer's attention layer (Roy et al. 2021, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from sparse_attn.functional.clustered import routing_attention
from sparse_attn.nn._checks import check_number, check_sequence
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns.arguments import MOST, index


class RoutingSelfAttention(ProjectedSelfAttention):
    """Multi-head attention within clusters of queries and keys: `routing_attention` between
    projections of query, key, value and output, with centroids that follow the data.

    Centroids are the buffer `centroids`, (num_heads, num_clusters, head_dim) of norm 1: random
    directions at first, or those that `fit_centroids` finds. Each forward pass in training, unless
    under no_grad, moves a centroid towards the mean of the normalised queries and keys that are
    nearest to it, by 1 − decay; processes of torch.distributed add up their sums. It happens
    once the pass has used the old ones, so that activation checkpointing, which passes twice,
    must not contain this layer.

    After a pass in training `commitment_loss` holds `commitment` times the mean squared distance of
    normalised queries and keys to their nearest centroid; add it to the loss to draw them there.
    In evaluation it is 0.

    With `causal` a token sees only what stands before it, but which tokens a cluster takes depends
    on all of them, as in the paper.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        num_clusters: Clusters of each head.
        window: Queries and keys that a cluster takes. A token that no cluster takes gets the bias
            of the output projection: num_clusters · window is at least the length, as a rule.
        decay: How much of a centroid stays at each pass, in [0, 1].
        commitment: Factor of the commitment loss.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        causal: Whether a token sees only itself and what stands before it.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: embed_dim is not a multiple of num_heads, or an argument is out of range.

    >>> layer = RoutingSelfAttention(64, 4, num_clusters=5, window=20)
    >>> x = torch.randn(2, 100, 64)
    >>> loss = layer(x).square().mean() + layer.commitment_loss
    >>> loss.backward()
    """

    centroids: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_clusters: int,
        window: int,
        decay: float = 0.999,
        commitment: float = 1e-4,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        num_clusters = index("num_clusters", num_clusters, 1, MOST)
        window = index("window", window, 1, MOST)
        check_number("decay", decay, 0)
        check_number("commitment", commitment, 0)
        if decay > 1:
            raise ValueError(f"sparse_attn: expected decay in [0, 1], got {decay}")
        self.window = window
        self.decay = decay
        self.commitment = float(commitment)
        shape = (num_heads, num_clusters, embed_dim // num_heads)
        centroids = normalize(torch.randn(shape, device=device, dtype=dtype), dim=-1)
        self.register_buffer("centroids", centroids)
        self._loss: Tensor | None = None

    @property
    def commitment_loss(self) -> Tensor:
        """Of the last forward pass in training, times `commitment`; 0 after one in evaluation."""
        return self.centroids.new_zeros(()) if self._loss is None else self._loss

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Attention over heads: (batch, heads, length, head_dim) each, and of the result."""
        output = routing_attention(
            query,
            key,
            value,
            self.centroids,
            window=self.window,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            query_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )
        self._loss = None
        if self.training and torch.is_grad_enabled():
            units = _units(query, key, key_padding_mask)
            nearest = _nearest(units, self.centroids)
            self._loss = self.commitment * self._distance(units, nearest)
            self._move(units, nearest, self.decay)
        return output

    @torch.no_grad()
    def fit_centroids(
        self, x: Tensor, key_padding_mask: Tensor | None = None, iterations: int = 10
    ) -> None:
        """Find centroids by k-means over queries and keys, from tokens spread evenly over them.

        Args:
            x: (batch, length, embed_dim), a first batch; the same on all processes of
                torch.distributed or not: their sums are added up.
            key_padding_mask: (batch, length) bool, True = ignore this token.
            iterations: Of k-means.
        """
        check_sequence("x", x, self.embed_dim)
        iterations = index("iterations", iterations, 0)
        query, key = self._split(self.query(x)), self._split(self.key(x))
        units = _units(query, key, key_padding_mask)
        units = units[:, _present(units).any(0)]
        if units.shape[1] == 0:
            return
        clusters = self.centroids.shape[1]
        chosen = torch.linspace(0, units.shape[1] - 1, clusters, device=x.device).long()
        self.centroids.copy_(units[:, chosen])
        for _ in range(iterations):
            self._move(units, _nearest(units, self.centroids), 0.0)

    def _distance(self, units: Tensor, nearest: Tensor) -> Tensor:
        index = nearest[..., None].expand_as(units)
        present = _present(units)[..., None]
        centroids = self.centroids.to(units.dtype).gather(1, index) * present
        return (units - centroids).square().sum() / (present.sum() * units.shape[2]).clamp(min=1)

    @torch.no_grad()
    def _move(self, units: Tensor, nearest: Tensor, decay: float) -> None:
        """Towards the means of (heads, tokens, size); a centroid without tokens stays."""
        clusters = torch.arange(self.centroids.shape[1], device=units.device)
        members = (nearest[..., None] == clusters).to(units.dtype)
        sums = members.mT @ units.detach()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        old = self.centroids.to(units.dtype)
        moved = normalize(decay * old + (1 - decay) * normalize(sums, dim=-1), dim=-1)
        empty = sums.eq(0).all(-1, keepdim=True)
        self.centroids.copy_(torch.where(empty, old, moved))

    def __getstate__(self) -> dict[str, Any]:
        # The loss hangs on the graph of a pass, which is neither copied nor saved.
        return {**self.__dict__, "_loss": None}

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, num_clusters={self.centroids.shape[1]}, "
            f"window={self.window}, causal={self.causal}"
        )


def _units(query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
    """Queries and keys of all examples, with norm 1: (heads, tokens, size); hidden ones are 0."""
    both = torch.cat([query, key], 2)
    both = both.to(torch.promote_types(both.dtype, torch.float32))
    if hidden is not None:
        both = both.masked_fill(hidden.repeat(1, 2)[:, None, :, None], 0)
    return normalize(both.transpose(0, 1).flatten(1, 2), dim=-1)


def _present(units: Tensor) -> Tensor:
    return units.detach().ne(0).any(-1)


@torch.no_grad()
def _nearest(units: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of the largest dot product, (heads, tokens)."""
    return (units.detach() @ centroids.to(units.dtype).mT).argmax(-1)
