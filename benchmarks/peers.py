"""The attentions that are timed side by side, each in the layout and form that suits it best.

Each `prepare` function makes masks and modules outside the timing and returns the function that is
timed. What a peer cannot do raises `Unsupported` with the reason. All compute the same pairs, but
for `sdpa_dense`, which has no pattern at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timing import once
from torch import Tensor
from workload import Case

import sparse_attn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNKS = (64, 128, 256, 512)


class Unsupported(Exception):
    """A peer has no such case; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What a peer may use to prepare itself."""

    case: Case
    inputs: tuple[Tensor, ...]  # query, key, value, gradient, (batch, heads, length, head size)
    backward: bool
    dense_up_to: int = 16384


@dataclass(frozen=True)
class Peer:
    """A way to compute attention; `to_native` and back are layouts, changed outside the timing."""

    prepare: Callable[[Setup], Attention | tuple[Attention, str]]
    to_native: Callable[[Tensor], Tensor] = lambda x: x
    from_native: Callable[[Tensor], Tensor] = lambda x: x
    dense: bool = False


def step(run: Attention, leaves: tuple[Tensor, ...], grad: Tensor, backward: bool) -> Callable:
    """The task that is timed: one forward in inference mode, or one forward and backward."""

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (run(*leaves),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = run(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return forward_backward if backward else forward


def make_task(peer: Peer, setup: Setup) -> tuple[Callable[[], tuple[Tensor, ...]], str]:
    """The task of a peer, and a note on what it chose."""
    prepared = peer.prepare(setup)
    run, note = prepared if isinstance(prepared, tuple) else (prepared, "")
    query, key, value, grad = (peer.to_native(x).detach().clone() for x in setup.inputs)
    leaves = tuple(x.requires_grad_(setup.backward) for x in (query, key, value))
    return step(run, leaves, grad, setup.backward), note


def _ours(setup: Setup) -> Attention:
    pattern = setup.case.pattern()
    return lambda q, k, v: sparse_attn.attention(q, k, v, pattern)


def _check_dense(setup: Setup) -> None:
    if setup.case.length > setup.dense_up_to:
        raise Unsupported(f"left out above length {setup.dense_up_to}: quadratic")


def _sdpa_dense(setup: Setup) -> Attention:
    _check_dense(setup)
    return F.scaled_dot_product_attention


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


def _block_mask(case: Case, block: int = 128):
    """FlexAttention's block mask, a row of blocks at a time: `create_block_mask` is quadratic."""
    from torch.nn.attention.flex_attention import BlockMask

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


