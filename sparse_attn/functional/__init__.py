"""Attention as functions: over a pattern, over keys that the content chooses, by low rank, by
feature maps."""

from sparse_attn.functional.block_selection import block_topk_attention, choose_blocks
from sparse_attn.functional.chunked import chunked_lsh_attention
from sparse_attn.functional.clustered import lsh_attention, routing_attention
from sparse_attn.functional.gated import dynamic_attention, gated_attention
from sparse_attn.functional.hashing import lsh_buckets
from sparse_attn.functional.linear import (
    linear_attention,
    orthogonal_features,
    performer_attention,
)
from sparse_attn.functional.low_rank import (
    linformer_attention,
    low_rank_attention,
)
from sparse_attn.functional.nystrom import nystrom_attention
from sparse_attn.functional.patterned import attention, index_attention
from sparse_attn.functional.selected import threshold_attention, topk_attention
from sparse_attn.functional.tucker import tucker_attention

__all__ = [
    "attention",
    "block_topk_attention",
    "choose_blocks",
    "chunked_lsh_attention",
    "dynamic_attention",
    "gated_attention",
    "index_attention",
    "linear_attention",
    "linformer_attention",
    "low_rank_attention",
    "lsh_attention",
    "lsh_buckets",
    "nystrom_attention",
    "orthogonal_features",
    "performer_attention",
    "routing_attention",
    "threshold_attention",
    "topk_attention",
    "tucker_attention",
]
