"""What this build has, and what the engine will do with a pattern."""

from __future__ import annotations

import torch

from sparse_attn._library import ROOT, ops
from sparse_attn.patterns import Pattern, check_pattern
from sparse_attn.patterns.arguments import check_sizes

#: For CMake: `-DCMAKE_PREFIX_PATH=...` makes `find_package(sparse_attn)` work.
cmake_prefix_path = str(ROOT / "share" / "cmake")


def build_info() -> dict[str, object]:
    """Say what this build has.

    Returns:
        A dict with `version`, `torch` (the version it was built with), `isas` (the instruction sets
        that its CPU kernels were compiled for, best first), `isa` (the one in use; the environment
        variable SPARSE_ATTN_ISA forces one), `cuda_archs` (empty without CUDA) and `threads`.

    Raises:
        ImportError: The Python module `_C` was not built.
        ValueError: SPARSE_ATTN_ISA names an instruction set that this machine or build does not
            have.

    >>> sorted(build_info())
    ['cuda_archs', 'isa', 'isas', 'threads', 'torch', 'version']
    """
    from sparse_attn import _C  # optional: the ops work without it

    return _C.build_info()


def plan_info(pattern: Pattern, n_q: int, n_k: int | None = None) -> dict[str, int]:
    """Say what the engine will do with a pattern, without doing it.

    Args:
        pattern: Any pattern; if heads or examples differ, the figures are summed over these.
        n_q: Number of queries.
        n_k: Number of keys; as many as queries if None.

    Returns:
        `pairs` (allowed pairs, exactly), `visited_pairs` (pairs computed in the tiles visited),
        `bytes` (memory of the plan), `passes` (sweeps over the rows) and `distinct_masks` (of
        partly allowed tiles).

    >>> from sparse_attn import Window
    >>> plan_info(Window(64) | Window(64, dilation=8), 4096)["passes"]
    2
    """
    check_pattern(pattern)
    sizes = check_sizes(n_q, n_k)
    pairs, visited, size, passes, masks, _ = ops._pattern_cost(
        pattern.encode(), pattern.tensors(*sizes), *sizes
    )
    return {
        "pairs": pairs,
        "visited_pairs": visited,
        "bytes": size,
        "passes": passes,
        "distinct_masks": masks,
    }


def clear_plan_cache() -> None:
    """Forget all plans. They are built again when needed; the cache is bounded in any case.

    >>> clear_plan_cache()
    """
    torch.ops.sparse_attn._clear_plan_cache()
