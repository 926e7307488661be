"""Longformer and the encoder of LED of transformers, with the sparse attention of this library.

This module imports transformers; `replace_attention` imports it for models that need it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.led.modeling_led import LEDEncoderSelfAttention as OriginalOfLED
from transformers.models.longformer.modeling_longformer import (
    LongformerSelfAttention as OriginalOfLongformer,
)

from sparse_attn.nn import longformer
from sparse_attn.patterns import GlobalQueries, Window


class _SelfAttention(longformer.LongformerSelfAttention):
    """The same calls, numbers and layouts, at any length."""

    global_pattern = GlobalQueries([])

    @property
    def pattern(self) -> Window:
        return Window(self.one_sided_attn_window_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
        layer_head_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attend.

        Args:
            hidden_states: (batch, length, embed_dim).
            attention_mask: (batch, length), as the model makes it: negative = padding, 0 = local,
                positive = global.
            is_index_masked: (batch, length) bool, attention_mask < 0; made of it if None.
            is_index_global_attn: (batch, length) bool, attention_mask > 0; made of it if None.
            is_global_attn: Whether there are global tokens, so that nothing is computed for none.
            output_attentions: Also return the attention probabilities.
            layer_head_mask: (heads,), multiplies the probabilities (transformers 4.57).

        Returns:
            A tuple of the output (batch, length, embed_dim); with output_attentions also the
            probabilities (batch, length, heads, G + window + 1), and those of global queries
            (batch, heads, G, length) if there are global tokens.

        Raises:
            ValueError: A shape does not fit.
        """
        if attention_mask is not None:
            is_index_masked = attention_mask < 0 if is_index_masked is None else is_index_masked
            if is_index_global_attn is None:
                is_index_global_attn = attention_mask > 0
        self._check(hidden_states, is_index_masked, is_index_global_attn)
        if is_global_attn is False:
            is_index_global_attn = None
        output, *attentions = self.attend(
            hidden_states, is_index_masked, is_index_global_attn, output_attentions
        )
        if attentions:
            attentions[0] = attentions[0].transpose(1, 2)
            attentions[1] = _with_missing(attentions[1], is_index_global_attn, is_index_masked)
        if layer_head_mask is not None:
            output, attentions = self._by_head(layer_head_mask, output, attentions)
        return (output, *(part for part in attentions if part is not None))

    def _by_head(
        self, mask: Tensor, output: Tensor, attentions: list[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        if mask.shape != (self.num_heads,):
            raise ValueError(
                f"sparse_attn: expected layer_head_mask of shape ({self.num_heads},), got "
                f"{tuple(mask.shape)}"
            )
        output = (output.unflatten(-1, (self.num_heads, -1)) * mask[:, None]).flatten(-2)
        factors = mask[:, None], mask[:, None, None]
        pairs = zip(attentions, factors, strict=False)
        return output, [part if part is None else part * factor for part, factor in pairs]


class LongformerSelfAttention(_SelfAttention, OriginalOfLongformer):
    """In the place of the class of this name."""


class LEDEncoderSelfAttention(_SelfAttention, OriginalOfLED):
    """In the place of the class of this name."""


#: What `replace_attention` makes of each class.
REPLACEMENTS = {
    OriginalOfLongformer: LongformerSelfAttention,
    OriginalOfLED: LEDEncoderSelfAttention,
}


def _with_missing(
    attentions: Tensor, is_global: Tensor | None, is_masked: Tensor | None
) -> Tensor | None:
    """(batch, heads, length, G) as (batch, heads, G, length), where the queries that an example
    lacks pay the same to all tokens; None if there are none at all.
    """
    if is_global is None:
        return None
    if is_masked is not None:
        is_global = is_global & ~is_masked
    length, number = attentions.shape[-2:]
    missing = torch.arange(number, device=attentions.device) >= is_global.sum(1, keepdim=True)
    return attentions.mT.masked_fill(missing[:, None, :, None], 1 / max(1, length))
