"""topk_attention, threshold_attention and the ops that choose their keys, against the dense
definition."""

import math
import subprocess
import sys

import cases
import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import functional as F

ops = torch.ops.sparse_attn


def visible(n_q, n_k, is_causal, padding):
    """(batch, 1, n_q, n_k) bool."""
    seen = ~padding[:, None, None].expand(-1, 1, n_q, n_k)
    if is_causal:
        seen = seen & (torch.arange(n_k) <= torch.arange(n_q)[:, None] + n_k - n_q).to(seen.device)
    return seen


def top_pairs(logits, seen, k):
    """The k largest logits that are seen, ties to the lower index."""
    order = logits.masked_fill(~seen, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :k], True) & seen


def listed_pairs(indices, counts, n_k):
    """Pairs of the lists, which must be ascending, and 0 where they end."""
    holds = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    assert indices.dtype == counts.dtype == torch.int32
    assert not indices.masked_fill(holds, 0).any()
    assert ((indices.diff() > 0) | ~holds[..., 1:]).all()
    pairs = torch.zeros(*counts.shape, n_k + 1, dtype=torch.bool, device=counts.device)
    return pairs.scatter(-1, indices.long().masked_fill(~holds, n_k), True)[..., :n_k]


def softmax_over(logits, pairs, value):
    return logits.masked_fill(~pairs, -math.inf).softmax(-1).nan_to_num() @ value


def integers(n_q, n_k, size, dtype, seed=0, heads_kv=2):
    """Small integers, so that products are exact and many are equal; some keys padded, with NaN."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randint(-2, 3, (2, heads, n, size), generator=generator).to(DEVICE, dtype)
        for n, heads in ((n_q, 4), (n_k, heads_kv))
    )
    padding = (torch.rand(2, n_k, generator=generator) < 0.2).to(DEVICE)
    return query, key, padding


def check_lists(dtype, n_q=70, n_k=150, size=5, k=9, seed=0, **options):
    """All three ops on integers."""
    query, key, padding = integers(n_q, n_k, size, dtype, seed)
    is_causal, scale = options.get("is_causal", False), options.get("scale", 0.3)
    wide = torch.promote_types(dtype, torch.float32)
    logits = query.to(wide) @ key.to(wide).repeat_interleave(2, 1).mT * scale
    seen = visible(n_q, n_k, is_causal, padding)
    key = key.masked_fill(padding[:, None, :, None], math.nan)
    given = {"key_padding_mask": padding, "is_causal": is_causal, "scale": scale}
    given["enable_gqa"] = True
    indices, counts = ops.top_keys(query, key, k, **given)
    assert indices.shape == (2, 4, n_q, k)
    assert torch.equal(listed_pairs(indices, counts, n_k), top_pairs(logits, seen, k))
    bounds = torch.full((2, 4, n_q), 2 * scale, dtype=wide, device=DEVICE)
    indices, counts = ops.keys_above(query, key, bounds, **given)
    assert indices.shape[-1] == (counts.max() if counts.numel() else 0)
    assert torch.equal(listed_pairs(indices, counts, n_k), (logits >= bounds[..., None]) & seen)
    expected = logits.double().masked_fill(~seen, -math.inf).logsumexp(-1)
    lse = ops.keys_logsumexp(query, key, **given)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(lse, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=15 if cases.CUDA_KERNELS else 100, deadline=None)
@given(
    dtype=st.sampled_from(cases.DTYPES),
    n_q=st.integers(1, 140),
    n_k=st.integers(1, 300),
    size=st.sampled_from([1, 3, 16, 33]),
    k=st.sampled_from([1, 2, 7, 40, 64, 100, 400]),
    is_causal=st.booleans(),
    scale=st.sampled_from([0.3, -1.0, 0.0]),
    seed=st.integers(0, 1000),
)
def test_lists_are_those_of_the_definition(dtype, n_q, n_k, size, k, is_causal, scale, seed):
    check_lists(dtype, n_q, n_k, size, k, seed, is_causal=is_causal, scale=scale)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
@pytest.mark.parametrize("k", [1, 5, 130])
def test_keys_in_order(order, k):
    """Each key better than all before, which fills the lists again and again; or each worse."""
    n_k = 1000
    ranks = {"ascending": torch.arange(n_k), "descending": -torch.arange(n_k)}
    key = ranks.get(order, torch.zeros(n_k)).float().to(DEVICE).view(1, 1, n_k, 1)
    indices, counts = ops.top_keys(torch.ones(1, 1, 3, 1, device=DEVICE), key, k)
    first = n_k - k if order == "ascending" else 0
    assert (counts == k).all()
    assert (indices == torch.arange(first, first + k, device=DEVICE)).all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", ["topk", "threshold", "score"])
def test_attention_equals_the_dense_definition(method, is_causal, dtype):
    """Error at most twice torch's own; with this seed no logit is within rounding of a bound."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, 2, n, size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for n, size in ((37, 8), (50, 8), (50, 5))
    )
    padding = (torch.rand(2, 50, generator=generator) < 0.2).to(DEVICE)
    seen = visible(37, 50, is_causal, padding)
    exact = [x.double() for x in (query, key, value)]
    logits = exact[0] @ exact[1].mT / math.sqrt(8)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    pairs, call = {
        "topk": (top_pairs(logits, seen, 6), {"k": 6}),
        "threshold": (weights >= 0.04, {"threshold": 0.04}),
        "score": ((logits >= 1.2) & seen, {"score_threshold": 1.2}),
    }[method]
    assert 0 < pairs.sum() < seen.expand_as(pairs).sum()
    if method == "score":
        assert not pairs.any(-1).all()  # queries without keys
    expected = softmax_over(logits, pairs, exact[2])
    own = softmax_over(query @ key.mT / math.sqrt(8), pairs, value)
    hidden = [x.masked_fill(padding[:, None, :, None], math.nan) for x in (key, value)]
    function = F.topk_attention if method == "topk" else F.threshold_attention
    output = function(query, *hidden, **call, is_causal=is_causal, key_padding_mask=padding)
    assert output.dtype == dtype
    error, limit = ((x.double() - expected).abs().max().item() for x in (output, own))
    assert error <= 2 * max(limit, 1e-15)  # the expected numbers are float64 themselves


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_equal_keys_reach_one_divided_by_their_number(dtype):
    for n in range(1, 130):
        query, key = torch.randn(1, 1, 3, 7), torch.randn(1, 1, 1, 7).expand(1, 1, n, 7)
        query, key = query.to(DEVICE, dtype), key.to(DEVICE, dtype)
        _, weights = F.threshold_attention(query, key, key, 1 / n, return_weights=True)
        assert weights.values.numel() == 3 * n


