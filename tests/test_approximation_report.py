"""Reports on patterns and functions against the dense definition, written out."""

import functools
import json
import math

import cases
import pytest
import torch
from cases import DEVICE, Shape
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import (
    Causal,
    Full,
    Global,
    PerHead,
    Window,
    approximation_report,
    attention,
)
from sparse_attn.functional import index_attention

MASSES = ("mass", "overlap", "error", "largest_error")


def dense(query, key, value, allowed, padding=None, scale=None):
    """Weights and output in float64 of the pairs allowed; rows without a key are 0."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    allowed = allowed.to(DEVICE).expand(*query.shape[:2], *allowed.shape[-2:])
    if padding is not None:
        allowed = allowed & ~padding[:, None, None]
        key, value = (x.masked_fill(padding[:, None, :, None], 0) for x in (key, value))
    logits = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    weights = logits.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)
    return weights, weights @ value


def figures(exact, given, used, left_out=None):
    """Of each head and of all: mass, overlap, relative error, largest error."""
    (weights, output), (approximate, approximate_output) = exact, given
    counted = weights.sum(-1) > 0
    if left_out is not None:
        counted = counted & ~left_out[:, None]
    mass, overlap = (weights * used).sum(-1), torch.minimum(weights, approximate).sum(-1)
    difference = approximate_output - output
    result = {name: [] for name in MASSES}
    for heads in (*([h] for h in range(weights.shape[1])), list(range(weights.shape[1]))):
        rows = counted[:, heads]
        lost = difference[:, heads][rows]
        result["mass"].append(mass[:, heads][rows].mean().item())
        result["overlap"].append(overlap[:, heads][rows].mean().item())
        result["error"].append((lost.norm() / output[:, heads][rows].norm()).item())
        result["largest_error"].append(lost.abs().max().item())
    return result


def check(report, expected, tolerance):
    for name in MASSES:
        measured = [*getattr(report, f"{name}_per_head"), getattr(report, name)]
        assert measured == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


def check_pattern(expression, shape, dtype=torch.float64, tolerance=1e-10, **options):
    """A report on a pattern against masks of the tests' own reference."""
    query, key, value = cases.inputs(shape, dtype)
    n_k = key.shape[2]
    allowed = cases.mask(expression, shape.n_q, n_k, shape.heads)
    full = torch.ones_like(allowed)
    causal = options.get("is_causal")
    causal = cases.library(expression).causal if causal is None else causal
    if causal:
        full = cases.mask("Causal()", shape.n_q, n_k)
        allowed = allowed & full if options.get("is_causal") else allowed
    padding = options.get("key_padding_mask")
    parts = padding, options.get("scale")
    exact = dense(query, key, value, full, *parts)
    sparse = dense(query, key, value, allowed, *parts)
    expected = figures(exact, sparse, allowed.to(DEVICE), options.get("query_padding_mask"))
    gqa = query.shape[1] != key.shape[1]
    report = approximation_report(
        query, key, value, cases.library(expression), enable_gqa=gqa, **options
    )
    check(report, expected, tolerance)
    assert report.share == pytest.approx(allowed.double().mean().item() / full.double().mean())
    return report


@pytest.mark.parametrize(
    "name",
    ["window", "window_causal", "global", "per_head", "empty_rows", "strided", "bigbird", "causal"],
)
@pytest.mark.parametrize("shape", ["base", "more_keys", "gqa"])
def test_patterns(name, shape):
    check_pattern(cases.PATTERNS[name], cases.SHAPES[shape]._replace(head_dim=16))


@pytest.mark.parametrize("is_causal", [True, False])
def test_causality_of_the_call(is_causal):
    for expression in ("Window(9)", "Window(9, 0)"):
        report = check_pattern(expression, Shape(n_q=67, head_dim=8), is_causal=is_causal)
        assert report.reference == ("Causal()" if is_causal else "Full()")


