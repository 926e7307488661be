"""What the attention layers share: projections of query, key, value and output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_attn.nn._checks import check_dropout, check_heads


class ProjectedAttention(nn.Module):
    """Projections around the attention of the heads, `_heads`, which a layer defines."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        for name in ("query", "key", "value", "output"):
            projection = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            self.add_module(name, projection)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """(batch, n_q, embed_dim), from what is not projected yet."""
        heads = self._heads(
            self._split(self.query(query)),
            self._split(self.key(key)),
            self._split(self.value(value)),
            key_padding_mask,
        )
        return self.output(heads.transpose(1, 2).flatten(2))

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """All (batch, heads, length, head_dim)."""
        raise NotImplementedError

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) to (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
