"""Hugging Face's models on this library's kernels.

Nothing here imports transformers before it is used.
"""

from sparse_attn.huggingface.interface import register
from sparse_attn.huggingface.replacement import replace_attention

__all__ = ["register", "replace_attention"]