def test_padding_holds_anything():
    shape = Shape(n_q=53, head_dim=8)
    padding = cases.padding(2, 53)
    options = {"key_padding_mask": padding, "scale": 0.7}
    report = check_pattern("Window(5) | Global([0])", shape, **options)
    query, key, value = cases.inputs(shape, torch.float64)
    for x in (key, value):
        x[padding[:, None].expand(x.shape[:3])] = math.nan
    pattern = Window(5) | Global([0])
    assert approximation_report(query, key, value, pattern, **options) == report


def test_queries_that_are_left_out():
    shape = Shape(n_q=53, head_dim=8)
    padding = cases.padding(2, 53)
    options = {"key_padding_mask": padding, "query_padding_mask": padding}
    report = check_pattern("Window(5)", shape, **options)
    query, key, value = cases.inputs(shape, torch.float64)
    query[padding[:, None].expand(query.shape[:3])] = math.inf
    assert approximation_report(query, key, value, Window(5), **options) == report


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(cases.PATTERNS)),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_drawn(name, n_q, n_k, is_causal, padded):
    padding = cases.padding(2, n_k) if padded else None
    shape = Shape(n_q=n_q, n_k=n_k, head_dim=5)
    pattern = cases.pattern(name)
    query, key, value = cases.inputs(shape)
    report = approximation_report(
        query, key, value, pattern, is_causal=is_causal, key_padding_mask=padding
    )
    numbers = (report.mass, *report.mass_per_head, report.overlap, *report.overlap_per_head)
    assert all(0 <= x <= 1 + 1e-5 for x in numbers)
    assert report.error >= 0
    # Against itself, nothing is lost.
    same = approximation_report(
        query, key, value, pattern, reference=pattern, key_padding_mask=padding
    )
    assert same.mass == pytest.approx(1, abs=1e-6)
    assert same.error == same.largest_error == 0
    assert same.share == 1


def test_beyond_the_reference():
    """Keys that the reference does not have make the weights of the others smaller."""
    query, key, value = cases.inputs(Shape(n_q=40, head_dim=8), torch.float64)
    narrow, wide = (cases.mask(f"Window({w})", 40) for w in (3, 9))
    exact, sparse = (dense(query, key, value, allowed) for allowed in (narrow, wide))
    report = approximation_report(query, key, value, Window(9), reference=Window(3))
    check(report, figures(exact, sparse, wide.to(DEVICE)), 1e-10)
    assert report.mass == pytest.approx(1)
    assert report.overlap < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    tolerance = 1e-5  # half types are widened, so what they hold is measured as in float32
    check_pattern("Window(12)", Shape(n_q=67, head_dim=16), dtype, tolerance)


def linear(query, key, value):
    """Linear attention, whose weights are positive everywhere."""
    query, key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    weights = query @ key.mT
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("block", [None, 7, 64, 1000])
def test_functions(block):
    query, key, value = cases.inputs(Shape(n_q=60, n_k=67, head_dim=8), torch.float64)
    exact = dense(query, key, value, torch.ones(60, 67, dtype=torch.bool))
    unit = torch.eye(67, dtype=torch.float64, device=DEVICE).expand(2, 4, 67, 67)
    approximate = linear(query, key, unit), linear(query, key, value)
    report = approximation_report(query, key, value, linear, block=block)
    check(report, figures(exact, approximate, torch.ones((), device=DEVICE)), 1e-10)
    assert report.method == "linear"
    assert report.cost is None
    assert report.share == 1


