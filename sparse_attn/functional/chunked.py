"""Attention within chunks of tokens that are sorted by their buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.functional._chunks import Ring
from sparse_attn.functional._common import check_inputs, visible
from sparse_attn.functional._gather import finite_where
from sparse_attn.functional.hashing import bucket_factors, check_rounds, draw_rotations, lsh_buckets
from sparse_attn.functional.patterned import attention
from sparse_attn.patterns import Full
from sparse_attn.patterns.arguments import MOST, index


def chunked_lsh_attention(
    query_key: Tensor,
    value: Tensor,
    *,
    num_buckets: int | Sequence[int] | None = None,
    num_hashes: int = 1,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    seed: int | torch.Generator | None = 0,
    rotations: Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The attention of Reformer (Kitaev et al. 2020, section 2): tokens are sorted by the bucket of
    their query, then by position; chunks of the sorted tokens see themselves and their neighbours.

    Queries are keys: key = query / √(‖query‖² + head_dim · 10⁻⁶), so that logits are query · key
    without a further factor, as in trax and Hugging Face. In a chunk all tokens are seen, also
    those of other buckets; no token sees itself, unless it sees no other: then it gives its own
    value. The first chunk follows the last one. Several rounds of hashing stand one after another
    in one ring of chunks; what a token finds in each is weighed by the sums of its softmax, so
    that a key found in two rounds counts twice.

    A sequence of any length is filled up with tokens that nobody sees; padded tokens are sorted
    behind all buckets. One of at most `chunk_length` is not hashed: every token sees all others.

    Args:
        query_key: (batch, heads, length, head_dim): queries, and keys once normalised.
        value: (batch, heads, length, value_dim), as query_key.
        num_buckets: Buckets of a round, even; a list [b0, b1, …] for their product, found by hashes
            of b0, b1, … buckets. About 2 · length / chunk_length if None: a power of two, as two
            factors where it exceeds 2 · max(√(length / chunk_length), chunk_length).
        num_hashes: Rounds of hashing.
        chunk_length: Tokens of a chunk.
        chunks_before: Chunks before its own that a token sees.
        chunks_after: Chunks behind it.
        seed: Of the random rotations: an int gives the same ones at every call and on every device,
            those that Hugging Face draws with this `hash_seed` on a CPU; a torch.Generator goes on
            from where it stands; None takes torch's own.
        rotations: (heads or 1, head_dim, num_hashes, sum of num_buckets / 2) in place of seed.
        is_causal: Let a token see only those before it in the sequence. Which of these its chunk
            holds depends on the buckets of all tokens, as in the paper.
        key_padding_mask: (batch, length) bool, True = ignore this token.
        scale: Factor of the logits; 1 / √head_dim for reformer_pytorch's numbers.
        dropout_p: Probability that a key's weight is dropped; those kept are divided by 1 −
            dropout_p. The own value of a token that sees no other is not dropped.
        dropout_seed: As in `attention`.

    Returns:
        (batch, heads, length, value_dim), in query_key's dtype. No memory but that of the logits of
        one chunk by its neighbours grows faster than the inputs: rounds · length · (chunks_before +
        1 + chunks_after) · chunk_length numbers for each head.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not fit, a number of buckets is odd, or a size is too small.

    >>> query_key, value = (torch.randn(2, 4, 100, 32) for _ in range(2))
    >>> chunked_lsh_attention(query_key, value, num_hashes=2, chunk_length=16).shape
    torch.Size([2, 4, 100, 32])
    """
    check_inputs(query_key, query_key, value, key_padding_mask)
    visible(is_causal)  # its type
    num_hashes = index("num_hashes", num_hashes, 1, MOST)
    chunk_length = index("chunk_length", chunk_length, 1, MOST)
    chunks_before = index("chunks_before", chunks_before, 0, MOST)
    chunks_after = index("chunks_after", chunks_after, 0, MOST)
    batch, heads, length, head_dim = query_key.shape
    if num_buckets is None and rotations is None:
        num_buckets = default_buckets(length, chunk_length)
    factors = None if num_buckets is None else bucket_factors(num_buckets)
    if 0 in value.shape:
        return value + 0 * query_key[..., :1]
    hidden = key_padding_mask
    if hidden is not None:
        query_key, value = finite_where(hidden, query_key), finite_where(hidden, value)
    if length <= chunk_length:
        chunk_length, chunks_before, chunks_after = length, 0, 0
        order = torch.arange(length, device=value.device).expand(batch, heads, 1, length)
    else:
        if rotations is None:
            axes = sum(factors or ()) // 2
            rotations = draw_rotations(seed, (heads, head_dim, num_hashes, axes), query_key)
        buckets = lsh_buckets(query_key, rotations, factors)
        check_rounds(buckets, num_hashes)
        tail = -length % chunk_length
        query_key, value = pad(query_key, (0, 0, 0, tail)), pad(value, (0, 0, 0, tail))
        if hidden is not None or tail:
            hidden = value.new_zeros(batch, length).bool() if hidden is None else hidden
            hidden = pad(hidden, (0, tail), value=True)
            # Behind all buckets.
            last = torch.iinfo(buckets.dtype).max
            buckets = pad(buckets, (0, tail)).masked_fill(hidden[:, None, None], last)
        order = buckets.argsort(dim=-1, stable=True)
    if hidden is not None:
        hidden = hidden[:, None].expand(batch, heads, -1).flatten(0, 1)
    query_key, value = query_key.flatten(0, 1), value.flatten(0, 1)
    ring = Ring(order.flatten(0, 1), chunk_length, chunks_before, chunks_after)
    output, lse = attention(
        ring.own(query_key),
        ring.around(_unit_norm(query_key)),
        ring.around(value),
        Full(),
        bias=_exclude(ring, hidden, is_causal, torch.promote_types(value.dtype, torch.float32)),
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=True,
    )
    output = _join(ring, output, lse, value).unflatten(0, (batch, heads))
    return output[:, :, :length]


