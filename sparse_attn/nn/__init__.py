"""Attention layers."""

from sparse_attn.nn.longformer import LongformerSelfAttention

__all__ = ["LongformerSelfAttention"]