@pytest.mark.parametrize("expression", ["Window(8)", "Window(8, 0) | GlobalKeys([0]) & Causal()"])
@pytest.mark.parametrize("gqa", [False, True])
def test_a_function_is_measured_as_the_pattern_that_it_runs(expression, gqa):
    shape = Shape(n_q=50, head_dim=8, kv_heads=2 if gqa else None)
    query, key, value = cases.inputs(shape)
    pattern, padding = cases.library(expression), cases.padding(2, 50)
    options = {"key_padding_mask": padding, "enable_gqa": gqa}
    method = functools.partial(attention, pattern=pattern, **options)
    options["is_causal"] = pattern.causal
    measured, expected = (
        approximation_report(query, key, value, way, **options) for way in (method, pattern)
    )
    for name in MASSES:
        assert getattr(measured, name) == pytest.approx(getattr(expected, name), rel=1e-4)


def test_what_a_partial_binds_holds_for_exact_attention():
    query, key, value = cases.inputs(Shape(n_q=50, head_dim=8), torch.float64)
    options = {"scale": 0.3, "key_padding_mask": cases.padding(2, 50)}
    for pattern in (Window(8), Window(8, 0)):
        method = functools.partial(attention, pattern=pattern, **options)
        measured = approximation_report(query, key, value, method)
        expected = approximation_report(query, key, value, pattern, **options)
        assert measured.reference == expected.reference
        for name in MASSES:
            assert getattr(measured, name) == pytest.approx(getattr(expected, name), rel=1e-10)
    method = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    assert approximation_report(query, key, value, method).error < 1e-12
    assert approximation_report(query, key, value, method, is_causal=False).error > 0.1
    assert approximation_report(query, key, value, method, reference=Full()).error > 0.1


def test_top_k():
    query, key, value = cases.inputs(Shape(n_q=50, head_dim=8), torch.float64)
    indices = (query @ key.mT).topk(6).indices
    used = torch.zeros(2, 4, 50, 50, dtype=torch.bool, device=DEVICE).scatter(-1, indices, True)
    exact = dense(query, key, value, torch.ones(50, 50, dtype=torch.bool))
    method = functools.partial(index_attention, indices=indices)
    report = approximation_report(query, key, value, method)
    check(report, figures(exact, dense(query, key, value, used), used), 1e-10)
    assert report.share == pytest.approx(6 / 50)
    assert report.method == "index_attention(indices=<[2, 4, 50, 6]>)"


def test_functions_that_are_not_linear():
    query, key, value = cases.inputs(Shape(n_q=50, head_dim=8))

    def normalised(query, key, value):
        return attention(query, key, value, Full()).tanh()

    def dropping(query, key, value):
        return attention(query, key, value, Full(), dropout_p=0.5)

    for method in (normalised, dropping):
        with pytest.raises(ValueError, match="linear in the values"):
            approximation_report(query, key, value, method)
    report = approximation_report(query, key, value, normalised, weights=False)
    exact = attention(query, key, value, Full())
    expected = (exact.tanh() - exact).norm() / exact.norm()
    assert report.error == pytest.approx(expected.item(), rel=1e-5)
    assert all(math.isnan(x) for x in (report.mass, report.overlap, report.share))


def test_sampled_queries():
    query, key, value = cases.inputs(Shape(n_q=60, n_k=80, head_dim=8), torch.float64)
    rows = [3, 17, -1]
    pattern = PerHead([Window(5), Window(9, 0), Global([0]), Window(3)])
    left_out = torch.ones(2, 60, dtype=torch.bool, device=DEVICE)
    left_out[:, rows] = False
    whole = approximation_report(query, key, value, pattern, query_padding_mask=left_out)
    for queries in (rows, torch.tensor(rows, device=DEVICE)):
        part = approximation_report(query, key, value, pattern, queries=queries)
        for name in MASSES:
            assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-12)
        assert part.share == whole.share
    method = functools.partial(attention, pattern=Window(5))
    of_rows, of_method = (
        approximation_report(query, key, value, x, queries=rows) for x in (Window(5), method)
    )
    assert of_method.mass == pytest.approx(of_rows.mass, rel=1e-12)
    pairs = cases.mask("Window(5)", 60, 80)[0, rows].double().mean().item()
    assert of_method.share == pytest.approx(pairs)  # what it used in these rows
    all_of_them = approximation_report(query, key, value, pattern, queries=1000)
    assert all_of_them.mass == pytest.approx(
        approximation_report(query, key, value, pattern).mass, rel=1e-12
    )


