"""The attentions that are timed side by side, each in the layout and form that suits it best.

Each `prepare` function makes masks and modules outside the timing and returns the function that is
timed. What a peer cannot do raises `Unsupported` with the reason. All compute the same pairs, but
for `sdpa_dense`, which has no pattern at all beyond causality.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from peer_setup import Attention, Peer, Setup, Unsupported, by_residue, make_task
from record import OURS
from stock_torch import chunk_loop, chunked_bmm
from torch import Tensor
from workload import BATCH, AnyCase, BigBirdCase

import sparse_attn

__all__ = ["OURS", "PEERS", "Given", "Peer", "Setup", "Unsupported", "make_task"]


def _ours(setup: Setup) -> Attention:
    pattern, padding = setup.case.pattern(), setup.case.key_padding_mask()
    return lambda q, k, v: sparse_attn.attention(q, k, v, pattern, key_padding_mask=padding)


def _check_dense(setup: Setup) -> None:
    if setup.case.length > setup.dense_up_to:
        raise Unsupported(f"left out above length {setup.dense_up_to}: quadratic")


def _sdpa_dense(setup: Setup) -> Attention:
    _check_dense(setup)
    return partial(F.scaled_dot_product_attention, is_causal=setup.case.causal)


def _sdpa_mask(setup: Setup) -> Attention:
    _check_dense(setup)
    mask = setup.case.mask()
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex_attention(setup: Setup) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    if setup.backward:
        raise Unsupported("none: FlexAttention has no backward on a CPU")
    # Every case compiles a graph of its own; above the default limit of 8 Dynamo would silently run
    # the uncompiled attention.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    block_mask = _block_mask(setup.case)
    return torch.compile(
        partial(flex_attention, block_mask=block_mask), dynamic=False, fullgraph=True
    )


@lru_cache(maxsize=2)
def _block_mask(case: AnyCase):
    """FlexAttention's block mask, a row of blocks at a time: `create_block_mask` is quadratic."""
    from torch.nn.attention.flex_attention import BlockMask

    block = getattr(case, "block", 128)
    keys = torch.arange(case.length)
    padding = -case.length % block
    some, every = [], []
    for rows in keys.split(block):
        seen = case.visible(rows[:, None], keys)
        some.append(F.pad(seen, (0, padding)).unflatten(1, (-1, block)).any(2).any(0))
        every.append(F.pad(seen, (0, padding), value=True).unflatten(1, (-1, block)).all(2).all(0))
    full = torch.stack(every)
    lists = []
    for kind in (torch.stack(some) & ~full, full):
        order = kind.int().argsort(dim=1, descending=True, stable=True).int()
        lists += [kind.sum(1, dtype=torch.int32)[None, None], order[None, None]]

    def mask_mod(b, h, i, j):
        return case.visible(i, j)

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=mask_mod)


class Given(torch.nn.Module):
    """Stands for a projection: gives a tensor that was set before."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _take_out_projections(module: torch.nn.Module) -> dict[str, Given]:
    """Replaces the projections of a module of transformers by what is given."""
    given = {name: Given() for name in ("query", "key", "value")}
    for name, projection in given.items():
        setattr(module, name, projection)
    return given


def _longformer(setup: Setup) -> Attention:
    """Hugging Face's LongformerSelfAttention with its six projections taken out.

    It scales the query in place, so that the given one has to be copied here.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    case = setup.window()
    if case.dilation > 1 or case.causal:
        raise Unsupported("none: no dilation" if case.dilation > 1 else "none: not causal")
    if case.length % (2 * case.reach):
        raise Unsupported("none: the length is not a multiple of its attention window")
    batch, heads, length, head_dim = setup.inputs[0].shape
    config = LongformerConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        attention_window=[2 * case.reach],
        attention_probs_dropout_prob=0.0,
    )
    module = LongformerSelfAttention(config, 0)
    given = _take_out_projections(module)
    module.key_global, module.value_global = given["key"], given["value"]
    module.query_global = query_global = Given()
    tokens = torch.tensor(case.tokens, dtype=torch.int64)
    is_global = torch.zeros(batch, length, dtype=torch.bool)
    is_global[:, tokens] = True
    masked = torch.zeros_like(is_global)
    attention_mask = torch.zeros(batch, length).masked_fill(is_global, 10000.0)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given["query"].value, given["key"].value, given["value"].value = query.clone(), key, value
        query_global.value = query[tokens]
        output = module(
            value.transpose(0, 1), attention_mask, masked, is_global, case.num_global > 0
        )
        return output[0].transpose(0, 1)

    return run


