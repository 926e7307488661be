"""LSH and routing attention against their definitions by dense masks."""

import math

import pytest
import reference
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.functional import attention, lsh_attention, lsh_buckets, routing_attention
from sparse_attn.patterns import Causal, Full


def inputs(batch=2, heads=3, n_q=33, n_k=None, size=8, value_size=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_k = n_q if n_k is None else n_k
    shapes = (n_q, size), (n_k, size), (n_k, value_size)
    return [
        torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .requires_grad_()
        for shape in shapes
    ]


def rotations_of(heads, size, rounds, buckets, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, size, rounds, buckets // 2, generator=generator).to(DEVICE)


def dense(query, key, value, mask, scale=None):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (scale * query @ key.mT).masked_fill(~mask, -math.inf)
    seen = mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, 0.0).softmax(-1).masked_fill(~mask, 0.0)
    return weights.to(value.dtype) @ value


def causal_mask(n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool, device=DEVICE).tril(n_k - n_q)


def visible(mask, is_causal, padding):
    if is_causal:
        mask = mask & causal_mask(*mask.shape[-2:])
    return mask if padding is None else mask & ~padding[:, None, None]


def bucket_of(x, rotations):
    """argmax([xR; −xR]), written out: (batch, heads, rounds, length)."""
    products = torch.einsum("bhnd,hdra->bhrna", x.detach().float(), rotations)
    return torch.cat([products, -products], -1).argmax(-1)


def lsh_mask(query, key, rotations, is_causal=False, padding=None):
    of_queries, of_keys = bucket_of(query, rotations), bucket_of(key, rotations)
    mask = (of_queries[..., :, None] == of_keys[..., None, :]).any(2)
    return visible(mask, is_causal, padding)


def ranks(x, centroids, hidden=None):
    """(batch, heads, clusters, length): how many tokens a cluster prefers."""
    units = torch.nn.functional.normalize(x.detach(), dim=-1)
    scores = torch.einsum("hcd,bhnd->bhcn", centroids.to(x.dtype), units)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def routing_mask(query, key, centroids, window, is_causal=False, padding=None, hidden=None):
    queries = ranks(query, centroids, hidden) < window
    keys = ranks(key, centroids, padding) < window
    mask = (queries[..., :, None] & keys[..., None, :]).any(2)
    if hidden is not None:
        mask = mask & ~hidden[:, None, :, None]
    return visible(mask, is_causal, padding)


def padding_of(batch, n_k, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, n_k, generator=generator) < 0.3).to(DEVICE)