@pytest.mark.parametrize(
    "shape", [Shape(n_q=0), Shape(n_q=4, n_k=0), Shape(batch=0), Shape(value_dim=0)]
)
def test_nothing_is_lost_of_nothing(shape):
    query, key, value = cases.inputs(shape._replace(head_dim=8))
    for method in (Full(), functools.partial(attention, pattern=Full())):
        report = approximation_report(query, key, value, method)
        assert report.mass == pytest.approx(1, abs=1e-5)
        assert report.error == report.largest_error == 0


def test_a_key_is_missing():
    """Queries that the pattern leaves without a key have lost everything."""
    query, key, value = cases.inputs(Shape(n_q=10, head_dim=8))
    report = approximation_report(query, key, value, sparse_attn.GlobalKeys([]))
    assert report.mass == report.overlap == report.share == 0
    assert report.error == 1


def test_threads_do_not_matter():
    inputs = cases.inputs(Shape(n_q=3000, head_dim=16, batch=1, heads=1))
    reports = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        reports.append(approximation_report(*inputs, Window(30)))
    torch.set_num_threads(1)
    assert reports[0] == reports[1]


def test_autocast_and_gradients_do_not_matter():
    query, key, value = cases.inputs(Shape(n_q=50, head_dim=8))
    expected = approximation_report(query, key, value, Window(5))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert approximation_report(*leaves, Window(5)) == expected
    with torch.inference_mode():
        assert approximation_report(*leaves, Window(5)) == expected


def test_table_dict_and_picture(tmp_path):
    query, key, value = cases.inputs(Shape(n_q=50, head_dim=8))
    report = approximation_report(query, key, value, Window(5))
    lines = str(report).splitlines()
    assert "Window(5)" in lines[0]
    assert "Full()" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["head", "0", "1", "2", "3", "all"]
    read = json.loads(json.dumps(report.to_dict()))
    assert read["mass_per_head"] == list(report.mass_per_head)
    assert read["cost"]["pairs"] == Window(5).cost(50).pairs
    report.plot(path=tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "window"}, TypeError, "method to be a Pattern or a function"),
        ({"method": lambda q, k, v: (v, v)}, TypeError, "return a Tensor, got tuple"),
        ({"method": lambda q, k, v: v[:, :1]}, ValueError, "return a Tensor of shape"),
        ({"value": torch.zeros(2, 4, 9, 8)}, ValueError, "value of shape"),
        ({"reference": 5}, TypeError, "pattern to be a Pattern"),
        ({"reference": Full(), "is_causal": True}, ValueError, "reference to be causal"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"queries": 0}, ValueError, "queries"),
        ({"queries": [10]}, ValueError, "queries"),
        ({"queries": []}, ValueError, "queries"),
        ({"queries": 1.5}, TypeError, "queries"),
        ({"query_padding_mask": torch.zeros(2, 9)}, TypeError, "query_padding_mask"),
        ({"query_padding_mask": torch.zeros(2, 9).bool()}, ValueError, "query_padding_mask"),
        ({"key_padding_mask": torch.zeros(2, 9).bool()}, ValueError, "key_padding_mask"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"block": 0}, ValueError, "block"),
    ],
)
def test_errors(change, error, words):
    names = ("query", "key", "value")
    tensors = dict(zip(names, cases.inputs(Shape(n_q=10, head_dim=8)), strict=True))
    call = {**tensors, "method": lambda q, k, v: v, **change}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(error, match=words):
        approximation_report(**call)


def test_causal_reference_by_default():
    query, key, value = cases.inputs(Shape(n_q=30, head_dim=8))
    assert approximation_report(query, key, value, Window(3, 0)).reference == repr(Causal())
