"""Self-attention to keys that are chosen by their logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_attn.functional.selected import (
    check_thresholds,
    threshold_attention,
    topk_attention,
)
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns.arguments import index


class TopKSelfAttention(ProjectedSelfAttention):
    """Multi-head attention of each token to the k keys with the largest logits, with projections of
    query, key, value and output: `sparse_attn.functional.topk_attention`.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        k: Keys of a query, at least 1.
        **options: dropout, bias, causal, device and dtype, as of `ProjectedSelfAttention`.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: embed_dim is not a multiple of num_heads, or an argument is out of range.

    >>> import torch
    >>> layer = TopKSelfAttention(64, 4, k=8, causal=True)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, k: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.k = index("k", k, 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        return topk_attention(
            query,
            key,
            value,
            self.k,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def extra_repr(self) -> str:
        """The sizes, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, k={self.k}"


class ThresholdSelfAttention(ProjectedSelfAttention):
    """Multi-head attention of each token to the keys whose weight, or whose logit, reaches a
    threshold, with projections of query, key, value and output:
    `sparse_attn.functional.threshold_attention`.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        threshold: A weight in [0, 1]; or
        score_threshold: a logit. Just one of both.
        **options: dropout, bias, causal, device and dtype, as of `ProjectedSelfAttention`.

    Raises:
        TypeError: A number is expected and something else given.
        ValueError: embed_dim is not a multiple of num_heads, an argument is out of range, or not
            just one threshold is given.

    >>> import torch
    >>> layer = ThresholdSelfAttention(64, 4, threshold=0.02)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        threshold: float | None = None,
        score_threshold: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_thresholds(threshold, score_threshold)
        self.threshold = threshold
        self.score_threshold = score_threshold

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        return threshold_attention(
            query,
            key,
            value,
            self.threshold,
            score_threshold=self.score_threshold,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def extra_repr(self) -> str:
        """The sizes, in `print(module)`."""
        name = "threshold" if self.score_threshold is None else "score_threshold"
        return f"{self.embed_dim}, {self.num_heads}, {name}={getattr(self, name)}"
