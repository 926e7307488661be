"""The attentions that are timed side by side on a GPU, each in the layout that suits it best.

`prepare(setup)` makes masks and the like, outside the timing, and returns the ways to call the
implementation, of which the fastest counts in each direction. What it cannot do raises
`Unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_workload import Case, Setup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_attn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """An implementation has no such case; the message says why."""


@dataclass(frozen=True)
class Way:
    """One way to call an implementation."""

    run: Attention
    note: str = ""


def _same(x: Tensor) -> Tensor:
    return x


def _heads_last(x: Tensor) -> Tensor:
    """(batch, heads, length, size) to (batch, length, heads, size) and back."""
    return x.transpose(1, 2)


@dataclass(frozen=True)
class Implementation:
    """`layout` goes from (batch, heads, length, size) to the layout that it takes, and back."""

    prepare: Callable[[Setup], list[Way]]
    layout: Callable[[Tensor], Tensor] = _same
    dense: bool = False  # all pairs, whatever the pattern
    # Windows move inward at the ends of the sequence, so that rows near them see other keys.
    shifts_at_ends: bool = False
    # A variable of the environment, and its value while the implementation runs.
    setting: tuple[str, str] | None = None


def _ours(setup: Setup) -> list[Way]:
    pattern, gqa = setup.case.pattern, setup.heads != setup.heads_kv
    return [Way(lambda q, k, v: sparse_attn.attention(q, k, v, pattern, enable_gqa=gqa))]


def _ours_on_hopper(setup: Setup) -> list[Way]:
    """With the kernels for sm_90a."""
    if setup.device.type != "cuda" or torch.cuda.get_device_capability(setup.device) != (9, 0):
        raise Unsupported("devices of sm_90 only")
    return _ours(setup)


def _dense(backend: SDPBackend) -> Callable[[Setup], list[Way]]:
    def prepare(setup: Setup) -> list[Way]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        gqa = setup.heads != setup.heads_kv
        return [Way(run)]

    return prepare


# FlexAttention's sparse block and the tiles inside it, tried in turn. On Hopper its backward pass
# refuses blocks of 64: its default tiles are larger, and that check does not see kernel_options.
FLEX_WAYS = {
    "blocks of 128": (128, {}),
    "blocks of 128, tiles of 64": (
        128,
        {
            **{"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64},
            **{f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")},
            **{"bwd_num_warps": 4, "bwd_num_stages": 2},
        },
    ),
    "blocks of 64": (64, {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4}),
}


def _flex(setup: Setup, autotune: bool = False) -> list[Way]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every case compiles a graph of its own; above the default limit of 8 Dynamo would silently run
    # the uncompiled attention.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # The backward pass is timed on a graph that is kept.
    torch._functorch.config.donated_buffer = False
    gqa, mode = setup.heads != setup.heads_kv, "max-autotune-no-cudagraphs" if autotune else None
    masks = {block: block_mask(setup, block) for block in (128, 64)}

    def way(note: str, block: int, options: dict) -> Way:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(
                q, k, v, block_mask=masks[block], enable_gqa=gqa, kernel_options=dict(options)
            )

        return Way(torch.compile(call, dynamic=False, fullgraph=True, mode=mode), note)

    if autotune:
        return [way(f"autotuned, blocks of {block}", block, {}) for block in masks]
    return [way(note, *choice) for note, choice in FLEX_WAYS.items()]


def block_mask(setup: Setup, block: int, elements: int = 2**27):
    """FlexAttention's block mask, a few rows of blocks at a time: length² numbers would not fit."""
    from torch.nn.attention.flex_attention import BlockMask

    visible = setup.visible()
    keys = torch.arange(setup.length, device=setup.device)
    padding = -setup.length % block
    blocks = (setup.length + padding) // block
    some, every = [], []
    for rows in keys.split(block * max(1, elements // (block * setup.length))):
        seen = F.pad(visible(rows[:, None], keys), (0, padding, 0, -len(rows) % block))
        seen = seen.view(-1, block, blocks, block)
        some.append(seen.any(3).any(1))
        every.append(seen.all(3).all(1))
    full = torch.cat(every)
    lists = []
    for kind in (torch.cat(some) & ~full, full):
        order = kind.int().argsort(dim=1, descending=True, stable=True).int()
        lists += [kind.sum(1, dtype=torch.int32)[None, None], order[None, None]]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(i, j)

    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(setup.length, setup.length)
    )


def _window_of(setup: Setup) -> tuple[int, int]:
    if setup.case.window is None:
        raise Unsupported("windows only")
    return setup.case.window


def _by_residue(case: Case, length: int, attention: Attention) -> Way:
    """A dilated window by a plain one: tokens c, c + d, c + 2d ... become an example, in place."""
    dilation = case.dilation
    if dilation == 1:
        return Way(attention)
    if length % dilation:
        raise Unsupported("the length is not a multiple of the dilation")

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attention(split(q), split(k), split(v))
        return output.unflatten(0, (-1, dilation)).transpose(1, 2).flatten(1, 2)

    return Way(run, "residue classes as examples")


def _fa2(setup: Setup) -> list[Way]:
    left, right = _window_of(setup)
    rows = setup.length // setup.case.dilation

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            *(q, k, v, None, None, rows, rows, 0.0, False, False),
            window_size_left=left,
            window_size_right=right,
        )[0]

    return [_by_residue(setup.case, setup.length, attention)]


