"""Multi-head attention over any pattern."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_attn.functional import attention
from sparse_attn.functional._common import check_dtype, check_flag
from sparse_attn.nn._checks import check_dropout, check_heads, check_sequence, through
from sparse_attn.nn._redraw import check_random, redrawn_attention
from sparse_attn.patterns import Causal, Pattern, check_pattern


class SparseSelfAttention(nn.Module):
    """Multi-head attention over the pairs that a pattern allows, with projections of query, key,
    value and output.

    It is the attention of `SparseTransformerBlock`. Use `causal=True`, or a causal pattern, where a
    token must not see what follows it.

    Args:
        embed_dim: Channels of query, key, value and output.
        num_heads: Number of heads; divides embed_dim.
        pattern: Who sees whom; a `PerHead` for heads that differ. It is no parameter: tensors that
            it holds (`BlockLayout`) stay on their device.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        causal: Intersect the pattern with `Causal()`.
        redraw: Draw the random parts of the pattern (`RandomTokens`, `RandomBlocks`, `BigBird`)
            anew at every call, in training and in evaluation, for each example and head apart.
            Otherwise their seeds decide, once for all. The draw follows `torch.manual_seed`; it is
            made on the host, so that `torch.compile` breaks its graph there. Layouts and masks in
            the pattern must be the same for all examples and heads.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: pattern is not a Pattern.
        ValueError: embed_dim is not a multiple of num_heads, dropout is out of range, or redraw is
            set and nothing in pattern is random.

    >>> from sparse_attn import Global, Window
    >>> layer = SparseSelfAttention(64, 4, pattern=Window(16) | Global([0]))
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pattern: Pattern,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        redraw: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        check_pattern(pattern)
        for name, flag in (("bias", bias), ("causal", causal), ("redraw", redraw)):
            check_flag(name, flag)
        check_dtype(dtype)
        if redraw:
            check_random(pattern)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.redraw = redraw
        self.pattern = pattern & Causal() if causal and not pattern.causal else pattern
        for name in ("query", "key", "value", "output"):
            projection = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            self.add_module(name, projection)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: `module(x)` from x to itself, `module(query, key, value)` from one to another.

        Args:
            query: (batch, n_q, embed_dim).
            key: (batch, n_k, embed_dim); query if None. With n_q ≠ n_k the ends are aligned.
            value: (batch, n_k, embed_dim), given if and only if key is.
            key_padding_mask: (batch, n_k) bool, True = ignore this key.

        Returns:
            (batch, n_q, embed_dim). A query that sees no key gets the bias of the output
            projection.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape does not fit, or only one of key and value is given.
        """
        if key is None and value is None:
            key = value = query
        elif key is None or value is None:
            raise ValueError(
                "sparse_attn: expected key and value together or neither of them, got only "
                f"{'value' if key is None else 'key'}; give key_padding_mask by name"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_sequence(name, x, self.embed_dim)
        attend = redrawn_attention if self.redraw else attention
        heads = attend(
            self._split(through(self.query, "query", query)),
            self._split(through(self.key, "key", key)),
            self._split(through(self.value, "value", value)),
            self.pattern,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(heads.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The pattern, in `print(module)`."""
        redraw = ", redraw=True" if self.redraw else ""
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern}{redraw}"

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) to (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
