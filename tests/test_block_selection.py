"""block_topk_attention and choose_blocks against their definition, written out with loops."""

import math

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import functional as F


def chosen_pairs(query, key, block, keep, is_causal, padding):
    """(batch, heads, n_q, n_k) bool, by sorting the scores of each block of queries."""
    (batch, heads, n_q, _), n_k = query.shape, key.shape[2]
    pairs = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool)
    for b in range(batch):
        unpadded = [not padding[b, j] for j in range(n_k)]
        for h in range(heads):
            for begin in range(0, n_q, block):
                rows = range(begin, min(begin + block, n_q))
                counted = [i for i in rows if n_q != n_k or unpadded[i]] or list(rows)
                pooled = query[b, h, counted[:1] if is_causal else counted].double().mean(0)
                positions = [i + n_k - n_q for i in rows]
                ranked = []
                for c in range(0, n_k, block):
                    keys = [j for j in range(c, min(c + block, n_k)) if unpadded[j]]
                    if not keys or (is_causal and c > positions[-1]):
                        continue
                    own = is_causal and any(c <= p < c + block for p in positions)
                    score = (pooled @ key[b, h, keys].double().mean(0)).float().item()
                    ranked.append((-math.inf if own else -score, c))
                ranked.sort()
                count = keep if isinstance(keep, int) else math.ceil(keep * len(ranked) - 1e-9)
                for rank, (score, c) in enumerate(ranked):
                    if rank < count or score == -math.inf:
                        pairs[b, h, rows, c : c + block] = True
    if is_causal:
        pairs &= torch.arange(n_k) <= torch.arange(n_q)[:, None] + n_k - n_q
    return pairs & ~padding[:, None, None]


def dense(query, key, value, pairs):
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    logits = logits.masked_fill(~pairs.to(query.device), -math.inf)
    return logits.softmax(-1).nan_to_num() @ value


@settings(max_examples=80, deadline=None)
@given(
    n_q=st.integers(1, 20),
    n_k=st.integers(1, 20),
    block=st.sampled_from([1, 3, 4, 32]),
    keep=st.sampled_from([1, 2, 100, 0.3, 1.0]),
    is_causal=st.booleans(),
    square=st.booleans(),
    integers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(n_q, n_k, block, keep, is_causal, square, integers, seed):
    n_q = n_k if square else n_q
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator) for n in (n_q, n_k, n_k))
    if integers:  # many ties
        query, key = query.round(), key.round()
    padding = torch.rand(2, n_k, generator=generator) < 0.3
    pairs = chosen_pairs(query, key, block, keep, is_causal, padding)
    expected = dense(query.double(), key.double(), value.double(), pairs).float()
    inputs = [x.to(cases.DEVICE) for x in (query, key, value)]
    for x in inputs[1:]:
        x.masked_fill_(padding.to(x.device)[:, None, :, None], math.nan)
    output = F.block_topk_attention(
        *inputs,
        block=block,
        keep=keep,
        is_causal=is_causal,
        key_padding_mask=padding.to(cases.DEVICE),
    )
    torch.testing.assert_close(output.cpu(), expected)


def test_no_later_token_changes_what_comes_before():
    x = torch.randn(1, 2, 50, 8, device=cases.DEVICE)
    changed = x.clone()
    changed[:, :, 21:] = torch.randn(1, 2, 29, 8)
    for keep in (1, 2, 0.5):
        before, after = (
            F.block_topk_attention(t, t, t, block=8, keep=keep, is_causal=True)
            for t in (x, changed)
        )
        assert torch.equal(before[:, :, :21], after[:, :, :21])
        assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_gradients_are_those_of_the_chosen_pairs():
    query, key, value = (
        torch.randn(1, 2, 13, 4, dtype=torch.float64, device=cases.DEVICE, requires_grad=True)
        for _ in range(3)
    )
    pairs = chosen_pairs(query.cpu(), key.cpu(), 4, 2, False, torch.zeros(1, 13, dtype=torch.bool))
    assert not pairs.all()
    expected = torch.autograd.grad(dense(query, key, value, pairs).sin().sum(), (query, key, value))
    output = F.block_topk_attention(query, key, value, block=4, keep=2)
    actual = torch.autograd.grad(output.sin().sum(), (query, key, value))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_pools_by_the_maximum():
    key = torch.zeros(1, 1, 8, 1, device=cases.DEVICE)
    key[..., 1, :] = 5.0  # the largest maximum
    key[..., 6:, :] = 3.0  # the largest mean
    query = torch.ones(1, 1, 2, 1, device=cases.DEVICE)
    by_mean, by_maximum = (
        F.choose_blocks(query, key, block=2, keep=1, pool=pool).layout.flatten().tolist()
        for pool in ("mean", "max")
    )
    assert by_mean == [False, False, False, True]
    assert by_maximum == [True, False, False, False]


def test_groups_of_heads_share_keys():
    query = torch.randn(1, 4, 20, 8, device=cases.DEVICE)
    key, value = torch.randn(2, 1, 2, 20, 8, device=cases.DEVICE)
    options = {"block": 4, "keep": 2, "is_causal": True}
    output = F.block_topk_attention(query, key, value, enable_gqa=True, **options)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    torch.testing.assert_close(output, F.block_topk_attention(query, *repeated, **options))


def test_compiles():
    inputs = [torch.randn(1, 2, 50, 8, device=cases.DEVICE, requires_grad=True) for _ in range(3)]

    def call(query, key, value):
        return F.block_topk_attention(query, key, value, block=8, keep=0.5, is_causal=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), call(*inputs))
    compiled(*inputs).sum().backward()
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_empty_sizes(batch, n_q, n_k):
    query, key = (torch.randn(batch, 2, n, 8, device=cases.DEVICE) for n in (n_q, n_k))
    for keep in (2, 0.5):
        output = F.block_topk_attention(query, key, key, block=4, keep=keep)
        assert output.shape == query.shape
        assert not output.any()


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "keep to be at least 1 block, got 0", {"keep": 0}),
        (ValueError, r"keep to be a share in \(0, 1\], got 1.5", {"keep": 1.5}),
        (ValueError, "keep to be a share", {"keep": math.nan}),
        (TypeError, "keep to be a number of blocks or a share, got True", {"keep": True}),
        (TypeError, "block to be an int, got 2.5", {"block": 2.5}),
        (ValueError, "block to be at least 1, got 0", {"block": 0}),
        (ValueError, 'pool to be "mean" or "max", got \'sum\'', {"pool": "sum"}),
        (TypeError, "is_causal to be True or False, got 1", {"is_causal": 1}),
        (TypeError, "options of block_topk_attention .* got bias", {"bias": None}),
    ],
)
def test_says_what_is_wrong(error, words, arguments):
    x = torch.randn(1, 2, 8, 4, device=cases.DEVICE)
    with pytest.raises(error, match=words):
        F.block_topk_attention(x, x, x, **{"block": 4, "keep": 1, **arguments})
