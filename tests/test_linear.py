"""linear_attention and performer_attention against their dense definitions."""

import math
from functools import partial

import cases
import linear_reference as reference
import pytest
import torch
from cases import DEVICE, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from sparse_attn.functional import linear_attention, orthogonal_features, performer_attention

LENGTHS = [(67, 67), (30, 67), (67, 30), (1, 70), (130, 130)]
OPS = torch.ops.sparse_attn
FEATURES, PRODUCTS = OPS.positive_features, OPS.feature_products


def projection(count: int = 40, head_dim: int = 16, heads: int | None = None, dtype=torch.float64):
    return orthogonal_features(count, head_dim, num_heads=heads, seed=3, dtype=dtype, device=DEVICE)


def performer_pair(weights, padding=None, is_causal=False, eps=1e-4):
    """The function, and its definition in two forms."""
    options = {"is_causal": is_causal, "eps": eps}

    def ours(*x):
        given = weights.to(x[0].dtype)
        return performer_attention(*x, projection=given, key_padding_mask=padding, **options)

    def definition(*x, form=reference.by_pairs):
        scale = x[0].shape[-1] ** -0.5
        given = weights.to(x[0].dtype)
        return reference.performer(*x, given, scale, padding=padding, form=form, **options)

    return ours, definition


def linear_pair(padding=None, is_causal=False):
    options = {"is_causal": is_causal}
    return (
        lambda *x: linear_attention(*x, key_padding_mask=padding, **options),
        lambda *x, **form: reference.linear(*x, padding=padding, **options, **form),
    )


def check(pair, tensors):
    ours, definition = pair
    reference.check(ours, [definition, partial(definition, form=reference.by_sums)], tensors)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear(lengths, padded, is_causal, dtype):
    tensors = cases.inputs(Shape(*lengths, head_dim=16, value_dim=9), dtype)
    padding = cases.padding(2, lengths[1]) if padded else None
    check(linear_pair(padding, is_causal), tensors)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_performer(lengths, padded, is_causal, dtype):
    tensors = cases.inputs(Shape(*lengths, head_dim=16, value_dim=9), dtype)
    padding = cases.padding(2, lengths[1]) if padded else None
    weights = projection()
    check(performer_pair(weights, padding, is_causal), tensors)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pair", [linear_pair, lambda *x: performer_pair(projection(), *x)])
def test_half_types(pair, dtype, is_causal):
    """As if computed in float32 and then rounded."""
    tensors = cases.inputs(Shape(70, 75, head_dim=16), dtype)
    ours, definition = pair(cases.padding(2, 75), is_causal)

    def widened(*x):
        return definition(*(y if y.dtype == torch.float64 else y.float() for y in x)).to(x[0].dtype)

    reference.check(ours, [widened], tensors)


@given(
    n_q=st.integers(1, 90),
    n_k=st.integers(1, 90),
    head_dim=st.integers(1, 20),
    value_dim=st.integers(1, 20),
    count=st.integers(1, 40),
    is_causal=st.booleans(),
    padded=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    per_head=st.booleans(),
)
@settings(max_examples=40)
def test_any_sizes(n_q, n_k, head_dim, value_dim, count, is_causal, padded, size, per_head):
    tensors = cases.inputs(Shape(n_q, n_k, head_dim=head_dim, value_dim=value_dim), torch.float64)
    tensors = [size * x for x in tensors]
    padding = cases.padding(2, n_k) if padded else None
    weights = projection(count, head_dim, 4 if per_head else None)
    for pair in (linear_pair(padding, is_causal), performer_pair(weights, padding, is_causal)):
        results = [function(*tensors) for function in pair]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    tensors = cases.inputs(Shape(5, 6, head_dim=3, value_dim=2, heads=2), torch.float64)
    weights = projection(4, 3)
    padding = cases.padding(2, 6)
    for x in (*tensors, weights):
        x.requires_grad_()

    def performer(query, key, value, weights):
        return performer_attention(query, key, value, projection=weights, eps=0.01,
                                   key_padding_mask=padding, is_causal=is_causal)  # fmt: skip

    assert gradcheck(performer, (*tensors, weights), check_forward_ad=True)
    assert gradgradcheck(performer, (*tensors, weights))
    assert gradcheck(linear_pair(padding, is_causal)[0], tensors, check_forward_ad=True)
    assert gradgradcheck(linear_pair(padding, is_causal)[0], tensors)


