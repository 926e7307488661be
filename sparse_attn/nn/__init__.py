"""Attention layers."""

from sparse_attn.nn.bigbird import BigBirdSelfAttention
from sparse_attn.nn.etc import ETCSelfAttention, RelativePositionGenerator
from sparse_attn.nn.longformer import LongformerSelfAttention
from sparse_attn.nn.longformer_layers import LongformerEncoder, LongformerLayer
from sparse_attn.nn.sparse_self_attention import SparseSelfAttention
from sparse_attn.nn.sparse_transformer import SparseTransformerBlock

__all__ = [
    "BigBirdSelfAttention",
    "ETCSelfAttention",
    "LongformerEncoder",
    "LongformerLayer",
    "LongformerSelfAttention",
    "RelativePositionGenerator",
    "SparseSelfAttention",
    "SparseTransformerBlock",
]