def assert_equal(tensors, output, expected):
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weight).sum(), tensors) for x in (output, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


CASES = {
    "self": (33, 33, False, False),
    "causal": (33, 33, True, False),
    "padded": (40, 40, False, True),
    "cross": (17, 50, True, True),
    "more_queries": (50, 17, True, False),
    "one_query": (1, 29, True, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rounds", "buckets"), [(1, 4), (3, 8)])
def test_lsh_is_dense_attention_within_buckets(case, rounds, buckets):
    n_q, n_k, is_causal, pads = CASES[case]
    tensors = inputs(n_q=n_q, n_k=n_k)
    rotations = rotations_of(3, 8, rounds, buckets)
    padding = padding_of(2, n_k) if pads else None
    mask = lsh_mask(*tensors[:2], rotations, is_causal, padding)
    output = lsh_attention(
        *tensors,
        num_buckets=buckets,
        num_hashes=rounds,
        rotations=rotations,
        is_causal=is_causal,
        key_padding_mask=padding,
        scale=0.7,
    )
    assert_equal(tensors, output, dense(*tensors, mask, 0.7))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("clusters", "window"), [(1, 7), (4, 9), (5, 1)])
def test_routing_is_dense_attention_within_clusters(case, clusters, window):
    n_q, n_k, is_causal, pads = CASES[case]
    tensors = inputs(n_q=n_q, n_k=n_k)
    centroids = torch.randn(3, clusters, 8, device=DEVICE)
    padding = padding_of(2, n_k) if pads else None
    hidden = padding_of(2, n_q, seed=3) if pads else None
    output = routing_attention(
        *tensors,
        centroids,
        window=window,
        is_causal=is_causal,
        key_padding_mask=padding,
        query_padding_mask=hidden,
    )
    mask = routing_mask(*tensors[:2], centroids, window, is_causal, padding, hidden)
    assert_equal(tensors, output, dense(*tensors, mask))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes(data):
    n_q, n_k = (data.draw(st.integers(1, 70)) for _ in range(2))
    is_causal, pads = (data.draw(st.booleans()) for _ in range(2))
    tensors = inputs(1, 2, n_q, n_k, size=4, value_size=3, seed=data.draw(st.integers(0, 99)))
    padding = padding_of(1, n_k) if pads else None
    shared = {"is_causal": is_causal, "key_padding_mask": padding}
    buckets, rounds = 2 * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    rotations = rotations_of(2, 4, rounds, buckets)
    output = lsh_attention(
        *tensors, num_buckets=buckets, num_hashes=rounds, rotations=rotations, **shared
    )
    mask = lsh_mask(*tensors[:2], rotations, is_causal, padding)
    torch.testing.assert_close(output, dense(*tensors, mask))
    window = data.draw(st.integers(1, 80))
    centroids = torch.randn(2, data.draw(st.integers(1, 6)), 4, device=DEVICE)
    output = routing_attention(*tensors, centroids, window=window, **shared)
    mask = routing_mask(*tensors[:2], centroids, window, is_causal, padding)
    torch.testing.assert_close(output, dense(*tensors, mask))


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_group_of_all_is_dense(is_causal):
    tensors = inputs(n_q=21, n_k=34)
    expected = attention(*tensors, Causal() if is_causal else Full())
    torch.testing.assert_close(
        lsh_attention(*tensors, num_buckets=1, is_causal=is_causal), expected
    )
    centroids = torch.randn(3, 1, 8, device=DEVICE)
    output = routing_attention(*tensors, centroids, window=34, is_causal=is_causal)
    torch.testing.assert_close(output, expected)


def test_ties_go_to_the_lower_index():
    query, key, value = inputs(1, 1, 6, 6, size=4)
    same = torch.ones(1, 1, 6, 4, dtype=torch.float64, device=DEVICE)
    centroids = torch.ones(1, 1, 4, device=DEVICE)
    output = routing_attention(same, same * key.abs().amax(), value, centroids, window=2)
    torch.testing.assert_close(output[0, 0, 1], value[0, 0, :2].mean(0))
    assert output[0, 0, 2:].eq(0).all()
    rotations = torch.zeros(1, 4, 1, 3, device=DEVICE)
    assert lsh_buckets(query, rotations).eq(0).all()


def test_buckets_do_not_depend_on_norms():
    query = inputs(n_q=64)[0].detach().float()
    rotations = rotations_of(3, 8, 2, 16)
    expected = bucket_of(query, rotations)
    scaled = query * torch.rand(64, 1, device=DEVICE).add(0.1)
    for x in (query, scaled):
        assert torch.equal(lsh_buckets(x, rotations), expected)
    of_all = lsh_buckets(query, rotations[:1])
    assert torch.equal(of_all, bucket_of(query, rotations[:1].expand(3, -1, -1, -1)))


def test_combined_buckets_count_in_a_mixed_base():
    query = inputs(n_q=50)[0].detach().float()
    rotations = rotations_of(3, 8, 2, 10)
    first, second = (bucket_of(query, part) for part in rotations.split([2, 3], -1))
    assert torch.equal(lsh_buckets(query, rotations, [4, 6]), first + 4 * second)


def test_long_inputs_are_hashed_in_slices():
    query = torch.randn(1, 2, 3001, 8, device=DEVICE)
    rotations = rotations_of(2, 8, 1, 512)
    assert torch.equal(lsh_buckets(query, rotations), bucket_of(query, rotations))


def test_seeds():
    tensors = [x.detach() for x in inputs(n_q=60)]
    state = torch.get_rng_state()

    def run(seed):
        return lsh_attention(*tensors, num_buckets=8, seed=seed)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert torch.equal(run(3), run(torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(run(generator), run(generator))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    first = run(None)
    assert not torch.equal(first, run(None))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_padding_does_not_matter(bad):
    tensors = inputs(n_q=30, dtype=torch.float32)
    padding = padding_of(2, 30)
    centroids = torch.randn(3, 4, 8, device=DEVICE)
    calls = (
        lambda *x: lsh_attention(*x, num_buckets=4, num_hashes=2, key_padding_mask=padding),
        lambda *x: routing_attention(*x, centroids, window=9, key_padding_mask=padding),
    )
    hidden = padding[:, None, :, None]
    spoiled = [
        x.detach().masked_fill(hidden, bad).requires_grad_() if i else x
        for i, x in enumerate(tensors)
    ]
    for call in calls:
        expected, output = call(*tensors), call(*spoiled)
        assert torch.equal(output, expected)
        gradients = torch.autograd.grad(output.sum(), spoiled)
        for ours, theirs in zip(
            gradients, torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_hidden_queries_take_no_places():
    query, key, value = (x.detach() for x in inputs(n_q=30))
    hidden = padding_of(2, 30)
    centroids = torch.randn(3, 4, 8, device=DEVICE)
    options = {"window": 6, "key_padding_mask": hidden, "query_padding_mask": hidden}
    expected = routing_attention(query, key, value, centroids, **options)
    other = torch.where(hidden[:, None, :, None], torch.randn_like(query), query)
    assert torch.equal(routing_attention(other, key, value, centroids, **options), expected)
    assert expected.masked_select(hidden[:, None, :, None]).eq(0).all()


def test_all_keys_hidden():
    tensors = inputs(n_q=12)
    hidden = torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    centroids = torch.randn(3, 2, 8, device=DEVICE)
    for output in (
        lsh_attention(*tensors, num_buckets=2, key_padding_mask=hidden),
        routing_attention(*tensors, centroids, window=5, key_padding_mask=hidden),
    ):
        assert output.eq(0).all()
        assert all(x.eq(0).all() for x in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_nothing_at_all(batch, n_q, n_k):
    tensors = inputs(batch, n_q=n_q, n_k=n_k)
    centroids = torch.randn(3, 2, 8, device=DEVICE)
    for output in (
        lsh_attention(*tensors, num_buckets=2, num_hashes=2),
        routing_attention(*tensors, centroids, window=3),
    ):
        assert output.shape == (batch, 3, n_q, 5)
        assert output.eq(0).all()
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    tensors = [x.detach() for x in inputs(n_q=65, dtype=dtype)]
    rotations = rotations_of(3, 8, 2, 4)
    centroids = torch.randn(3, 3, 8, device=DEVICE)
    options = {"num_buckets": 4, "num_hashes": 2, "rotations": rotations, "return_lse": True}
    mask = lsh_mask(*tensors[:2], rotations)
    reference.check(lambda q, k, v, *_: lsh_attention(q, k, v, **options), tensors, mask)
    mask = routing_mask(*(x.float() for x in tensors[:2]), centroids, 30)
    options = {"window": 30, "return_lse": True}
    reference.check(
        lambda q, k, v, *_: routing_attention(q, k, v, centroids, **options), tensors, mask
    )


def test_gradcheck():
    tensors = inputs(1, 2, 9, 11, size=4, value_size=3)
    rotations = rotations_of(2, 4, 2, 4)
    centroids = torch.randn(2, 2, 4, device=DEVICE)
    options = {"num_buckets": 4, "num_hashes": 2, "rotations": rotations}

    def seen(lse):
        return lse.masked_fill(lse == -math.inf, 0)

    for function in (
        lambda *x: lsh_attention(*x, **options),
        lambda *x: routing_attention(*x, centroids, window=6),
        lambda *x: seen(routing_attention(*x, centroids, window=6, return_lse=True)[1]),
    ):
        assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(
        lambda *x: routing_attention(*x, centroids, window=6), tensors
    )


def test_shared_key_heads():
    query, key, value = inputs(heads=4)
    key, value = key[:, :2], value[:, :2]
    rotations = rotations_of(4, 8, 1, 4)
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    centroids = torch.randn(4, 3, 8, device=DEVICE)
    lsh = {"num_buckets": 4, "rotations": rotations}
    torch.testing.assert_close(
        lsh_attention(query, key, value, enable_gqa=True, **lsh),
        lsh_attention(query, *repeated, **lsh),
    )
    torch.testing.assert_close(
        routing_attention(query, key, value, centroids, window=9, enable_gqa=True),
        routing_attention(query, *repeated, centroids, window=9),
    )


def test_options_reach_attention():
    tensors = inputs(n_q=40)
    centroids = torch.randn(3, 4, 8, device=DEVICE)
    sink = torch.randn(3, dtype=torch.float64, device=DEVICE)
    for call in (
        lambda **options: lsh_attention(*tensors, num_buckets=4, **options),
        lambda **options: routing_attention(*tensors, centroids, window=12, **options),
    ):
        output, lse, weights = call(return_lse=True, return_weights=True)
        torch.testing.assert_close(weights @ tensors[2], output)
        for ours, theirs in zip(call(return_lse=True), (output, lse), strict=True):
            torch.testing.assert_close(ours, theirs)
        share = torch.sigmoid(lse - sink[:, None])[..., None]
        torch.testing.assert_close(call(sink=sink), output * share)
        seed = torch.tensor(5, device=DEVICE)
        dropped = call(dropout_p=0.4, dropout_seed=seed)
        assert not torch.allclose(dropped, output)
        assert torch.equal(dropped, call(dropout_p=0.4, dropout_seed=seed))
    with pytest.raises(TypeError, match="among"):
        lsh_attention(*tensors, num_buckets=4, bias=torch.zeros(3))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of the CPU")
def test_threads_do_not_change_a_bit():
    tensors = inputs(n_q=700, dtype=torch.float32)
    centroids = torch.randn(3, 7, 8)

    def run():
        results = []
        for output in (
            lsh_attention(*tensors, num_buckets=8, num_hashes=2),
            routing_attention(*tensors, centroids, window=100, is_causal=True),
        ):
            results += [output, *torch.autograd.grad(output.square().sum(), tensors)]
        return results

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_many_clusters():
    """More than a word has bits."""
    tensors = inputs(1, 1, 90, size=4)
    centroids = torch.randn(1, 130, 4, device=DEVICE)
    output = routing_attention(*tensors, centroids, window=7)
    assert_equal(tensors, output, dense(*tensors, routing_mask(*tensors[:2], centroids, 7)))