@pytest.mark.parametrize("mode", range(3))
def test_features_of_the_op(mode):
    """Features, sums and maxima, of gradients that any of them may have."""
    x = cases.normal(2, 2, 4, 3).requires_grad_()
    weights = projection(5, 3, 2).requires_grad_()
    padding = cases.padding(2, 4) if mode else None

    def function(x, weights):
        features, sums, maximum, constant, _ = FEATURES(x, weights, padding, mode, 0.3, 0.01)
        largest = maximum + constant.unsqueeze(-1) if mode < 2 else maximum
        return features.masked_fill(features == 0, 0), sums, largest

    assert gradcheck(function, (x, weights), check_forward_ad=True)
    assert gradgradcheck(function, (x, weights))
    features, sums, *_ = FEATURES(x, weights, padding, mode, 0.3, 0.01)
    torch.testing.assert_close(features.sum(-1), sums)
    opcheck(FEATURES, (x, weights, padding, mode, 0.3, 0.01))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_products_of_features(padded, transposed):
    """The features are made again in the backward pass: the same numbers as if they were kept."""
    mode = int(transposed)
    x = cases.normal(2, 2, 4, 3).requires_grad_()
    weights = projection(5, 3, 2).requires_grad_()
    other = cases.normal(2, 2, 4 if transposed else 5, 2, seed=1).requires_grad_()
    padding = cases.padding(2, 4) if padded else None
    given = x, weights, other, padding, transposed, 0.3, 0.01
    features, _, maximum, _, index = FEATURES(x, weights, padding, mode, 0.3, 0.01)
    found = PRODUCTS(*given)
    torch.testing.assert_close(found[0], (features.mT if transposed else features) @ other)
    visible = torch.ones(2, 2, 4, dtype=torch.bool, device=DEVICE)
    if padded and not transposed:
        visible &= ~padding[:, None]
    torch.testing.assert_close(found[1][visible], maximum[visible])
    assert torch.equal(found[2][visible], index[visible])
    opcheck(PRODUCTS, given)

    def function(x, weights, other):
        return PRODUCTS(x, weights, other, *given[3:])[0]

    assert gradcheck(function, given[:3], check_forward_ad=True)
    assert gradgradcheck(function, given[:3])


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_of_heads(transposed):
    """More heads than features are made for at a time."""
    for batch, heads, n in ((3, 5, 4000), (5, 2, 20000), (2, 2, 70000)):
        x = cases.normal(batch, heads, n, 2)
        weights = projection(20, 2, heads)
        other = cases.normal(batch, heads, n if transposed else 20, 2, seed=1)
        features = FEATURES(x, weights, None, int(transposed))[0]
        expected = (features.mT if transposed else features) @ other
        torch.testing.assert_close(PRODUCTS(x, weights, other, None, transposed)[0], expected)


