"""Self-attention whose pattern is learned, as a gate on the products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn.functional import gated_attention
from sparse_attn.nn._checks import check_number
from sparse_attn.nn._gates import Blocks, Slots
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns import Causal, Pattern, check_pattern
from sparse_attn.patterns.arguments import index

KINDS = ("toeplitz", "slot", "block", "dense")


class LearnedSparseSelfAttention(ProjectedSelfAttention):
    """Multi-head attention with a learned gate over a pattern: softmax((Q Kᵀ ⊙ σ(P)) / √d) V.

    Train it with `sparsity_loss()` in the objective, and `harden()` gives the pattern of what
    stayed open, to run without the gate. A gate of 0 makes a logit 0 and does not exclude the key;
    the hard pattern does.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        pattern: Which pairs there are at all. "toeplitz" and "slot" take the slots of its one
            finite `Window` (for each head of a `PerHead`, all with the same number); pairs off
            the slots, such as those of global tokens, have a gate of 1.
        parametrisation: What P has a number for, in each head: "toeplitz", a slot of the window, P
            of shape (num_heads, slots), for any length; "slot", a query and a slot, (num_heads,
            seq_len, slots); "block", a block of queries and one of keys, (num_heads, blocks,
            blocks); "dense", a query and a key, (num_heads, seq_len, seq_len).
        seq_len: Largest length; shorter inputs take the first rows and columns. Needed but for
            "toeplitz", where it only tells `sparsity_loss` at which length to count pairs.
        block: Tokens of a block, for "block".
        initial: P at the start.
        **options: dropout, bias, causal, device, dtype, as for `SparseSelfAttention`.

    Attributes:
        gate_logits: P.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range or missing, or the pattern has no slots; in
            `forward`, the input is longer than seq_len.

    >>> layer = LearnedSparseSelfAttention(64, 4, pattern=Window(8) | Global([0]))
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    >>> layer.gate_logits.shape, round(layer.sparsity_loss().item(), 3)
    (torch.Size([4, 17]), 0.881)
    >>> with torch.no_grad():
    ...     layer.gate_logits[:, :6] = -2
    >>> layer.harden().patterns[0]
    Window(2, 8) | Global([0])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        pattern: Pattern,
        parametrisation: str = "toeplitz",
        seq_len: int | None = None,
        block: int | None = None,
        initial: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_pattern(pattern)
        if num_heads % pattern.heads:
            raise ValueError(
                f"sparse_attn: expected pattern for a number of heads that divides {num_heads}, "
                f"got {pattern.heads}"
            )
        if parametrisation not in KINDS:
            raise ValueError(
                f"sparse_attn: expected parametrisation to be one of {', '.join(KINDS)}, got "
                f"{parametrisation!r}"
            )
        if (block is None) == (parametrisation == "block"):
            raise ValueError(
                'sparse_attn: expected block if and only if parametrisation is "block", got '
                f"block={block} with {parametrisation!r}"
            )
        if seq_len is None and parametrisation != "toeplitz":
            raise ValueError(
                f"sparse_attn: expected seq_len with parametrisation {parametrisation!r}, got None"
            )
        check_number("initial", initial)
        self.pattern = pattern & Causal() if self.causal and not pattern.causal else pattern
        self.parametrisation = parametrisation
        self.seq_len = None if seq_len is None else index("seq_len", seq_len, 1)
        self.entries = self._entries(1 if block is None else index("block", block, 1))
        numbers = torch.full(self.entries.shape, float(initial)).to(self.key.weight)
        self.gate_logits = nn.Parameter(numbers)
        self.register_buffer("_shares", None, persistent=False)

    def _entries(self, block: int) -> Slots | Blocks:
        sizes = (self.pattern, self.num_heads, self.seq_len)
        if self.parametrisation in ("block", "dense"):
            return Blocks(*sizes, block)
        return Slots(*sizes, rows=self.parametrisation == "slot")

    @property
    def gate(self) -> Tensor:
        """σ(P)."""
        return torch.sigmoid(self.gate_logits)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`gated_attention` over the pattern."""
        length = query.shape[2]
        self._check_length(length)
        return gated_attention(
            query,
            key,
            value,
            self.entries.gate(self.gate, length),
            pattern=self.pattern,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def sparsity_loss(self) -> Tensor:
        """The expected open share: the mean of σ(P) over the pairs that the pattern allows and that
        P has a number for. Differentiable; add a multiple of it to the objective.

        Which pairs there are is counted once, at seq_len ("toeplitz" without it: at a length where
        every slot has its pairs).

        Returns:
            A tensor without dimensions, float32 for half types.
        """
        wide = torch.promote_types(self.gate_logits.dtype, torch.float32)
        if self._shares is None:
            self._shares = self.entries.shares().to(self.gate_logits.device, wide)
        shares = self._shares.repeat_interleave(self.num_heads // len(self._shares), 0)
        # Dimension by dimension: a sum of all at once would depend on the threads.
        total, pairs = torch.sigmoid(self.gate_logits.to(wide)) * shares, shares
        while total.dim():
            total, pairs = total.sum(-1), pairs.sum(-1)
        return total / pairs.clamp(min=torch.finfo(wide).tiny)

    @torch.no_grad()
    def harden(self, threshold: float = 0.5, length: int | None = None) -> Pattern:
        """The pairs of the pattern whose gate is at least a threshold, as a pattern of their own.

        With "toeplitz" it serves any length: what is open takes the place of the window, as a
        window around the query and lists of keys for other distances. A pair that another part of
        the pattern allows too, such as a global token's, stays. With "slot" it serves up to
        seq_len tokens.

        Args:
            threshold: Least σ(P) of a pair that stays, in [0, 1].
            length: Tokens that it is for, with "block" and "dense"; seq_len if None.

        Returns:
            A pattern for `num_heads` heads.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"sparse_attn: expected threshold in [0, 1], got {threshold}")
        if length is not None:
            self._check_length(index("length", length, 0))
        return self.entries.harden(self.gate >= threshold, length)

    def extra_repr(self) -> str:
        """The pattern and what is learned, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, {self.pattern}, {self.parametrisation!r}"

    def _check_length(self, length: int) -> None:
        if self.parametrisation != "toeplitz" and length > self.seq_len:
            raise ValueError(
                f"sparse_attn: expected at most {self.seq_len} tokens (seq_len), got {length}"
            )
