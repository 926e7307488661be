"""The Sparse Transformer's residual block (Child et al. 2019, sections 5.2, 5.4 and 6)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_attn.functional._common import check_dtype, check_flag
from sparse_attn.nn._checks import (
    check_dropout,
    check_heads,
    check_number,
    check_sequence,
    through,
)
from sparse_attn.nn.sparse_self_attention import SparseSelfAttention
from sparse_attn.patterns import Pattern
from sparse_attn.patterns.arguments import index


class SparseTransformerBlock(nn.Module):
    """A pre-activation residual block: H + a(H) + b(H), where

    a(H) = dropout(attention(norm(H))) and b(H) = dropout(ff(norm(H + a(H)))),

    with a feed-forward layer of two matrices and GELU between them (x · Φ(x), of which the paper's
    x · σ(1.702 x) is an approximation). Any pattern goes; the paper's are `Strided` and `Fixed`.

    Weights are drawn with mean 0 and standard deviation 0.125 / √d_in, and biases are 0 (section
    6). The two matrices that write to the residual stream, `attention.output` and `linear2`, are
    further scaled by 1 / √(2 · num_layers), so that the stream does not grow with depth. The rest
    of the paper's scheme belongs to the model around the blocks: embeddings with standard deviation
    0.125 / √embed_dim, a norm after the last block, and an output matrix of zeros.

    Args:
        embed_dim: Channels of the residual stream.
        num_heads: Number of heads; divides embed_dim.
        pattern: Who sees whom; a `PerHead` for heads that differ.
        num_layers: Blocks of the whole model, for the initialization.
        mlp_ratio: Channels between the two matrices of the feed-forward layer, as a multiple of
            embed_dim.
        recompute: In training, keep only the block's input for the backward pass and compute the
            rest again (section 5.4). The numbers stay the same, bit for bit, as long as the tensors
            of a pattern that holds some (`BlockLayout`) are not edited in between.
        dropout: Dropout at the end of each of the two residual branches, in training.
        bias: Whether the matrices and the norms have biases.
        causal: Intersect the pattern with `Causal()`.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: pattern is not a Pattern.
        ValueError: embed_dim is not a multiple of num_heads, or num_layers, mlp_ratio or dropout is
            out of range.

    >>> from sparse_attn import Window
    >>> blocks = [
    ...     SparseTransformerBlock(64, 4, pattern=Window(31, 0, dilation=d), num_layers=3)
    ...     for d in (1, 2, 4)
    ... ]
    >>> torch.nn.Sequential(*blocks)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pattern: Pattern,
        num_layers: int = 1,
        mlp_ratio: float = 4.0,
        recompute: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        check_flag("recompute", recompute)
        check_flag("bias", bias)
        check_dtype(dtype)
        check_number("mlp_ratio", mlp_ratio)
        num_layers = index("num_layers", num_layers, 1)
        if mlp_ratio * embed_dim < 1:
            raise ValueError(
                "sparse_attn: expected mlp_ratio to give at least 1 channel, got "
                f"{mlp_ratio} of {embed_dim}"
            )
        self.num_layers = num_layers
        self.recompute = recompute
        self.dropout = dropout
        made = {"bias": bias, "device": device, "dtype": dtype}
        hidden = round(mlp_ratio * embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim, **made)
        self.attention = SparseSelfAttention(
            embed_dim, num_heads, pattern=pattern, causal=causal, **made
        )
        self.norm2 = nn.LayerNorm(embed_dim, **made)
        self.linear1 = nn.Linear(embed_dim, hidden, **made)
        self.linear2 = nn.Linear(hidden, embed_dim, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        writing = (self.attention.output, self.linear2)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                depth = 2 * self.num_layers if module in writing else 1
                std = 0.125 / math.sqrt(module.in_features * depth)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Add both branches to the stream.

        Args:
            x: (batch, length, embed_dim).
            key_padding_mask: (batch, length) bool, True = ignore this key.

        Returns:
            (batch, length, embed_dim).

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape does not fit.
        """
        check_sequence("x", x, self.attention.embed_dim)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                self._add_branches,
                x,
                key_padding_mask,
                use_reentrant=False,
                preserve_rng_state=self.dropout > 0,  # nothing else here is random
            )
        return self._add_branches(x, key_padding_mask)

    def extra_repr(self) -> str:
        """What the parts do not show, in `print(module)`."""
        return f"num_layers={self.num_layers}, recompute={self.recompute}, dropout={self.dropout}"

    def _add_branches(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        x = x + self._drop(
            self.attention(through(self.norm1, "x", x), key_padding_mask=key_padding_mask)
        )
        return x + self._drop(self.linear2(F.gelu(self.linear1(self.norm2(x)))))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training)