def _to_longformer(x: Tensor) -> Tensor:
    """(batch, heads, length, size) to (length, batch, heads * size)."""
    return x.permute(2, 0, 1, 3).flatten(2)


def _from_longformer(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)


def _bigbird(setup: Setup) -> Attention:
    """Hugging Face's BigBirdBlockSparseAttention with its projections taken out.

    It is given our random blocks, where it would draw from the first 1024 tokens and anew in each
    call. One that a query sees anyway would count twice there: its mask hides the second time.
    """
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdModel,
    )

    case = setup.case
    if not isinstance(case, BigBirdCase):
        raise Unsupported("none: BigBird's blocks only")
    if case.length % case.block:
        raise Unsupported("none: the length is not a multiple of the block")
    _, heads, length, head_dim = setup.inputs[0].shape
    config = BigBirdConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        block_size=case.block,
        num_random_blocks=case.random_blocks,
        max_position_embeddings=length,
    )
    module = BigBirdBlockSparseAttention(config).train()
    given = _take_out_projections(module)
    inner = case.drawn[1:-1].numpy()
    new = ~case.fixed.gather(1, case.drawn)[1:-1]
    shape = (BATCH, heads, len(inner), case.block, inner.shape[1] * case.block)
    seen = new.repeat_interleave(case.block, 1)[:, None].to(setup.inputs[0].dtype).expand(shape)
    module._bigbird_block_rand_mask = lambda *_, **__: inner
    module._bigbird_block_rand_mask_with_head = lambda *_, **__: [inner] * heads
    module._create_rand_mask_from_inputs = lambda *_: seen
    ones = torch.ones(BATCH, length, dtype=setup.inputs[0].dtype)
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(ones, case.block)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given["query"].value, given["key"].value, given["value"].value = query, key, value
        return module(value, band, rows, keys, blocked, blocked)[0]

    return run


def _to_bigbird(x: Tensor) -> Tensor:
    """(batch, heads, length, size) to (batch, length, heads * size)."""
    return x.transpose(1, 2).flatten(2)


def _from_bigbird(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _local_attention(setup: Setup) -> Attention:
    """The local-attention package, blocks of `reach` tokens that see one block on each side.

    `exact_windowsize` then allows precisely the keys at most `reach` away.
    """
    from local_attention import LocalAttention

    case = setup.window()
    if case.num_global:
        raise Unsupported("none: no global tokens")
    if case.length % (case.reach * case.dilation):
        raise Unsupported("none: the length is not a multiple of the window")
    module = LocalAttention(
        case.reach,
        causal=case.causal,
        look_backward=1,
        look_forward=0 if case.causal else 1,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return by_residue(case, module)


PEERS = {
    OURS: Peer(_ours),
    "sdpa_dense": Peer(_sdpa_dense, dense=True),
    "sdpa_mask": Peer(_sdpa_mask),
    "flex_attention": Peer(_flex_attention, compiles=True),
    "longformer": Peer(_longformer, _to_longformer, _from_longformer),
    "bigbird": Peer(_bigbird, _to_bigbird, _from_bigbird),
    "local_attention": Peer(_local_attention),
    "chunked_bmm": Peer(chunked_bmm),
    "chunk_loop": Peer(chunk_loop),
    "chunk_loop_tuned": Peer(partial(chunk_loop, tuned=True)),
}