def test_sums():
    for lengths in ((2, 3, 70, 9, 5), (1, 1, 3000, 17, 33), (1, 2, 5, 300, 1)):
        batch, heads, n, size, value_dim = lengths
        key, value = cases.normal(batch, heads, n, size), cases.normal(batch, heads, n, value_dim)
        torch.testing.assert_close(OPS.outer_sums(key, value), key.mT @ value)
    key, value = (cases.normal(1, 2, 5, d, seed=d).requires_grad_() for d in (3, 2))
    sums = cases.normal(1, 2, 3, 2, seed=4).requires_grad_()
    for op, pair in ((OPS.outer_sums, (key, value)), (OPS.sum_products, (key, sums))):
        assert gradcheck(op, pair, check_forward_ad=True)
        assert gradgradcheck(op, pair)
        opcheck(op, pair)
    for dtype in cases.DTYPES:
        pair = [
            x.to(dtype) for x in (cases.normal(1, 2, 600, 9), cases.normal(1, 2, 600, 7, seed=1))
        ]
        exact = pair[0].double().mT @ pair[1].double()
        error = (OPS.outer_sums(*pair).double() - exact).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_converges_to_softmax_attention():
    """Sixteen times the features, about a quarter of the error."""
    query, key, value = cases.inputs(Shape(40, head_dim=8), torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.1)
    errors = []
    for count in (64, 1024, 16384):
        squares = [
            performer_attention(query, key, value, num_features=count, eps=0, scale=0.1, seed=seed)
            .sub(exact).square().mean() for seed in range(4)
        ]  # fmt: skip
        errors.append(torch.stack(squares).mean().sqrt().item())
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.02


@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_nothing_of_later_keys_comes_in(function):
    tensors = cases.inputs(Shape(200, head_dim=16))
    before = function(*tensors, is_causal=True)
    for x in tensors[1:]:
        x[:, :, 120:] *= 30
    after = function(*tensors, is_causal=True)
    assert torch.equal(before[:, :, :120], after[:, :, :120])
    assert not torch.equal(before, after)
    leaves = [x.requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves, is_causal=True)[:, :, :120].sum(), leaves)
    assert all(not grad[:, :, 120:].any() for grad in grads)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_causal_rows_are_those_of_the_keys_up_to_them(kernel):
    query, key, value = cases.inputs(Shape(50, head_dim=8), torch.float64)
    rows = performer_attention(query, key, value, kernel=kernel, is_causal=True)
    for i in (0, 1, 23, 49):
        alone = performer_attention(
            query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], kernel=kernel
        )
        torch.testing.assert_close(rows[:, :, i : i + 1], alone)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_what_padded_keys_hold_does_not_matter(function, what, is_causal):
    tensors = cases.inputs(Shape(70, head_dim=16))
    padding = cases.padding(2, 70)
    results = []
    for fill in (0.0, what):
        leaves = [tensors[0].clone().requires_grad_()]
        for x in tensors[1:]:
            leaves.append(x.masked_fill(padding[:, None, :, None], fill).requires_grad_())
        output = function(*leaves, key_padding_mask=padding, is_causal=is_causal)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(not grad[1, :, 1:].any() for grad in results[0][2:])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"kernel": "relu"}, {"eps": 0.0}], ids=str)
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_queries_without_keys(function, options, is_causal):
    if function is linear_attention and "kernel" in options:
        options = {}
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(9, 4, head_dim=16))]
    padding = torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)
    padding[1] = True
    output = function(*leaves, key_padding_mask=padding, is_causal=is_causal, **options)
    assert not output[1].any()
    assert not is_causal or not output[0, :, :5].any()
    assert output[0, :, 5:].all()
    grads = torch.autograd.grad(output.square().sum(), leaves)
    assert all(grad.isfinite().all() and not grad[1].any() for grad in grads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
@pytest.mark.parametrize("name", ["batch", "n_q", "n_k", "value_dim"])
def test_empty(name, function, is_causal):
    sizes = {"batch": 2, "n_q": 5, "n_k": 6, "value_dim": 3, "head_dim": 4} | {name: 0}
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(**sizes))]
    output = function(*leaves, is_causal=is_causal)
    assert torch.equal(output, torch.zeros_like(output))
    assert output.shape == (sizes["batch"], 4, sizes["n_q"], sizes["value_dim"])
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("is_causal", [False, True])
def test_wild_norms_stay_finite(is_causal):
    query, key, value = cases.inputs(Shape(100, head_dim=16))
    sizes = torch.logspace(-3, 3, 100, device=DEVICE)[torch.randperm(100, device=DEVICE)]
    leaves = [
        x.requires_grad_() for x in (query * sizes[:, None], key * sizes.flip(0)[:, None], value)
    ]
    weights = projection(dtype=torch.float32)
    output = performer_attention(*leaves, projection=weights, is_causal=is_causal)
    exact = reference.performer(
        *(x.double() for x in leaves), weights.double(), 0.25, is_causal=is_causal
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), leaves))
    without = performer_attention(*leaves, projection=weights, is_causal=is_causal, eps=0)
    assert without.isfinite().all()


