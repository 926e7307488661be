"""What stock torch can do with bmm and softmax: all chunks at once, or a loop over them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peer_setup import Attention, Setup, Unsupported, by_residue, step
from timing import once
from torch import Tensor
from workload import BigBirdCase, Case, StridedCase

CHUNKS = (64, 128, 256, 512)


def _global_scores_mask(case: Case) -> Tensor:
    """(length, tokens), true where the window already has the global key."""
    index = torch.arange(case.length)
    return (index[:, None] - index[list(case.tokens)]).abs() <= case.reach


def _set_global_rows(case: Case, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> Tensor:
    """Replaces the rows of the global tokens, which see all keys."""
    tokens = torch.tensor(case.tokens)
    return output.index_copy(2, tokens, _dense_rows(q[:, :, tokens], k, v))


def _dense_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def chunked_bmm(setup: Setup) -> Attention:
    """All chunks of queries at once, each against the keys that one of them sees, gathered."""
    case = setup.case
    if isinstance(case, BigBirdCase):
        return _bmm_of_blocks(case)
    if isinstance(case, StridedCase):
        return _bmm_strided(case)
    return _bmm_of_window(setup.window())


def _bmm_of_window(case: Case) -> Attention:
    """Chunks of `reach` queries against two or three chunks of keys, which overlap."""
    reach, right, tokens = case.reach, case.right, list(case.tokens)
    rows = case.length // case.dilation
    if rows % reach:
        raise Unsupported("none: the length is not a multiple of the window")
    query = torch.arange(rows).view(-1, reach, 1)
    key = query[:, :1] + torch.arange(-reach, reach + right)
    hidden = (query - key > reach) | (key - query > right) | (key < 0) | (key >= rows)
    seen_before = _global_scores_mask(case)

    def around(x: Tensor) -> Tensor:
        """(..., chunk, head size, keys): each chunk with its neighbors."""
        return F.pad(x, (0, 0, reach, right)).unfold(2, 2 * reach + right, reach)

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
        return by_residue(case, attention)
    return lambda q, k, v: _set_global_rows(case, q, k, v, attention(q, k, v))


def _bmm_of_blocks(case: BigBirdCase) -> Attention:
    """Every inner block against the blocks that it sees, gathered; the outer ones see all."""
    if case.length % case.block:
        raise Unsupported("none: the length is not a multiple of the block")
    inner = case.layout[1:-1]
    most = int(inner.sum(1).max())
    order = inner.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    index = order.flatten()
    hidden = ~inner.gather(1, order).repeat_interleave(case.block, 1)[:, None]

    def gathered(x: Tensor) -> Tensor:
        taken = x.unflatten(2, (-1, case.block)).index_select(2, index)
        return taken.unflatten(2, (-1, most)).flatten(3, 4)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = q.unflatten(2, (-1, case.block))
        middle = blocks[:, :, 1:-1] * q.shape[-1] ** -0.5
        scores = (middle @ gathered(k).transpose(-1, -2)).masked_fill_(hidden, -math.inf)
        middle = scores.softmax(-1) @ gathered(v)
        first, last = (_dense_rows(blocks[:, :, i], k, v) for i in (0, -1))
        return torch.cat((first, middle.flatten(2, 3), last), 2)

    return attention


def _bmm_strided(case: StridedCase) -> Attention:
    """Chunks of l queries against their window, and each residue of l against itself."""
    stride, rows = case.stride, case.length // case.stride
    if case.length % stride:
        raise Unsupported("none: the length is not a multiple of the stride")
    query = torch.arange(case.length).view(rows, stride, 1)
    key = query[:, :1] + torch.arange(-stride, stride)
    hidden = (key > query) | (query - key >= stride) | (key < 0)
    # The window has the diagonal.
    hidden_column = torch.ones(rows, rows, dtype=torch.bool).triu()

    def around(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, stride, 0)).unfold(2, 2 * stride, stride)

    def columns(x: Tensor) -> Tensor:
        """(batch, heads, residue, row, ...) of rows, or back."""
        return x.transpose(2, 3)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k_rows, v_rows = (x.unflatten(2, (rows, stride)) for x in (q, k, v))
        q = q * q.shape[-1] ** -0.5
        local = (q @ around(k)).masked_fill_(hidden, -math.inf)
        column = columns(q) @ columns(k_rows).transpose(-1, -2)
        column = column.masked_fill_(hidden_column, -math.inf)
        weights = torch.cat((local, columns(column)), -1).softmax(-1)
        near, far = weights.split((2 * stride, rows), -1)
        output = near @ around(v).transpose(-1, -2) + columns(columns(far) @ columns(v_rows))
        return output.flatten(2, 3)

    return attention


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


def _spans_of_window(case: Case, chunk: int, dtype: torch.dtype) -> list[_Span]:
    """The chunks of a window; global keys, if any, stand copied in front of the others."""
    reach, right, num_global = case.reach, case.right, case.num_global
    rows = case.length // case.dilation
    offset = torch.arange(-reach, chunk + right) - torch.arange(chunk)[:, None]
    in_band = (offset >= -reach) & (offset <= right)
    band = torch.where(in_band, 0.0, -math.inf).to(dtype)
    spans = []
    for start in range(0, rows, chunk):
        queries = slice(start, min(start + chunk, rows))
        first, last = max(0, start - reach), min(queries.stop + right, rows)
        keys = (slice(num_global + first, num_global + last),)
        mask = band[: queries.stop - start, first - start + reach : last - start + reach]
        if num_global:
            seen_before = _global_scores_mask(case)[queries]
            extra = torch.zeros(seen_before.shape, dtype=dtype).masked_fill(seen_before, -math.inf)
            mask, keys = torch.cat((extra, mask), 1), (slice(num_global), *keys)
        spans.append(_Span(queries, keys, mask))
    return spans


def _spans_of_blocks(case: BigBirdCase, dtype: torch.dtype) -> list[_Span]:
    """Every block with those that it sees, neighbors in one slice; nothing needs a mask."""
    none_hidden = torch.zeros(1, 1, dtype=dtype)
    spans = []
    for i, row in enumerate(case.layout):
        start = i * case.block
        queries = slice(start, min(start + case.block, case.length))
        keys = _runs(row.nonzero()[:, 0].tolist(), case.block, case.length)
        spans.append(_Span(queries, tuple(keys), none_hidden))
    return spans


def _runs(blocks: Iterable[int], block: int, length: int) -> list[slice]:
    """The tokens of blocks in ascending order, in as few slices as there are."""
    runs: list[slice] = []
    for i in blocks:
        start, stop = i * block, min((i + 1) * block, length)
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, stop))
    return runs


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


def _loop_of(setup: Setup, spans: list[_Span], tuned: bool) -> Attention:
    """A loop over chunks of queries: bmm, softmax, bmm on the slices of the keys in reach."""
    case = setup.case
    tokens = list(getattr(case, "tokens", ()))
    loop = _TunedLoop.apply if tuned and setup.backward else _loop

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if tokens:
            k, v = (torch.cat((x[:, tokens], x), 1) for x in (k, v))
        return loop(q, k, v, spans).view(shape)

    if isinstance(case, BigBirdCase):
        return attention
    if not tokens:
        return by_residue(case, attention)
    return lambda q, k, v: _set_global_rows(case, q, k, v, attention(q, k, v))


def chunk_loop(setup: Setup, tuned: bool = False) -> tuple[Attention, str]:
    """The chunk loop with its best chunk size, tried in turn before the timing."""
    case, dtype = setup.case, setup.inputs[0].dtype
    if isinstance(case, BigBirdCase):
        return _loop_of(setup, _spans_of_blocks(case, dtype), tuned), f"chunks of {case.block}"
    if isinstance(case, StridedCase):
        raise Unsupported("none: the queries of a chunk share no key of the stride")
    case = setup.window()
    *leaves, grad = (x.detach() for x in setup.inputs)
    leaves = tuple(x.requires_grad_(setup.backward) for x in leaves)
    spans = partial(_spans_of_window, case, dtype=dtype)
    runs = {chunk: _loop_of(setup, spans(chunk), tuned) for chunk in CHUNKS}
    best = dict.fromkeys(CHUNKS, math.inf)
    for _ in range(4):
        for chunk, run in runs.items():
            best[chunk] = min(best[chunk], once(step(run, leaves, grad, setup.backward)))
        if max(best.values()) > 0.4:
            break  # long enough to tell
    chosen = min(best, key=best.__getitem__)
    return runs[chosen], f"chunks of {chosen}"