def test_limits_are_dense():
    query, key, value = (torch.randn(1, 2, 40, 8, device=DEVICE) for _ in range(3))
    for is_causal, pattern in ((False, sparse_attn.Full()), (True, sparse_attn.Causal())):
        dense = sparse_attn.attention(query, key, value, pattern)
        for output in (
            F.topk_attention(query, key, value, 40, is_causal=is_causal),
            F.topk_attention(query, key, value, 10**12, is_causal=is_causal),
            F.threshold_attention(query, key, value, 0, is_causal=is_causal),
        ):
            assert torch.equal(output, dense)
        all_keys = F.threshold_attention(
            query, key, value, score_threshold=-math.inf, is_causal=is_causal
        )
        torch.testing.assert_close(all_keys, dense)
    assert not F.threshold_attention(query, key, value, score_threshold=1e9).any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients(is_causal):
    inputs = [
        torch.randn(1, heads, n, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for n, heads in ((7, 2), (9, 1), (9, 1))
    ]
    padding = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    padding[:, 2] = True
    options = {"is_causal": is_causal, "key_padding_mask": padding, "enable_gqa": True}

    def calls(query, key, value):
        return (
            F.topk_attention(query, key, value, 3, **options),
            F.threshold_attention(query, key, value, 0.15, **options),
            F.threshold_attention(query, key, value, score_threshold=0.3, **options),
        )

    assert torch.autograd.gradcheck(calls, inputs)


def test_who_sees_a_nan_shows_it():
    query, key = torch.randn(2, 1, 1, 30, 4, device=DEVICE)
    key[:, :, 7] = math.nan
    for output in (
        F.topk_attention(query, key, key, 3, is_causal=True),
        F.threshold_attention(query, key, key, 0.1, is_causal=True),
        F.threshold_attention(query, key, key, score_threshold=0.0, is_causal=True),
    ):
        assert not output[:, :, :7].isnan().any()
        assert output[:, :, 7:].isnan().any(-1).all()


def test_later_keys_change_nothing_before():
    query, key, value = (torch.randn(1, 2, 100, 8, device=DEVICE) for _ in range(3))
    changed = [torch.cat([x[:, :, :60], 3 * x[:, :, 60:]], 2) for x in (key, value)]
    for function, argument in ((F.topk_attention, 5), (F.threshold_attention, 0.05)):
        before, after = (
            function(query, *x, argument, is_causal=True) for x in ((key, value), changed)
        )
        assert torch.equal(before[:, :, :60], after[:, :, :60])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the threads of the CPU")
def test_any_number_of_threads_gives_the_same_bits():
    query, key, value = (torch.randn(1, 3, 300, 16, requires_grad=True) for _ in range(3))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            for output in (
                F.topk_attention(query, key, value, 20),
                F.threshold_attention(query, key, value, 0.01),
            ):
                results.append((output, *torch.autograd.grad(output.sum(), (query, key, value))))
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, results[i % 2], strict=True))


def test_opcheck():
    query, key = (torch.randn(1, 2, n, 8, device=DEVICE, requires_grad=True) for n in (20, 30))
    bounds = torch.zeros(1, 2, 20, device=DEVICE)
    options = {"is_causal": True, "key_padding_mask": torch.zeros(1, 30, dtype=torch.bool)}
    options["key_padding_mask"] = options["key_padding_mask"].to(DEVICE)
    torch.library.opcheck(ops.top_keys.default, (query, key, 5), options)
    torch.library.opcheck(ops.keys_above.default, (query, key, bounds), options)
    torch.library.opcheck(ops.keys_logsumexp.default, (query, key), options)