def default_buckets(length: int, chunk_length: int, longest: int | None = None) -> int | list[int]:
    """The number of buckets of a round that Reformer takes for sequences of a length, which it
    fills up to whole chunks.

    `longest` (that length if None) says from where on they are the product of two factors.
    """
    chunks = -(-length // chunk_length)
    most_chunks = chunks if longest is None else longest // chunk_length
    power = max((2 * chunks).bit_length() - 1, 1)
    if 2**power <= 2 * max(math.isqrt(most_chunks), chunk_length):
        return 2**power
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def _exclude(ring: Ring, hidden: Tensor | None, is_causal: bool, dtype: torch.dtype) -> Tensor:
    """A bias of −inf for what a token does not see: itself, hidden tokens, later ones.

    hidden is (sets, length); the bias (sets, chunks, chunk, seen).
    """
    tokens = torch.arange(ring.length, dtype=torch.int32, device=ring.device)
    tokens = tokens.expand(ring.sets, -1)[..., None]
    own, seen = ring.own(tokens), ring.around(tokens).mT
    excluded = seen >= own if is_causal else seen == own
    if hidden is not None:
        excluded = excluded | ring.around(hidden[..., None]).mT
    # Of one dtype: with a number in place of a tensor `where` takes twice as long.
    never, free = (excluded.new_full((), x, dtype=dtype) for x in (-math.inf, 0.0))
    return torch.where(excluded, never, free)


def _join(ring: Ring, output: Tensor, lse: Tensor, alone: Tensor) -> Tensor:
    """What a token found in all rounds; its row of `alone` if that is nothing."""
    output, lse = ring.back(output), ring.back(lse[..., None])
    nothing = lse == -math.inf
    if ring.rounds > 1:
        shares = lse.masked_fill(nothing, torch.finfo(lse.dtype).min).softmax(1)
        output = (output * shares).sum(1, keepdim=True).to(alone.dtype)
    return torch.where(nothing.all(1), alone, output.squeeze(1))


def _unit_norm(x: Tensor) -> Tensor:
    """Of √(‖x‖² + size · 10⁻⁶), in float32 for half types."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * torch.rsqrt(norm.square() + 1e-6 * x.shape[-1])).to(x.dtype)