def _longformer(setup: Setup) -> Attention:
    """Hugging Face's LongformerSelfAttention with its six projections taken out.

    It scales the query in place, so that the given one has to be copied here.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    case = setup.case
    if case.dilation > 1:
        raise Unsupported("none: no dilation")
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
    given = {name: Given() for name in ("query", "key", "value")}
    for name, projection in given.items():
        setattr(module, name, projection)
        setattr(module, f"{name}_global", projection)
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


def _by_residue(case: Case, attention: Attention) -> Attention:
    """A dilated window by an undilated one: tokens c, c + d, c + 2d ... become a head."""
    dilation = case.dilation
    if dilation == 1:
        return attention
    if case.length % dilation:
        raise Unsupported("none: the length is not a multiple of the dilation")

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, dilation)).movedim(3, 2).flatten(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attention(split(q), split(k), split(v))
        return output.unflatten(1, (-1, dilation)).movedim(2, 3).flatten(2, 3)

    return run


def _local_attention(setup: Setup) -> Attention:
    """The local-attention package, blocks of `reach` tokens that see one block on each side.

    `exact_windowsize` then allows precisely the keys at most `reach` away.
    """
    from local_attention import LocalAttention

    case = setup.case
    if case.num_global:
        raise Unsupported("none: no global tokens")
    if case.length % (case.reach * case.dilation):
        raise Unsupported("none: the length is not a multiple of the window")
    module = LocalAttention(
        case.reach,
        look_backward=1,
        look_forward=1,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return _by_residue(case, module)


def _global_scores_mask(case: Case) -> Tensor:
    """(length, tokens), true where the window already has the global key."""
    index = torch.arange(case.length)
    return (index[:, None] - index[list(case.tokens)]).abs() <= case.reach


def _set_global_rows(case: Case, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> Tensor:
    """Replaces the rows of the global tokens, which see all keys."""
    tokens = torch.tensor(case.tokens)
    rows = (q[:, :, tokens] * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return output.index_copy(2, tokens, rows)


def _chunked_bmm(setup: Setup) -> Attention:
    """All chunks of `reach` queries at once, each against three chunks of keys that overlap."""
    case = setup.case
    reach, tokens = case.reach, list(case.tokens)
    rows = case.length // case.dilation
    if rows % reach:
        raise Unsupported("none: the length is not a multiple of the window")
    query = torch.arange(rows).view(-1, reach, 1)
    key = query[:, :1] + torch.arange(-reach, 2 * reach)
    hidden = ((query - key).abs() > reach) | (key < 0) | (key >= rows)
    seen_before = _global_scores_mask(case)

    def around(x: Tensor) -> Tensor:
        """(..., chunk, head size, 3 reach): each chunk with its two neighbors."""
        return F.pad(x, (0, 0, reach, reach)).unfold(2, 3 * reach, reach)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        scores = q.unflatten(2, (-1, reach)) @ around(k)
        scores = scores.masked_fill_(hidden, -math.inf)
        if tokens:
            extra = (q @ k[:, :, tokens].transpose(-1, -2)).masked_fill_(seen_before, -math.inf)
            scores = torch.cat((extra.unflatten(2, (-1, reach)), scores), -1)
        weights = scores.softmax(-1)
        local = weights[..., len(tokens) :] @ around(v).transpose(-1, -2)
        output = local.flatten(2, 3)
        if tokens:
            output = output + weights[..., : len(tokens)].flatten(2, 3) @ v[:, :, tokens]
        return output

    if not tokens:
        return _by_residue(case, attention)
    return lambda q, k, v: _set_global_rows(case, q, k, v, attention(q, k, v))


@dataclass(frozen=True)
class _Span:
    """A chunk of queries, the slices of the keys that it sees, and the additive mask of both."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor

    def take(self, x: Tensor) -> Tensor:
        """The keys or values of the span."""
        parts = [x[:, part] for part in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The softmax weights; q and k are (heads, length, head size)."""
        query, scale = q[:, self.queries], q.shape[-1] ** -0.5
        key = self.take(k).transpose(1, 2)
        return torch.baddbmm(self.mask, query, key, alpha=scale).softmax(-1)


def _spans(case: Case, chunk: int, dtype: torch.dtype) -> list[_Span]:
    """The chunks of a case; global keys, if any, stand copied in front of the others."""
    reach, num_global = case.reach, case.num_global
    rows = case.length // case.dilation
    offset = torch.arange(-reach, chunk + reach) - torch.arange(chunk)[:, None]
    band = torch.where(offset.abs() <= reach, 0.0, -math.inf).to(dtype)
    spans = []
    for start in range(0, rows, chunk):
        queries = slice(start, min(start + chunk, rows))
        first, last = max(0, start - reach), min(queries.stop + reach, rows)
        keys = (slice(num_global + first, num_global + last),)
        mask = band[: queries.stop - start, first - start + reach : last - start + reach]
        if num_global:
            seen_before = _global_scores_mask(case)[queries]
            extra = torch.zeros(seen_before.shape, dtype=dtype).masked_fill(seen_before, -math.inf)
            mask, keys = torch.cat((extra, mask), 1), (slice(num_global), *keys)
        spans.append(_Span(queries, keys, mask))
    return spans


def _loop(q: Tensor, k: Tensor, v: Tensor, spans: list[_Span]) -> Tensor:
    return torch.cat([span.weights(q, k) @ span.take(v) for span in spans], 1)


class _TunedLoop(torch.autograd.Function):
    """The loop with a backward by hand, which adds to slices of the gradients in place.

    Autograd makes a gradient of full length for every slice instead: quadratic, and 1.5 to 3 times
    slower at 4096 and 16384 tokens.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: list[_Span]) -> Tensor:
        weights = [span.weights(q, k) for span in spans]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.spans = spans
        return torch.cat([w @ span.take(v) for w, span in zip(weights, spans, strict=True)], 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for w, span in zip(weights, ctx.spans, strict=True):
            query, grad_out = q[:, span.queries], grad[:, span.queries]
            grad_w = grad_out @ span.take(v).transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_w, w, -1, w.dtype)
            grad_q[:, span.queries] = (grad_scores @ span.take(k)).mul_(scale)
            column = 0
            for part in span.keys:
                columns = slice(column, column := column + part.stop - (part.start or 0))
                grad_v[:, part].baddbmm_(w[:, :, columns].transpose(1, 2), grad_out)
                scores = grad_scores[:, :, columns].transpose(1, 2)
                grad_k[:, part].baddbmm_(scores, query, alpha=scale)
        return grad_q, grad_k, grad_v, None