def test_compiles_and_casts():
    inputs = [torch.randn(1, 2, 50, 8, device=DEVICE, requires_grad=True) for _ in range(3)]

    def call(query, key, value):
        return F.topk_attention(query, key, value, 5, is_causal=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), call(*inputs))
    compiled(*inputs).sum().backward()
    assert all(x.grad is not None for x in inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = call(*inputs)
        assert F.threshold_attention(*inputs, 0.05).dtype == torch.bfloat16
        assert torch.equal(output, call(inputs[0], *(x.bfloat16() for x in inputs[1:])))
    assert torch.equal(output, call(*(x.bfloat16() for x in inputs)))
    with torch.inference_mode():
        assert torch.equal(call(*inputs), call(*(x.detach() for x in inputs)))


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_empty_sizes(batch, n_q, n_k):
    query, key = (torch.randn(batch, 2, n, 8, device=DEVICE) for n in (n_q, n_k))
    for output in (
        F.topk_attention(query, key, key, 3),
        F.threshold_attention(query, key, key, 0.3),
        F.threshold_attention(query, key, key, score_threshold=0.3),
    ):
        assert output.shape == query.shape
        assert not output.any()


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "k to be at least 1, got 0", {"k": 0}),
        (TypeError, "k to be an int, got 2.5", {"k": 2.5}),
        (TypeError, "k to be an int, got True", {"k": True}),
        (TypeError, "options of topk_attention .* got gate", {"k": 1, "gate": None}),
        (ValueError, "one of threshold and score_threshold, got none", {}),
        (ValueError, "got both", {"threshold": 0.1, "score_threshold": 0.1}),
        (ValueError, r"threshold to be in \[0, 1\], got 1.5", {"threshold": 1.5}),
        (ValueError, "score_threshold to be a number, got nan", {"score_threshold": math.nan}),
        (TypeError, "threshold to be a number, got 'x'", {"threshold": "x"}),
        (ValueError, "scale to be finite", {"k": 1, "scale": math.inf}),
    ],
)
def test_says_what_is_wrong(error, words, arguments):
    x = torch.randn(1, 2, 8, 4, device=DEVICE)
    function = F.topk_attention if "k" in arguments else F.threshold_attention
    with pytest.raises(error, match=words):
        function(x, x, x, **arguments)


def test_ops_say_what_is_wrong():
    x, bounds = torch.randn(1, 2, 8, 4, device=DEVICE), torch.zeros(1, 2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="k to be at least 1, got 0"):
        ops.top_keys(x, x, 0)
    with pytest.raises(ValueError, match="key of shape"):
        ops.top_keys(x, x[..., :3], 1)
    with pytest.raises(ValueError, match="bounds of shape"):
        ops.keys_above(x, x, bounds[..., :3])
    with pytest.raises(TypeError, match="bounds to be a dense tensor of dtype Float"):
        ops.keys_above(x, x, bounds.double())


@pytest.mark.parametrize("name", ["top", "weight", "score"])
def test_layers(name):
    x = torch.randn(2, 20, 32, device=DEVICE)
    padding = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    padding[:, -3:] = True
    make, function = {
        "top": (lambda **o: sparse_attn.TopKSelfAttention(32, 4, k=5, **o), F.topk_attention),
        "weight": (
            lambda **o: sparse_attn.ThresholdSelfAttention(32, 4, threshold=0.06, **o),
            F.threshold_attention,
        ),
        "score": (
            lambda **o: sparse_attn.ThresholdSelfAttention(32, 4, score_threshold=0.1, **o),
            lambda *a, **o: F.threshold_attention(*a[:3], score_threshold=a[3], **o),
        ),
    }[name]
    argument = {"top": 5, "weight": 0.06, "score": 0.1}[name]
    layer = make(causal=True, device=DEVICE)
    heads = (
        p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (layer.query, layer.key, layer.value)
    )
    expected = function(*heads, argument, is_causal=True, key_padding_mask=padding)
    torch.testing.assert_close(layer(x, padding), layer.output(expected.transpose(1, 2).flatten(2)))
    dropping = make(dropout=0.5, device=DEVICE)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


# Peak resident memory beyond that of the inputs, in a fresh process.
PROBE = """
import torch
from sparse_attn.functional import topk_attention
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
torch.set_num_threads(1)
def step(n):
    leaves = [torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3)]
    before = peak()
    topk_attention(*leaves, 8).sum().backward()
    return peak() - before
step(256)
print(step({length}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(cases.CUDA_KERNELS, reason="/proc knows no memory of a GPU")
def test_memory_is_linear():
    run = [sys.executable, "-c", PROBE.format(length=65536)]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # The lists of keys are 2 MiB; one row of scores per query would be 16 GiB.
    assert int(result.stdout) <= 16 * 65536 * 8 * 4
