"""Attention layers."""

from sparse_attn.nn.bigbird import BigBirdSelfAttention
from sparse_attn.nn.dynamic_sparse import DynamicSparseSelfAttention
from sparse_attn.nn.etc import ETCSelfAttention, RelativePositionGenerator
from sparse_attn.nn.learned_sparse import LearnedSparseSelfAttention
from sparse_attn.nn.linear import LinearSelfAttention, PerformerSelfAttention
from sparse_attn.nn.longformer import LongformerSelfAttention
from sparse_attn.nn.longformer_layers import LongformerEncoder, LongformerLayer
from sparse_attn.nn.low_rank import (
    LinformerSelfAttention,
    LowRankSelfAttention,
    NystromSelfAttention,
)
from sparse_attn.nn.multihead import MultiheadAttention
from sparse_attn.nn.reformer import ReformerSelfAttention
from sparse_attn.nn.replacement import replace_multihead_attention
from sparse_attn.nn.routing import RoutingSelfAttention
from sparse_attn.nn.selected import ThresholdSelfAttention, TopKSelfAttention
from sparse_attn.nn.sparse_self_attention import SparseSelfAttention
from sparse_attn.nn.sparse_transformer import SparseTransformerBlock

__all__ = [
    "BigBirdSelfAttention",
    "DynamicSparseSelfAttention",
    "ETCSelfAttention",
    "LearnedSparseSelfAttention",
    "LinearSelfAttention",
    "LinformerSelfAttention",
    "LongformerEncoder",
    "LongformerLayer",
    "LongformerSelfAttention",
    "LowRankSelfAttention",
    "MultiheadAttention",
    "NystromSelfAttention",
    "PerformerSelfAttention",
    "ReformerSelfAttention",
    "RelativePositionGenerator",
    "RoutingSelfAttention",
    "SparseSelfAttention",
    "SparseTransformerBlock",
    "ThresholdSelfAttention",
    "TopKSelfAttention",
    "replace_multihead_attention",
]
