"""Reformer's attention layer (Kitaev et al. 2020, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attn.functional.chunked import chunked_lsh_attention, default_buckets
from sparse_attn.functional.hashing import bucket_factors
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns.arguments import index


class ReformerSelfAttention(ProjectedSelfAttention):
    """Multi-head attention of tokens to those that hashing puts near them: `chunked_lsh_attention`
    between a projection that queries and keys share, one of values, and one of the output.

    The numbers are those of LSHSelfAttention in transformers, with its `query_key` and `value`, and
    of ReformerSelfOutput's `dense` as `output`; there, a sequence is filled up to a multiple of the
    chunk by the model, here by the layer.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        num_buckets: Buckets of a round, even, or a list of their factors; None chooses for each
            length as `chunked_lsh_attention` does.
        num_hashes: Rounds of hashing.
        chunk_length: Tokens of a chunk.
        chunks_before: Chunks before its own that a token sees.
        chunks_after: Chunks behind it.
        seed: Of the random rotations: an int gives the same ones at every call; a torch.Generator
            goes on from where it stands; None takes torch's own, new ones at every call.
        max_length: With `num_buckets=None`, the `max_position_embeddings` of a model of
            transformers, on which depends from where on buckets are factorised.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        causal: Whether a token sees only what stands before it, and itself if that is nothing.
            Which of these a chunk holds depends on all tokens, as in the paper: what follows a
            token may still change what it gets.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: embed_dim is not a multiple of num_heads, or an argument is out of range.

    >>> layer = ReformerSelfAttention(64, 4, num_buckets=8, num_hashes=2, chunk_length=16)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    projections: ClassVar[tuple[str, ...]] = ("query_key", "value")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_buckets: int | Sequence[int] | None = None,
        num_hashes: int = 1,
        chunk_length: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        seed: int | torch.Generator | None = 0,
        max_length: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
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
        if num_buckets is not None:
            bucket_factors(num_buckets)
        num_hashes = index("num_hashes", num_hashes, 1)
        chunk_length = index("chunk_length", chunk_length, 1)
        chunks_before = index("chunks_before", chunks_before, 0)
        chunks_after = index("chunks_after", chunks_after, 0)
        self.num_buckets = num_buckets
        self.num_hashes = num_hashes
        self.chunk_length = chunk_length
        self.chunks_before = chunks_before
        self.chunks_after = chunks_after
        self.seed = seed
        self.max_length = None if max_length is None else index("max_length", max_length, 1)

    def attend(self, query_key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Attention over heads: (batch, heads, length, head_dim) each, and of the result."""
        num_buckets = self.num_buckets
        if num_buckets is None:
            num_buckets = default_buckets(value.shape[2], self.chunk_length, self.max_length)
        return chunked_lsh_attention(
            query_key,
            value,
            num_buckets=num_buckets,
            num_hashes=self.num_hashes,
            chunk_length=self.chunk_length,
            chunks_before=self.chunks_before,
            chunks_after=self.chunks_after,
            seed=self.seed,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, num_buckets={self.num_buckets}, "
            f"num_hashes={self.num_hashes}, chunk_length={self.chunk_length}, causal={self.causal}"
        )
