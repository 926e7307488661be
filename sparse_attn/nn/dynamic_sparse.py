"""Self-attention whose pairs or gates are made of the content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparse_attn.functional import choose_blocks, dynamic_attention
from sparse_attn.functional.block_selection import _check_keep
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns import BlockLayout, Pattern
from sparse_attn.patterns.arguments import index
from sparse_attn.tables import BlockBias


class DynamicSparseSelfAttention(ProjectedSelfAttention):
    """Multi-head attention over the pairs, or with the gate, that are made of the content at each
    call: by a function or module of yours, or by choosing blocks of keys.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        generate: Called as `generate(query, key, value)`, each (batch, heads, length, head_dim). It
            returns a gate, a bool mask, a `BlockLayout` or another `Pattern`, or a `BlockBias`, as
            for `sparse_attn.functional.dynamic_attention`. If it is a module, its parameters are
            this module's; gradients reach them through a gate.
        keep: Instead of `generate`: how many blocks of keys each block of queries keeps, or, as a
            float in (0, 1], which share of those that it may see. They are the ones whose mean keys
            have the largest products with the block's queries
            (`sparse_attn.functional.choose_blocks`). The same pairs serve all gradients: the choice
            itself has none.
        block: Tokens of a block, with `keep`.
        **options: dropout, bias, causal, device, dtype, as for `SparseSelfAttention`.

    Raises:
        TypeError: An argument has the wrong type, both of generate and keep are given, or neither.
        ValueError: An argument is out of range.

    >>> layer = DynamicSparseSelfAttention(64, 4, keep=2, block=16)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    >>> class Gate(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.of_key = torch.nn.Linear(16, 1)
    ...     def forward(self, query, key, value):
    ...         return torch.sigmoid(self.of_key(key)).mT
    >>> layer = DynamicSparseSelfAttention(64, 4, generate=Gate())
    >>> layer(torch.randn(2, 100, 64)).sum().backward()
    >>> layer.generate.of_key.weight.grad.shape
    torch.Size([1, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        generate: Callable[[Tensor, Tensor, Tensor], Tensor | Pattern | BlockBias] | None = None,
        keep: int | float | None = None,
        block: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if (generate is None) == (keep is None):
            given = "neither" if keep is None else "both"
            raise TypeError(f"sparse_attn: expected one of generate and keep, got {given}")
        if generate is not None and not callable(generate):
            raise TypeError(f"sparse_attn: expected generate to be callable, got {generate!r}")
        self.generate = generate
        self.keep = keep
        self.block = index("block", block, 1)
        if keep is not None:
            _check_keep(keep)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`dynamic_attention`."""

        def chosen(query: Tensor, key: Tensor, value: Tensor) -> BlockLayout:
            return choose_blocks(
                query,
                key,
                block=self.block,
                keep=self.keep,
                is_causal=self.causal,
                key_padding_mask=key_padding_mask,
            )

        return dynamic_attention(
            query,
            key,
            value,
            chosen if self.generate is None else self.generate,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def extra_repr(self) -> str:
        """What chooses, in `print(module)`."""
        how = f", keep={self.keep}, block={self.block}" if self.generate is None else ""
        return f"{self.embed_dim}, {self.num_heads}{how}"
