"""BigBird and BigBirdPegasus of transformers, with the sparse attention of this library.

This module imports transformers; `replace_attention` imports it for models that need it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers.models.big_bird import modeling_big_bird as big_bird
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus as pegasus

from sparse_attn.huggingface._bigbird_attentions import dense_attentions
from sparse_attn.huggingface.replacement import replace_classes
from sparse_attn.nn._hugging_face_blocks import HuggingFaceBlocks

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

#: transformers 4 returns attentions where they are asked for, 5 always.
_ON_DEMAND = (
    "output_attentions"
    in inspect.signature(big_bird.BigBirdBlockSparseAttention.forward).parameters
)


class _BlockSparse:
    """What is computed otherwise: everything between the projections and the output."""

    _were_wanted = True

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        seed = self.seed
        if seed is None:  # a new draw each time, as there
            seed = int(torch.randint(2**32, ()))
        blocks = HuggingFaceBlocks(
            self.block_size, self.num_random_blocks, self.num_attention_heads, seed, self.max_seqlen
        )
        padding = None if to_mask is None else to_mask.flatten(1) == 0
        output = blocks.attend(query, key, value, padding, self.training)
        if from_mask is not None:
            output = output.masked_fill(from_mask == 0, 0.0)
        attentions = None
        if self._wants(output_attentions):
            drawn = blocks.drawn(hidden_states.shape[1], self.training)
            attentions = dense_attentions(query, key, drawn, from_mask, to_mask, self.block_size)
            attentions = attentions.float() if _ON_DEMAND else attentions
        return output.transpose(1, 2).flatten(2), attentions

    def _wants(self, output_attentions: bool | None) -> bool:
        """Whether somebody will see the attentions, which have the square of the length."""
        if _ON_DEMAND or output_attentions is not None:
            return bool(output_attentions)
        # Gradient checkpointing calls again from the backward pass, where nobody collects.
        if torch._C._current_graph_task_id() < 0:
            collected = None if _active_collector is None else _active_collector.get()
            self._were_wanted = collected is None or "attentions" in collected
        return self._were_wanted


class _Switching:
    """A model changes to full attention for short inputs, and its user may change it back."""

    def set_attention_type(self, value: str, *args, **kwargs) -> None:
        super().set_attention_type(value, *args, **kwargs)
        replace_classes([self.self])


class BigBirdBlockSparseAttention(_BlockSparse, big_bird.BigBirdBlockSparseAttention):
    """In the place of the class of this name."""


class BigBirdAttention(_Switching, big_bird.BigBirdAttention):
    """In the place of the class of this name."""


class BigBirdPegasusBlockSparseAttention(_BlockSparse, pegasus.BigBirdPegasusBlockSparseAttention):
    """In the place of the class of this name."""


class BigBirdPegasusEncoderAttention(_Switching, pegasus.BigBirdPegasusEncoderAttention):
    """In the place of the class of this name."""


#: What `replace_attention` makes of each class.
REPLACEMENTS = {
    big_bird.BigBirdBlockSparseAttention: BigBirdBlockSparseAttention,
    big_bird.BigBirdAttention: BigBirdAttention,
    pegasus.BigBirdPegasusBlockSparseAttention: BigBirdPegasusBlockSparseAttention,
    pegasus.BigBirdPegasusEncoderAttention: BigBirdPegasusEncoderAttention,
}
