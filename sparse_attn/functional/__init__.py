"""Attention as functions: over a pattern, over keys that the content chooses, by low rank, by
feature maps."""

from sparse_attn.functional.linear import (
    linear_attention,
    orthogonal_features,
    performer_attention,
)
from sparse_attn.functional.patterned import attention, index_attention

__all__ = [
    "attention",
    "index_attention",
    "linear_attention",
    "orthogonal_features",
    "performer_attention",
]
