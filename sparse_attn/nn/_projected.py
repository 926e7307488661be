"""What the self-attention layers share: the projections around an attention over heads."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sparse_attn.functional._common import check_dtype, check_flag, check_padding
from sparse_attn.functional._gather import finite_where
from sparse_attn.nn._checks import (
    check_dropout,
    check_heads,
    check_sequence,
    through,
)


class ProjectedSelfAttention(nn.Module):
    """Projections of query, key, value and output around `attend`, which a layer defines.

    `projections` names what `attend` takes, each by a projection of that name.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        causal: Whether a token sees only itself and what stands before it.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    projections: ClassVar[tuple[str, ...]] = ("query", "key", "value")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        check_flag("bias", bias)
        check_flag("causal", causal)
        check_dtype(dtype)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal
        for name in (*self.projections, "output"):
            projection = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            self.add_module(name, projection)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Attention over heads: (batch, heads, length, head_dim) each, and of the result."""
        raise NotImplementedError

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, length, embed_dim).
            key_padding_mask: (batch, length) bool, True = ignore this key. NaN and infinity in
                these tokens count as 0.

        Returns:
            (batch, length, embed_dim). A query that sees no key gets the bias of the output
            projection.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape or device does not fit.
        """
        check_sequence("x", x, self.embed_dim)
        if key_padding_mask is not None:
            by_head = x.unsqueeze(1)
            check_padding(key_padding_mask, by_head)
            # Weights meet what padded tokens hold, if only in products with gradients of 0.
            x = finite_where(key_padding_mask, by_head).squeeze(1)
        projected = [self._split(through(getattr(self, name), "x", x)) for name in self.projections]
        heads = self.attend(*projected, key_padding_mask)
        return self.output(heads.transpose(1, 2).flatten(2))

    @property
    def dropout_p(self) -> float:
        """The dropout that holds now: none in evaluation."""
        return self.dropout if self.training else 0.0

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) to (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