def _chunk_loop_of(setup: Setup, chunk: int, tuned: bool) -> Attention:
    """A loop over chunks of queries: bmm, softmax, bmm on the slice of the keys in reach."""
    case, tokens = setup.case, list(setup.case.tokens)
    spans = _spans(case, chunk, setup.inputs[0].dtype)
    loop = _TunedLoop.apply if tuned and setup.backward else _loop

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if tokens:
            k, v = (torch.cat((x[:, tokens], x), 1) for x in (k, v))
        return loop(q, k, v, spans).view(shape)

    if not tokens:
        return _by_residue(case, attention)
    return lambda q, k, v: _set_global_rows(case, q, k, v, attention(q, k, v))


def _chunk_loop(setup: Setup, tuned: bool = False) -> tuple[Attention, str]:
    """The chunk loop with its best chunk size, tried in turn before the timing."""
    *leaves, grad = (x.detach().clone() for x in setup.inputs)
    leaves = tuple(x.requires_grad_(setup.backward) for x in leaves)
    runs = {chunk: _chunk_loop_of(setup, chunk, tuned) for chunk in CHUNKS}
    best = dict.fromkeys(CHUNKS, math.inf)
    for _ in range(4):
        for chunk, run in runs.items():
            best[chunk] = min(best[chunk], once(step(run, leaves, grad, setup.backward)))
        if max(best.values()) > 1.0:
            break  # long enough to tell
    chosen = min(best, key=best.__getitem__)
    return runs[chosen], f"chunks of {chosen}"


def _to_longformer(x: Tensor) -> Tensor:
    """(batch, heads, length, size) to (length, batch, heads * size)."""
    return x.permute(2, 0, 1, 3).flatten(2)


def _from_longformer(x: Tensor, head_dim: int = 64) -> Tensor:
    return x.unflatten(2, (-1, head_dim)).permute(1, 2, 0, 3)


OURS = "sparse_attn"
PEERS = {
    OURS: Peer(_ours),
    "sdpa_dense": Peer(_sdpa_dense, dense=True),
    "sdpa_mask": Peer(_sdpa_mask),
    "flex_attention": Peer(_flex_attention),
    "longformer": Peer(_longformer, _to_longformer, _from_longformer),
    "local_attention": Peer(_local_attention),
    "chunked_bmm": Peer(_chunked_bmm),
    "chunk_loop": Peer(_chunk_loop),
    "chunk_loop_tuned": Peer(partial(_chunk_loop, tuned=True)),
}
