"""Attention over sequences that are sharded over the ranks of a torch.distributed group."""

from sparse_attn.distributed.attention import context_parallel_attention
from sparse_attn.distributed.communication import Communication
from sparse_attn.distributed.exchange import Traffic, count_traffic
from sparse_attn.distributed.gather import gather_sequence

__all__ = [
    "Communication",
    "Traffic",
    "context_parallel_attention",
    "count_traffic",
    "gather_sequence",
]
