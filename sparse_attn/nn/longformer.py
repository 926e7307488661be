"""Longformer's attention layer (Beltagy et al. 2020, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_attn.functional import attention
from sparse_attn.functional._common import check_dtype, check_flag
from sparse_attn.nn._checks import (
    check_dropout,
    check_heads,
    check_mask,
    check_sequence,
    through,
)
from sparse_attn.nn._context_parallel import SharedGroup, own_group
from sparse_attn.patterns import Causal, GlobalKeys, GlobalQueries, Pattern, PerHead, Window

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class LongformerSelfAttention(nn.Module):
    """Sliding-window attention with global tokens that have projections of their own.

    A drop-in for the attention of Hugging Face's Longformer: parameter names, numbers and
    conventions are the same, and so there is no output projection. Unlike there, any length goes,
    windows may be odd, dilated or causal, and nothing waits for the device.

    Args:
        embed_dim: Size of the hidden states.
        num_heads: Number of heads; divides embed_dim.
        attention_window: Total size of the window: ⌊w/2⌋ tokens on each side, and the token itself.
        dilation: Distance between neighboring keys of the window; one int, or one for each head.
        dropout: Dropout of the attention probabilities in training.
        causal: Keep only the left half of the window and the token itself; global attention is
            causal too.
        bias: Whether the projections have biases.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        context_parallel_group: A process group, or a `DeviceMesh` of one dimension, over whose
            ranks the sequence is sharded (`sparse_attn.distributed.context_parallel_attention`):
            hidden states and masks are then those of the rank's shard, and gradients of parameters
            the rank's share. No attentions.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: embed_dim is not a multiple of num_heads, or attention_window, dilation or
            dropout is out of range.

    >>> layer = LongformerSelfAttention(64, 4, attention_window=32)
    >>> tokens = torch.ones(2, 100, dtype=torch.long)
    >>> is_global = torch.zeros(2, 100, dtype=torch.long)
    >>> is_global[:, 0] = 1
    >>> (output,) = layer(torch.randn(2, 100, 64), tokens, is_global)
    >>> output.shape
    torch.Size([2, 100, 64])
    """

    _context_parallel: SharedGroup | None = None  # also of modules that became one

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention_window: int,
        dilation: int | Iterable[int] = 1,
        dropout: float = 0.0,
        causal: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        context_parallel_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        check_flag("causal", causal)
        check_flag("bias", bias)
        check_dtype(dtype)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.attention_window = attention_window
        self.dilation = tuple(dilation) if isinstance(dilation, Iterable) else dilation
        self.dropout = dropout
        self.causal = causal
        self._context_parallel = own_group(context_parallel_group)
        self.pattern = _window(attention_window, self.dilation, num_heads, causal)
        # Only the tokens of global_mask, which attention() adds.
        self.global_pattern = GlobalQueries([]) & Causal() if causal else GlobalQueries([])
        for name in _PROJECTIONS:
            projection = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            self.add_module(name, projection)

    @property
    def context_parallel_group(self) -> ProcessGroup | DeviceMesh | None:
        """The ranks that the sequence is sharded over."""
        return self._context_parallel.group if self._context_parallel else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Attend.

        Args:
            hidden_states: (batch, length, embed_dim).
            attention_mask: (batch, length), 1 = token, 0 = padding: no query sees it, and its
                output is 0. Not the additive mask of the layers of transformers, where 0 means a
                token.
            global_attention_mask: (batch, length), 1 = global: sees all tokens and is seen by all.
                Padding wins over it.
            output_attentions: Also return the attention probabilities, after dropout; their size
                depends on the masks, so the host waits for the device.

        Returns:
            A tuple of the output (batch, length, embed_dim). With `output_attentions` also the
            attentions (batch, heads, length, G + 2 · ⌊w/2⌋ + 1): for each query the global tokens
            of its example, ascending, then the window from left to right; G is the largest number
            of global tokens of an example. And the global ones (batch, heads, length, G): what
            global query g pays to each token. Rows of global and of padded queries are 0, and so
            is what has no token.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape or device does not fit.
            NotImplementedError: output_attentions with context_parallel_group.
        """
        self._check(hidden_states, attention_mask, global_attention_mask)
        padding = None if attention_mask is None else attention_mask == 0
        is_global = None if global_attention_mask is None else global_attention_mask != 0
        return self.attend(hidden_states, padding, is_global, output_attentions)

    def attend(
        self,
        hidden_states: Tensor,
        padding: Tensor | None,
        is_global: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """`forward` with masks as `attention` takes them: (batch, length) bool, True = padding and
        True = global.
        """
        if is_global is not None and padding is not None:
            is_global = is_global & ~padding
        local = self._project(hidden_states, *_PROJECTIONS[:3])
        output, weights = self._attend(local, self.pattern, padding, is_global, output_attentions)
        global_weights = None
        if is_global is not None:
            parts = self._project(hidden_states, *_PROJECTIONS[3:])
            of_global, global_weights = self._attend(
                parts, self.global_pattern, padding, is_global, output_attentions
            )
            output = torch.where(is_global[:, None, :, None], of_global, output)
        elif torch.is_grad_enabled():
            output = output + self._zero_of_unused()
        if padding is not None:
            output = output.masked_fill(padding[:, None, :, None], 0.0)
        output = output.transpose(1, 2).flatten(2)
        if not output_attentions:
            return (output,)
        attentions = weights.to_longformer()
        global_attentions = (
            attentions[..., :0] if global_weights is None else global_weights.to_longformer_global()
        )
        return output, attentions.to(output.dtype), global_attentions.to(output.dtype)

    def extra_repr(self) -> str:
        """The pattern, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern}"

    def _attend(self, parts, pattern, padding, is_global, with_weights):
        options = {
            "key_padding_mask": padding,
            "global_mask": is_global,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if self._context_parallel:
            if with_weights:
                raise NotImplementedError(
                    "sparse_attn: expected output_attentions=False with context_parallel_group, "
                    "got True"
                )
            return self._context_parallel.attention(*parts, pattern, **options), None
        results = attention(*parts, pattern, return_weights=with_weights, **options)
        return results if with_weights else (results, None)

    def _project(self, hidden_states: Tensor, *names: str) -> list[Tensor]:
        """(batch, heads, length, head_dim) for each name."""
        projected = (through(getattr(self, name), "hidden_states", hidden_states) for name in names)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]

    def _zero_of_unused(self) -> Tensor:
        """0, differentiable: the global projections get gradients of 0 and not None.

        Distributed training waits for the gradient of every parameter.
        """
        unused = [p for name in _PROJECTIONS[3:] for p in getattr(self, name).parameters()]
        return sum(p.flatten()[:0].sum() for p in unused)

    def _check(self, hidden_states: Tensor, *masks: Tensor | None) -> None:
        check_sequence("hidden_states", hidden_states, self.embed_dim)
        for name, mask in zip(("attention_mask", "global_attention_mask"), masks, strict=True):
            check_mask(name, mask, hidden_states)


_PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")


def _window(attention_window: int, dilation, num_heads: int, causal: bool) -> Pattern:
    def one(step: int) -> Pattern:
        window = Window.from_longformer(attention_window, step)
        if causal:
            return Window(window.left, 0, step)
        # A window of the token alone counts as causal, and would make its global tokens causal too.
        return window if window.left > 0 else window | GlobalKeys([])

    if not isinstance(dilation, tuple):
        return one(dilation)
    if len(dilation) != num_heads:
        raise ValueError(
            "sparse_attn: expected dilation to be an int or one for each of the "
            f"{num_heads} heads, got {dilation}"
        )
    return PerHead([one(step) for step in dilation])