def test_grouped_heads():
    shape = Shape(70, 75, head_dim=16, kv_heads=2)
    query, key, value = cases.inputs(shape, torch.float64)
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    for function in (linear_attention, performer_attention):
        for is_causal in (False, True):
            given = {"is_causal": is_causal, "key_padding_mask": cases.padding(2, 75)}
            grouped = function(query, key, value, enable_gqa=True, **given)
            torch.testing.assert_close(grouped, function(query, *wide, **given))


def test_feature_maps():
    tensors = cases.inputs(Shape(30, 40, head_dim=6), torch.float64)
    for phi in (torch.exp, lambda x: torch.cat([x.relu(), x.neg().relu()], -1) + 0.1):
        for is_causal in (False, True):
            ours = linear_attention(*tensors, feature_map=phi, eps=0.5, is_causal=is_causal)
            expected = reference.linear(*tensors, phi, 0.5, is_causal=is_causal)
            torch.testing.assert_close(ours, expected)
    relu = performer_attention(*tensors, projection=projection(9, 6), kernel="relu")
    scaled = projection(9, 6).mT * 6**-0.25
    expected = reference.linear(*tensors, lambda x: (x @ scaled).relu() + 1e-3, 0)
    torch.testing.assert_close(relu, expected)


def test_maps_get_half_types_as_float32():
    seen = []
    tensors = cases.inputs(Shape(5, head_dim=4), torch.bfloat16)
    output = linear_attention(*tensors, feature_map=lambda x: seen.append(x.dtype) or x.exp())
    assert seen == [torch.float32] * 2
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_autocast(function, is_causal):
    query, key, value = cases.inputs(Shape(40, head_dim=16))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = function(query, key.bfloat16(), value, is_causal=is_causal)
        doubles = function(*(x.double() for x in (query, key, value)))
    rounded = function(*(x.bfloat16() for x in (query, key, value)), is_causal=is_causal)
    assert torch.equal(output, rounded)
    assert doubles.dtype == torch.float64


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile(function, is_causal, autocast):
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(40, head_dim=16))]
    padding = cases.padding(2, 40)

    def call(*x):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return function(*x, key_padding_mask=padding, is_causal=is_causal)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for each in (call, compiled):
        output = each(*leaves)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_inference_mode_and_training_after_it(function):
    tensors = cases.inputs(Shape(20, head_dim=11))
    with torch.inference_mode():
        first = function(*tensors, is_causal=True)
    leaves = [x.requires_grad_() for x in tensors]
    second = function(*leaves, is_causal=True)
    second.sum().backward()
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("function", [linear_attention, performer_attention])
def test_threads_give_the_same_bits(function, is_causal):
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(1200, head_dim=24, batch=1, heads=3))]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output = function(*leaves, is_causal=is_causal)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_orthogonal_features():
    rows = orthogonal_features(70, 32, seed=5, dtype=torch.float64)
    for block in rows.split(32):
        products = block @ block.mT
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-12)
    lengths = orthogonal_features(4096, 32, dtype=torch.float64).square().sum(-1)
    assert abs(lengths.mean() - 32) < 1
    assert abs(lengths.var() - 64) < 8
    even = orthogonal_features(10, 9, norms="sqrt", num_heads=3)
    assert even.shape == (3, 10, 9)
    torch.testing.assert_close(even.norm(dim=-1), torch.full((3, 10), 3.0))
    state = torch.get_rng_state()
    assert torch.equal(orthogonal_features(9, 4, seed=7), orthogonal_features(9, 4, seed=7))
    assert not torch.equal(orthogonal_features(9, 4, seed=7), orthogonal_features(9, 4, seed=8))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(orthogonal_features(9, 4, seed=generator), orthogonal_features(9, 4, seed=7))
    assert not torch.equal(
        orthogonal_features(9, 4, seed=generator), orthogonal_features(9, 4, seed=7)
    )
    assert torch.equal(state, torch.get_rng_state())


