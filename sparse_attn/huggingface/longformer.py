"""The attention of transformers' Longformer and of LED's encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_attn.nn import longformer


class LongformerSelfAttention(longformer.LongformerSelfAttention):
    """Takes the place of a `LongformerSelfAttention` or `LEDEncoderSelfAttention`: the same calls,
    parameters, numbers and layouts, without padding to a multiple of the window.

    `replace_attention` makes it; Beltagy et al. 2020, section 3.

    Args:
        original: The module whose parameters it takes.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(
            original.embed_dim,
            original.num_heads,
            2 * original.one_sided_attn_window_size,
            dropout=original.dropout,
            device="meta",  # as the original's projections take their place
        )
        for name, projection in original.named_children():
            setattr(self, name, projection)
        self.head_dim = original.head_dim
        self.layer_id = original.layer_id
        self.one_sided_attn_window_size = original.one_sided_attn_window_size
        self.config = original.config

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
