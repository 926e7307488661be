"""Patterns: which query sees which key, as small immutable values with `|` (union) and `&`
(intersection).
"""

from sparse_attn.patterns.base import (
    Cost,
    Intersection,
    Pattern,
    PerHead,
    Union,
    check_pattern,
)
from sparse_attn.patterns.blocks import BigBird, Checkerboard, LocalBlocks, RandomBlocks
from sparse_attn.patterns.receptive_field import ReceptiveField
from sparse_attn.patterns.tensors import BlockLayout, KeyLists, Mask
from sparse_attn.patterns.tokens import (
    FirstLast,
    Global,
    GlobalKeys,
    GlobalQueries,
    RandomTokens,
)
from sparse_attn.patterns.windows import Causal, Fixed, Full, Radial, Strided, Window

__all__ = [
    "BigBird",
    "BlockLayout",
    "Causal",
    "Checkerboard",
    "Cost",
    "FirstLast",
    "Fixed",
    "Full",
    "Global",
    "GlobalKeys",
    "GlobalQueries",
    "Intersection",
    "KeyLists",
    "LocalBlocks",
    "Mask",
    "Pattern",
    "PerHead",
    "Radial",
    "RandomBlocks",
    "RandomTokens",
    "ReceptiveField",
    "Strided",
    "Union",
    "Window",
    "check_pattern",
]
