"""Attention as functions: over a pattern, over keys that the content chooses, by low rank, by
feature maps."""

from sparse_attn.functional.chunked import chunked_lsh_attention
from sparse_attn.functional.clustered import lsh_attention, routing_attention
from sparse_attn.functional.hashing import lsh_buckets
from sparse_attn.functional.patterned import attention, index_attention

__all__ = [
    "attention",
    "chunked_lsh_attention",
    "index_attention",
    "lsh_attention",
    "lsh_buckets",
    "routing_attention",
]
