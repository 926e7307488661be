"""Chunked LSH attention against its definition, token by token."""

import math
import subprocess
import sys

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.functional import chunked_lsh_attention, lsh_buckets


def inputs(batch=2, heads=2, length=50, size=8, value_size=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, length, columns, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_()
        for columns in (size, value_size)
    ]


def rotations_of(heads, size, rounds, buckets, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, size, rounds, buckets // 2, generator=generator).to(DEVICE)


def times_seen(buckets, chunk, before, after, hidden, is_causal):
    """How often each token sees each other in one set: (rounds, length, length), by (rounds,
    length) buckets; −1 chunks are the last ones."""
    rounds, length = buckets.shape
    filled = -(-length // chunk) * chunk
    ring = []
    for r in range(rounds):
        # Hidden tokens and those that fill up stand behind all buckets.
        bucket = [math.inf if hidden[t] else buckets[r, t].item() for t in range(length)]
        bucket += [math.inf] * (filled - length)
        ring += [(r, t) for t in sorted(range(filled), key=lambda t: (bucket[t], t))]
    chunks = [ring[i : i + chunk] for i in range(0, len(ring), chunk)]
    times = torch.zeros(rounds, length, length, dtype=torch.float64)
    for c, tokens in enumerate(chunks):
        keys = [key for s in range(c - before, c + after + 1) for _, key in chunks[s % len(chunks)]]
        for r, token in tokens:
            for key in keys:
                if token < length and key < length and key != token and not hidden[key]:
                    times[r, token, key] += not is_causal or key < token
    return times


def definition(query_key, value, times, scale=1.0):
    """times: (batch, heads, rounds, length, length)."""
    size = query_key.shape[-1]
    norm = (query_key.square().sum(-1, keepdim=True) + 1e-6 * size).sqrt()
    scores = scale * query_key @ (query_key / norm).mT
    # All rounds are one softmax in which a key counts as often as it was seen.
    scores = scores + times.to(scores).sum(2).log()
    alone = times.sum((2, 4)) == 0
    weights = scores.masked_fill(alone[..., None].to(scores.device), 0).softmax(-1)
    eye = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    return torch.where(alone[..., None].to(scores.device), eye, weights) @ value


def expected_of(tensors, rotations, chunk, before, after, hidden, is_causal, scale=1.0):
    batch, heads, length = tensors[0].shape[:3]
    buckets = lsh_buckets(tensors[0], rotations)
    hidden = torch.zeros(batch, length).bool() if hidden is None else hidden
    if length <= chunk:
        buckets, chunk, before, after = torch.zeros_like(buckets[:, :, :1]), length, 0, 0
    times = [
        times_seen(buckets[b, h].cpu(), chunk, before, after, hidden[b].tolist(), is_causal)
        for b in range(batch)
        for h in range(heads)
    ]
    times = torch.stack(times).unflatten(0, (batch, heads))
    return definition(*tensors, times, scale)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_definition(data):
    length, chunk = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([1, 4, 7, 16]))
    before, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    rounds, buckets = data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(1, 4))
    is_causal = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 99))
    tensors = inputs(length=length, size=4, value_size=3, seed=seed)
    hidden = None
    if data.draw(st.booleans()):
        hidden = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    rotations = rotations_of(2, 4, rounds, buckets, seed)
    output = chunked_lsh_attention(
        *tensors,
        num_hashes=rounds,
        chunk_length=chunk,
        chunks_before=before,
        chunks_after=after,
        rotations=rotations,
        is_causal=is_causal,
        key_padding_mask=None if hidden is None else hidden.to(DEVICE),
        scale=0.7,
    )
    expected = expected_of(tensors, rotations, chunk, before, after, hidden, is_causal, 0.7)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weight).sum(), tensors) for x in (output, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """Twice the error of the definition in the same dtype, which rounds more: it is dense."""
    tensors = [x.detach() for x in inputs(length=90, dtype=dtype)]
    rotations = rotations_of(2, 8, 2, 8)
    output = chunked_lsh_attention(
        *tensors, num_hashes=2, chunk_length=16, rotations=rotations, is_causal=True
    )
    assert output.dtype == dtype
    wide = [x.double() for x in tensors]
    buckets_alike = torch.equal(lsh_buckets(tensors[0], rotations), lsh_buckets(wide[0], rotations))
    assert buckets_alike
    exact = expected_of(wide, rotations, 16, 1, 0, None, True)
    own = expected_of(tensors, rotations, 16, 1, 0, None, True).double()
    error, budget = ((x.double() - exact).abs().max().item() for x in (output, own))
    assert error <= 2 * budget + torch.finfo(dtype).eps * exact.abs().max().item()


def test_gradcheck():
    tensors = inputs(1, 1, 11, size=4, value_size=3)
    options = {"num_hashes": 2, "chunk_length": 4, "rotations": rotations_of(1, 4, 2, 4)}
    for is_causal in (False, True):
        function = lambda *x, c=is_causal: chunked_lsh_attention(*x, is_causal=c, **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_hidden_tokens_do_not_matter(bad):
    tensors = inputs(length=60, dtype=torch.float32)
    hidden = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.3
    spoiled = [
        x.detach().masked_fill(hidden[:, None, :, None], bad).requires_grad_() for x in tensors
    ]
    results = []
    for both in (tensors, spoiled):
        output = chunked_lsh_attention(
            *both, num_buckets=4, num_hashes=2, chunk_length=8, key_padding_mask=hidden
        )
        output = output.masked_fill(hidden[:, None, :, None], 0)
        gradients = torch.autograd.grad(output.square().sum(), both)
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_later_tokens_do_not_matter_to_causal_rows_of_a_chunk():
    """One chunk: nothing is sorted, so that what comes later cannot move anything."""
    query_key, value = (x.detach() for x in inputs(length=30))
    later = [
        torch.cat([x[:, :, :20], torch.randn_like(x[:, :, 20:])], 2) for x in (query_key, value)
    ]
    options = {"chunk_length": 32, "is_causal": True}
    outputs = [chunked_lsh_attention(*x, **options) for x in ((query_key, value), later)]
    assert torch.equal(outputs[0][:, :, :20], outputs[1][:, :, :20])


def test_dropout():
    query_key, value = inputs(length=64)
    value = torch.ones_like(value)
    seed = torch.tensor(3, device=DEVICE)
    options = {"num_buckets": 4, "chunk_length": 16, "dropout_p": 0.5}
    first = chunked_lsh_attention(query_key, value, dropout_seed=seed, **options)
    assert torch.equal(first, chunked_lsh_attention(query_key, value, dropout_seed=seed, **options))
    assert 0.8 < first.mean() < 1.2
    assert first.std() > 0.05


@pytest.mark.parametrize(("batch", "length", "value_size"), [(0, 40, 3), (2, 0, 3), (2, 40, 0)])
def test_nothing_at_all(batch, length, value_size):
    tensors = inputs(batch, length=length, value_size=value_size)
    output = chunked_lsh_attention(*tensors, num_buckets=4, num_hashes=2, chunk_length=8)
    assert output.shape == (batch, 2, length, value_size)
    output.sum().backward()


def test_wrong_arguments():
    tensors = [x.detach() for x in inputs()]
    for error, options in (
        (ValueError, {"num_buckets": 5}),
        (ValueError, {"num_buckets": [4, 3]}),
        (ValueError, {"num_buckets": []}),
        (TypeError, {"num_buckets": 2.0}),
        (ValueError, {"num_hashes": 0}),
        (TypeError, {"num_hashes": True}),
        (ValueError, {"chunk_length": 0}),
        (ValueError, {"chunks_before": -1}),
        (TypeError, {"seed": "x", "chunk_length": 8}),
        (TypeError, {"is_causal": 1}),
        (ValueError, {"rotations": torch.zeros(3, 8, 1, 2), "chunk_length": 8}),
        (TypeError, {"rotations": torch.zeros(2, 8, 1, 2).int(), "chunk_length": 8}),
        (TypeError, {"key_padding_mask": torch.zeros(2, 50)}),
        (ValueError, {"key_padding_mask": torch.zeros(2, 49).bool()}),
    ):
        with pytest.raises(error, match="sparse_attn: expected"):
            chunked_lsh_attention(*tensors, **options)


PROBE = """
import torch
from sparse_attn.functional import chunked_lsh_attention, routing_attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    x = torch.randn(1, 1, n, 16, requires_grad=True)
    before = peak()
    {call}.sum().backward()
    return peak() - before

step(1024)
print(step(65536))
"""
CALLS = {
    "chunked": "chunked_lsh_attention(x, x, chunk_length=32)",
    # As many clusters for each length: the scores of all tokens for all are not what is tested.
    "routing": "routing_attention(x, x, x, torch.randn(1, 64, 16), window=128)",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name):
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(call=CALLS[name])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # A bias of 64 float32 for each token, or scores, are 16 tensors of 4 MiB, and what makes them
    # as much again. One row of scores per query would be 16 GiB.
    assert int(result.stdout) <= 64 * 65536 * 16 * 4