def _fa3(setup: Setup) -> list[Way]:
    from flash_attn_interface import flash_attn_func

    window = _window_of(setup)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = flash_attn_func(q, k, v, window_size=window)
        return output[0] if isinstance(output, tuple) else output

    return [_by_residue(setup.case, setup.length, attention)]


def _natten(setup: Setup) -> list[Way]:
    import natten

    left, right = _window_of(setup)
    if right not in (0, left):
        raise Unsupported("causal or symmetric windows only")
    if setup.heads != setup.heads_kv:
        raise Unsupported("as many key heads as query heads")
    options = {
        "kernel_size": left + 1 + right,
        "dilation": setup.case.dilation,
        "is_causal": right == 0,
    }
    note = "" if right == 0 else "other keys near the ends"
    return [Way(lambda q, k, v: natten.na1d(q, k, v, **options), note)]


def _xformers(setup: Setup) -> list[Way]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

    left, right = _window_of(setup)
    if setup.heads != setup.heads_kv:
        raise Unsupported("as many key heads as query heads")
    bias = LocalAttentionFromBottomRightMask(window_left=left, window_right=right)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(q, k, v, attn_bias=bias)

    return [_by_residue(setup.case, setup.length, attention)]


OURS = "sparse_attn"
OURS_ON_HOPPER = "sparse_attn_sm90"
SM90 = "SPARSE_ATTN_SM90"
IMPLEMENTATIONS = {
    OURS: Implementation(_ours, setting=(SM90, "0")),
    OURS_ON_HOPPER: Implementation(_ours_on_hopper, setting=(SM90, "1")),
    "flex": Implementation(_flex),
    "flex_autotuned": Implementation(lambda setup: _flex(setup, autotune=True)),
    "fa2": Implementation(_fa2, _heads_last),
    "fa3": Implementation(_fa3, _heads_last),
    "natten": Implementation(_natten, _heads_last, shifts_at_ends=True),
    "xformers": Implementation(_xformers, _heads_last),
    "sdpa_flash": Implementation(_dense(SDPBackend.FLASH_ATTENTION), dense=True),
    "cudnn": Implementation(_dense(SDPBackend.CUDNN_ATTENTION), dense=True),
}
# Packages that are not always there: asked for or not, no row says that they are missing.
OPTIONAL = {"fa3": "flash_attn_interface", "natten": "natten", "xformers": "xformers"}
