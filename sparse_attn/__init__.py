"""Sparse attention for PyTorch: every pattern one fused engine, forward and backward.

>>> import torch, sparse_attn
>>> from sparse_attn import Causal, Global, Window
>>> query, key, value = (torch.randn(1, 8, 1000, 64) for _ in range(3))
>>> pattern = (Window(128, 0) | Global([0])) & Causal()
>>> sparse_attn.attention(query, key, value, pattern).shape
torch.Size([1, 8, 1000, 64])
"""

from sparse_attn import distributed, functional, huggingface
from sparse_attn import nn as nn  # not in __all__: a star import would hide torch.nn
from sparse_attn.analysis import (
    ApproximationReport,
    Recommendation,
    Recommendations,
    approximation_report,
    fit_pattern,
    gradient_pattern,
    recommend_pattern,
    record_attention,
)
from sparse_attn.cache import KVCache
from sparse_attn.functional import attention
from sparse_attn.info import build_info, clear_plan_cache, cmake_prefix_path, plan_info
from sparse_attn.linear_state import LinearState
from sparse_attn.merging import merge
from sparse_attn.nn import (
    BigBirdSelfAttention,
    DynamicSparseSelfAttention,
    ETCSelfAttention,
    LearnedSparseSelfAttention,
    LinearSelfAttention,
    LinformerSelfAttention,
    LongformerEncoder,
    LongformerLayer,
    LongformerSelfAttention,
    LowRankSelfAttention,
    MultiheadAttention,
    NystromSelfAttention,
    PerformerSelfAttention,
    ReformerSelfAttention,
    RelativePositionGenerator,
    RoutingSelfAttention,
    SparseSelfAttention,
    SparseTransformerBlock,
    ThresholdSelfAttention,
    TopKSelfAttention,
    replace_multihead_attention,
)
from sparse_attn.patterns import (
    BigBird,
    BlockLayout,
    Causal,
    Checkerboard,
    Cost,
    FirstLast,
    Fixed,
    Full,
    Global,
    GlobalKeys,
    GlobalQueries,
    Intersection,
    KeyLists,
    LocalBlocks,
    Mask,
    Pattern,
    PerHead,
    Radial,
    RandomBlocks,
    RandomTokens,
    ReceptiveField,
    Strided,
    Union,
    Window,
)
from sparse_attn.sparse_weights import SparseWeights
from sparse_attn.tables import BlockBias, SlotBias, alibi_slopes

__version__ = "0.1.0"

__all__ = [
    "ApproximationReport",
    "BigBird",
    "BigBirdSelfAttention",
    "BlockBias",
    "BlockLayout",
    "Causal",
    "Checkerboard",
    "Cost",
    "DynamicSparseSelfAttention",
    "ETCSelfAttention",
    "FirstLast",
    "Fixed",
    "Full",
    "Global",
    "GlobalKeys",
    "GlobalQueries",
    "Intersection",
    "KVCache",
    "KeyLists",
    "LearnedSparseSelfAttention",
    "LinearSelfAttention",
    "LinearState",
    "LinformerSelfAttention",
    "LocalBlocks",
    "LongformerEncoder",
    "LongformerLayer",
    "LongformerSelfAttention",
    "LowRankSelfAttention",
    "Mask",
    "MultiheadAttention",
    "NystromSelfAttention",
    "Pattern",
    "PerHead",
    "PerformerSelfAttention",
    "Radial",
    "RandomBlocks",
    "RandomTokens",
    "ReceptiveField",
    "Recommendation",
    "Recommendations",
    "ReformerSelfAttention",
    "RelativePositionGenerator",
    "RoutingSelfAttention",
    "SlotBias",
    "SparseSelfAttention",
    "SparseTransformerBlock",
    "SparseWeights",
    "Strided",
    "ThresholdSelfAttention",
    "TopKSelfAttention",
    "Union",
    "Window",
    "alibi_slopes",
    "approximation_report",
    "attention",
    "build_info",
    "clear_plan_cache",
    "cmake_prefix_path",
    "distributed",
    "fit_pattern",
    "functional",
    "gradient_pattern",
    "huggingface",
    "merge",
    "plan_info",
    "recommend_pattern",
    "record_attention",
    "replace_multihead_attention",
]