def test_seeds():
    tensors = cases.inputs(Shape(20, head_dim=8))
    weights = orthogonal_features(int(8 * math.log(8)), 8, device=DEVICE)
    assert torch.equal(
        performer_attention(*tensors), performer_attention(*tensors, projection=weights)
    )
    assert not torch.equal(performer_attention(*tensors), performer_attention(*tensors, seed=1))


WRONG = [
    ({"query": None}, TypeError, ["query", "NoneType"]),
    ({"key": torch.zeros(2, 4, 5, 3)}, ValueError, ["key", "(2, 4, 5, 8)"]),
    ({"key_padding_mask": torch.zeros(2, 5)}, TypeError, ["key_padding_mask", "float32"]),
    ({"is_causal": 1}, TypeError, ["is_causal", "1"]),
    ({"enable_gqa": None}, TypeError, ["enable_gqa", "None"]),
    ({"eps": -1.0}, ValueError, ["eps", "-1.0"]),
    ({"eps": math.nan}, ValueError, ["eps", "nan"]),
    ({"eps": "1"}, TypeError, ["eps", "'1'"]),
]
WRONG_MAPS = [
    ({"feature_map": 3}, TypeError, ["feature_map", "int"]),
    ({"feature_map": lambda x: x.sum(-1)}, ValueError, ["feature_map", "(2, 4, 5)"]),
    ({"feature_map": lambda x: None}, TypeError, ["feature_map", "NoneType"]),
    ({"feature_map": lambda x: x[:, :, :2]}, ValueError, ["feature_map", "(2, 4, 2, 8)"]),
]
WRONG_PERFORMERS = [
    ({"num_features": 0}, ValueError, ["num_features", "0"]),
    ({"num_features": 2.5}, TypeError, ["num_features", "2.5"]),
    ({"seed": "a"}, TypeError, ["seed", "'a'"]),
    ({"kernel": "exp"}, ValueError, ["kernel", "'exp'"]),
    ({"scale": -1.0}, ValueError, ["scale", "-1.0"]),
    ({"scale": math.inf}, ValueError, ["scale", "inf"]),
    ({"projection": torch.zeros(3, 7)}, ValueError, ["projection", "(3, 7)"]),
    ({"projection": torch.zeros(3, 9, 8)}, ValueError, ["projection", "(3, 9, 8)"]),
    ({"projection": torch.zeros(0, 8)}, ValueError, ["projection", "(0, 8)"]),
    ({"projection": [1.0]}, TypeError, ["projection", "list"]),
    ({"projection": torch.zeros(9, 8), "num_features": 8}, ValueError, ["num_features", "9"]),
]


@pytest.mark.parametrize(
    ("function", "other", "exception", "words"),
    [(linear_attention, *case) for case in WRONG + WRONG_MAPS]
    + [(performer_attention, *case) for case in WRONG + WRONG_PERFORMERS],
)
def test_wrong_input(function, other, exception, words):
    tensors = dict(zip(("query", "key", "value"), cases.inputs(Shape(5, head_dim=8)), strict=True))
    other = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in other.items()}
    with pytest.raises(exception, match="sparse_attn: expected") as caught:
        function(**(tensors | other))
    assert all(word in str(caught.value) for word in words), caught.value
