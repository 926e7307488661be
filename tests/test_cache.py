"""Decoding step by step against one call over the whole sequence."""

import cases
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from sparse_attn import (
    BigBird,
    BlockBias,
    BlockLayout,
    Causal,
    FirstLast,
    Fixed,
    Full,
    Global,
    GlobalKeys,
    GlobalQueries,
    KeyLists,
    KVCache,
    LocalBlocks,
    Mask,
    Pattern,
    PerHead,
    Radial,
    RandomBlocks,
    RandomTokens,
    SlotBias,
    Strided,
    Window,
    _store,
    alibi_slopes,
    attention,
)
from sparse_attn.patterns.decoding import allowed_pairs

N, HEADS, HEADS_KV, DIM, VALUE_DIM = 131, 4, 2, 8, 5

# Beside the causal ones of cases.PATTERNS: what meets in decoding.
EXPRESSIONS = {
    **{
        name: expression
        for name, expression in cases.PATTERNS.items()
        if cases.library(expression).causal
        and name not in ("random_blocks_causal", "bigbird_causal")
    },
    "window_future_cut": "Window(9, 5) & Causal()",
    "first_window": "(Window(12, 0) | FirstLast(4, 0)) & Causal()",
    "first_key": "Window(7, 0) | GlobalKeys([0])",
    "first_key_of_heads": "PerHead([Window(7, 0) | FirstLast(1, 0), Window(3, 0, dilation=2)])",
    "many_globals": "(Window(6, 0, dilation=3) | GlobalKeys([0, 1, 5, 9, 40, 41])) & Causal()",
    "late_global": "(Window(7, 0) | Global([3, 60])) & Causal()",
    "late_rows": "(Window(7, 0) | GlobalQueries([60, 61])) & Causal()",
    "window_of_globals": "Window(30, 0) & GlobalKeys([0, 20, 21, 55, 100])",
    "blocks_and_global": "(LocalBlocks(10) | Global([0])) & Causal()",
    "blocks_in_window": "LocalBlocks(10) & Window(3, 0)",
    "fixed_and_window": "Fixed(12, 2) & Window(40, 0) | Window(2, 0)",
    "strided_and_first": "(Strided(9) & Window(50, 0)) | (FirstLast(2, 0) & Causal())",
    "random_tokens_causal": "RandomTokens(0.3, seed=3) & Causal()",
    "random_tokens_reach": "RandomTokens(0.5, seed=4) & Window(24, 0)",
    "radial_reach": "(Radial(3) & Window(20, 0)) | (GlobalKeys([0]) & Causal())",
    "checkerboard_causal": "Checkerboard(4) & Causal()",
    "full_cut": "Full() & Causal()",
    "none": "GlobalKeys([]) & Causal()",
    "heads": (
        "PerHead([Window(6, 0), Window(4, 0, dilation=5), "
        "(Window(3, 0) | Global([0])) & Causal(), LocalBlocks(8) & Causal()])"
    ),
    "pairs_of_heads": "PerHead([Window(6, 0), Window(4, 0, dilation=5)])",
}


def make(pattern, **options):
    if isinstance(pattern, str):
        pattern = cases.library(pattern)
    sizes = {
        "batch_size": 2,
        "num_heads_kv": HEADS_KV,
        "head_dim": DIM,
        "value_dim": VALUE_DIM,
        "dtype": torch.float64,
        "device": cases.DEVICE,
    }
    return KVCache(pattern, **sizes | options)


def inputs(n=N, heads=HEADS, heads_kv=HEADS_KV, seed=0):
    shape = cases.Shape(n, head_dim=DIM, value_dim=VALUE_DIM, heads=heads, kv_heads=heads_kv)
    return cases.inputs(shape, torch.float64, seed)


def decode(cache, tensors, chunks, padding=None, **options):
    """Output and log-sum-exp of the tokens, `chunks` at a time."""
    rows, start = [], cache.length
    place = 0
    for new in chunks:
        step = [x[:, :, place : place + new] for x in tensors]
        if padding is not None:
            options["key_padding_mask"] = padding[:, place : place + new]
        rows.append(cache.attend(*step, **options, return_lse=True))
        place += new
        assert cache.length == start + place
    return [torch.cat(parts, 2) for parts in zip(*rows, strict=True)]


def exact(expression, tensors, padding=None):
    """The dense definition of the whole call."""
    query, key, value = tensors
    allowed = reference.allowed_pairs(cases.definition(expression), query, key, padding)
    return reference.dense_attention(query, key, value, allowed)


def assert_same(ours, expected, places=1e-12):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=places)


def cut(n, *sizes):
    """The sizes over and over, until they fill n."""
    chunks = []
    while sum(chunks) < n:
        chunks.append(min(sizes[len(chunks) % len(sizes)], n - sum(chunks)))
    return chunks


CHUNKS = {
    "single": cut(N, 1),
    "prompt": [50, *cut(N - 50, 1)],
    "mixed": cut(N, 1, 7, 2, 30, 1, 1),
    "halves": cut(N, 66),
    "whole": [N],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_rows_are_those_of_the_whole_call(name, chunks):
    tensors = inputs()
    ours = decode(make(EXPRESSIONS[name]), tensors, CHUNKS[chunks])
    assert_same(ours, exact(EXPRESSIONS[name], tensors))


@pytest.mark.parametrize("pattern", [Fixed(10, 3), Strided(10)])
def test_factors(pattern):
    tensors, pattern = inputs(), PerHead(pattern.factors)
    whole = attention(*tensors, pattern, enable_gqa=True, return_lse=True)
    assert_same(decode(make(pattern), tensors, CHUNKS["mixed"]), whole)


def test_a_gap_within_the_reach():
    """Key 12 is dropped, so for query 16 key 0, kept for the other head, moves into the window."""
    tokens = "GlobalKeys([0, 13, 14, 15])"
    expression = f"PerHead([Window(4, 0) & {tokens}, {tokens} & Causal()])"
    tensors = inputs(20, heads=2, heads_kv=1)
    ours = decode(make(expression, num_heads_kv=1), tensors, [16, 1, 1, 1, 1])
    assert_same(ours, exact(expression, tensors))


PARTS = st.one_of(
    st.builds(
        "Window({}, {}, dilation={})".format,
        st.integers(0, 20),
        st.integers(0, 3),
        st.integers(1, 6),
    ),
    st.builds("Global({})".format, st.lists(st.integers(0, 59), max_size=4)),
    st.builds("GlobalKeys({})".format, st.lists(st.integers(0, 59), max_size=4)),
    st.builds("FirstLast({}, 0)".format, st.integers(0, 9)),
    st.builds("LocalBlocks({})".format, st.integers(1, 20)),
    st.builds("Fixed({}, 1)".format, st.integers(1, 20)),
    st.builds("Strided({})".format, st.integers(1, 20)),
    st.builds("Checkerboard({})".format, st.integers(1, 9)),
    st.builds("Radial({})".format, st.integers(0, 6)),
    st.just("RandomTokens(0.3)"),
    st.just("Window(math.inf, 0, dilation=2)"),
)
JOINED = st.recursive(
    PARTS,
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("|&"), inner),
    max_leaves=4,
)


@given(
    patterns=st.lists(JOINED, min_size=1, max_size=2),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    padded=st.booleans(),
)
def test_any_pattern_in_any_chunks(patterns, chunks, padded):
    causal = [f"{pattern} & Causal()" for pattern in patterns]
    expression = f"PerHead([{', '.join(causal)}])" if len(causal) > 1 else causal[0]
    n = max(60, sum(chunks))
    tensors = inputs(n)
    padding = cases.random(2, n) < 0.3 if padded else None
    ours = decode(make(expression), tensors, [*chunks, *cut(n - sum(chunks), 1)], padding)
    assert_same(ours, exact(expression, tensors, padding))


@pytest.mark.parametrize("heads_kv", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["causal_global", "heads", "pairs_of_heads", "strides_per_head"])
def test_heads(name, heads_kv):
    tensors = inputs(heads=8, heads_kv=heads_kv)
    expression = EXPRESSIONS[name]
    ours = decode(make(expression, num_heads_kv=heads_kv), tensors, CHUNKS["mixed"])
    assert_same(ours, exact(expression, tensors))


@pytest.mark.parametrize("name", ["causal_global", "causal", "heads", "fixed"])
def test_padding(name):
    """That of the prompt too, which stays; and it may begin after tokens without any."""
    tensors, expression = inputs(), EXPRESSIONS[name]
    padding = cases.random(2, N) < 0.4
    padding[1, :30] = True
    ours = decode(make(expression), tensors, CHUNKS["mixed"], padding)
    assert_same(ours, exact(expression, tensors, padding))
    padding[:, :20] = padding[:, 60:] = False
    cache = make(expression)
    parts = [
        decode(cache, [x[:, :, :20] for x in tensors], cut(20, 3)),
        decode(cache, [x[:, :, 20:60] for x in tensors], cut(40, 3), padding[:, 20:60]),
        decode(cache, [x[:, :, 60:] for x in tensors], cut(N - 60, 3)),
    ]
    ours = [torch.cat(rows, 2) for rows in zip(*parts, strict=True)]
    assert_same(ours, exact(expression, tensors, padding))


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0, 0, 1, 0, 1], [1]])
@pytest.mark.parametrize("padded", [False, True])
def test_reorder(index, padded):
    expression = EXPRESSIONS["heads"]
    first, second = inputs(60), [x.repeat(3, 1, 1, 1)[: len(index)] for x in inputs(40, seed=1)]
    padding = cases.random(2, 60) < 0.3 if padded else None
    cache = make(expression)
    decode(cache, first, cut(60, 1, 4), padding)
    chosen = torch.tensor(index, device=cases.DEVICE)
    cache.reorder(chosen)
    assert cache.batch_size == len(index)
    ours = decode(cache, second, cut(40, 2, 1))
    whole = [torch.cat([a[chosen], b], 2) for a, b in zip(first, second, strict=True)]
    if padded:
        padding = torch.cat([padding[chosen], padding.new_zeros(len(index), 40)], 1)
    expected = exact(expression, whole, padding)
    assert_same(ours, [x[:, :, 60:] for x in expected])


def test_reset():
    expression, tensors = EXPRESSIONS["causal_global"], inputs()
    cache = make(expression)
    padding = torch.ones(2, 40, dtype=torch.bool, device=cases.DEVICE)
    decode(cache, [x[:, :, :40] for x in tensors], [40], padding)
    cache.reorder([0, 1, 1])
    cache.reset()
    assert (cache.length, cache.nbytes, cache.batch_size) == (0, 0, 2)
    assert_same(decode(cache, tensors, CHUNKS["mixed"]), exact(expression, tensors))


# How many keys a pattern needs at most.
BOUNDED = {
    "Window(16, 0)": 17,
    "Window(0)": 1,
    "Window(16, 0, dilation=4)": 65,
    "(Window(64, 0) | Global([0, 1, 7])) & Causal()": 68,
    "(Window(20, 0, dilation=3) | GlobalKeys([0, 5])) & Causal()": 63,
    "(Window(20, 0) | FirstLast(4, 0)) & Causal()": 25,
    "LocalBlocks(50) & Causal()": 50,
    "(LocalBlocks(50) | Global([0])) & Causal()": 51,
    "RandomTokens(0.5) & Window(24, 0)": 25,
}


@pytest.mark.parametrize("expression", BOUNDED)
def test_memory_does_not_grow(expression):
    cache = make(expression, num_heads_kv=1)
    most = BOUNDED[expression]
    row = 2 * (DIM + VALUE_DIM) * 8
    query, key, value = (x[:, :1, :1] for x in inputs(1))
    for _ in range(5000):
        cache.attend(query, key, value)
        assert cache.nbytes <= row * (most + max(4, most // 8))
    stored = sum(x.untyped_storage().nbytes() for store in cache._stores for x in store.buffers)
    assert stored == cache.nbytes
    prompt = [x.expand(-1, -1, 3000, -1) for x in (query, key, value)]
    cache.attend(*prompt)
    assert cache.length == 8000
    assert cache.nbytes <= row * (most + max(4, most // 8))


def test_heads_keep_each_their_own():
    heads = PerHead([Window(4, 0), Window(64, 0)])
    cache, tensors = make(heads, head_dim=8, value_dim=8), inputs(600)
    cache_of_value = [tensors[0], tensors[1], tensors[1]]
    decode(cache, cache_of_value, cut(600, 1))
    row = 2 * 16 * 8
    assert cache.nbytes <= row * (5 + 4 + 65 + 8)


@pytest.mark.parametrize(
    "expression", ["Fixed(20, 2)", "(LocalBlocks(40) | Global([0])) & Causal()"]
)
def test_long_chunks_take_no_square_of_memory(expression, monkeypatch):
    masks = []

    def watched(*arguments):
        masks.append(allowed_pairs(*arguments))
        return masks[-1]

    monkeypatch.setattr(_store, "allowed_pairs", watched)
    tensors = inputs(2500, heads=2)
    ours = decode(make(expression), tensors, [70, 1, 29, 2400])
    assert_same(ours, exact(expression, tensors))
    assert masks
    assert max(mask.numel() for mask in masks) <= 256 * (256 + 2400 // 10)


@pytest.mark.parametrize("name", ["causal_global", "fixed", "heads", "blocks_and_global"])
def test_gradients_of_one_call(name):
    """With respect to its own tokens; those before are constants. Later calls do not disturb it."""
    expression, tensors = EXPRESSIONS[name], inputs()
    cache = make(expression)
    decode(cache, [x[:, :, :60] for x in tensors], cut(60, 1))
    leaves = [x[:, :, 60:85].detach().requires_grad_() for x in tensors]
    ours = cache.attend(*leaves)
    cache.attend(*(x[:, :, 85:86] for x in tensors))
    with torch.no_grad():
        cache.attend(*(x[:, :, 86:] for x in tensors))
    weights = cases.normal(*ours.shape, seed=3)
    gradients = torch.autograd.grad((ours * weights).sum(), leaves)
    same = [x[:, :, 60:85].detach().requires_grad_() for x in tensors]
    whole = [torch.cat([x[:, :, :60], y], 2) for x, y in zip(tensors, same, strict=True)]
    output = exact(expression, whole)[0][:, :, 60:]
    assert_same(gradients, torch.autograd.grad((output * weights).sum(), same))


def test_tangents_of_one_call():
    expression, tensors = EXPRESSIONS["heads"], inputs(60)
    cache = make(expression)
    decode(cache, [x[:, :, :50] for x in tensors], [49, 1])
    tangents = [cases.normal(*x.shape, seed=4) for x in tensors]
    for tangent in tangents:
        tangent[:, :, :50] = tangent[:, :, 51:] = 0

    def row(*whole):
        return exact(expression, whole)[0][:, :, 50:51]

    with forward_ad.dual_level():
        pairs = zip(tensors, tangents, strict=True)
        duals = [forward_ad.make_dual(*(x[:, :, 50:51] for x in pair)) for pair in pairs]
        ours = forward_ad.unpack_dual(cache.attend(*duals))
    assert_same(ours, torch.func.jvp(row, tuple(tensors), tuple(tangents)))


def test_gradients_of_tables():
    pattern = cases.library(WITH_SLOTS["global_heads"])
    tensors, table = inputs(60), cases.normal(HEADS, 7, seed=5).requires_grad_()
    ours = decode(make(pattern), tensors, [40, 1, 19], bias=table)[0]
    whole = attention(*tensors, pattern, bias=table, enable_gqa=True)
    gradients = [torch.autograd.grad(x.sin().sum(), table)[0] for x in (ours, whole)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_what_is_kept_is_detached():
    cache, tensors = make("Window(9, 0)"), inputs(20)
    assert cache.attend(*(x[:, :, :10].requires_grad_() for x in tensors)).requires_grad
    for i in range(10, 13):  # in place, into what the first call kept
        step = [x[:, :, i : i + 1].detach() for x in tensors]
        assert cache.attend(*(x.clone().requires_grad_() for x in step)).requires_grad
    assert not cache.attend(*(x[:, :, 13:14].detach() for x in tensors)).requires_grad


def test_gradients_through_every_step_of_a_model():
    """Steps of a graph each: what is kept is detached, and no step changes another's tensors."""
    cache, tensors = make("Window(9, 0)"), inputs(40)
    leaf = tensors[0].requires_grad_()
    steps = [cache.attend(*(x[:, :, i : i + 1] for x in tensors)) for i in range(40)]
    gradient = torch.autograd.grad(torch.cat(steps, 2).sum(), leaf)[0]
    output = exact("Window(9, 0)", tensors)[0]
    assert_same([gradient], torch.autograd.grad(output.sum(), leaf))


def test_inference_mode_and_back():
    expression, tensors = EXPRESSIONS["causal_global"], inputs()
    cache, rows = make(expression), []
    for i in range(N):
        with torch.inference_mode(i // 5 % 2 == 0):
            rows.append(cache.attend(*(x[:, :, i : i + 1].clone() for x in tensors)))
    cache.reorder([1, 0])
    assert_same([torch.cat(rows, 2)], exact(expression, tensors)[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    pattern = cases.pattern("causal_global")
    tensors = [x.to(dtype) for x in inputs()]
    output, lse = decode(make(pattern, dtype=dtype), tensors, CHUNKS["mixed"])
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    expected = exact(EXPRESSIONS["causal_global"], [x.double() for x in tensors])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=8 * eps)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-5)


def test_scale():
    tensors = inputs()
    ours = decode(make("Window(9, 0)"), tensors, CHUNKS["mixed"], scale=0.7)
    whole = attention(*tensors, Window(9, 0), scale=0.7, enable_gqa=True, return_lse=True)
    assert_same(ours, whole)


def test_tokens_that_are_yet_to_come_count_from_then_on():
    pattern = (Window(3, 0) | Global([50])) & Causal()
    tensors = inputs(80)
    whole = attention(*tensors, pattern, enable_gqa=True, return_lse=True)
    cache = make(pattern)
    assert_same(decode(cache, tensors, cut(80, 1)), whole)
    assert cache.nbytes <= 2 * HEADS_KV * (DIM + VALUE_DIM) * 8 * (5 + 4)


# By distance: they hold wherever the kept keys lie.
TABLES = {
    "slopes": lambda: alibi_slopes(HEADS, dtype=torch.float64, device=cases.DEVICE),
    "slots": lambda: cases.normal(HEADS, 7, seed=5),
    "slot_bias": lambda: SlotBias(cases.normal(2, HEADS, 1, 7, seed=5)),
}
WITH_SLOTS = {
    "window": "Window(6, 0)",
    "dilated": "Window(6, 0, dilation=3)",
    "global": "(Window(6, 0, dilation=2) | Global([0, 3, 9])) & Causal()",
    "blocks": "(Window(6, 0) | LocalBlocks(10) | Global([0])) & Causal()",
    "heads": "PerHead([Window(6, 0, dilation=d) for d in (1, 4, 2, 3)])",
    "global_heads": (
        "PerHead([(Window(6, 0, dilation=d) | Global([0, 5])) & Causal() for d in (1, 4)])"
    ),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", WITH_SLOTS)
def test_bias_by_distance(name, table):
    pattern, tensors, bias = cases.library(WITH_SLOTS[name]), inputs(), TABLES[table]()
    whole = attention(*tensors, pattern, bias=bias, enable_gqa=True, return_lse=True)
    assert_same(decode(make(pattern), tensors, CHUNKS["mixed"], bias=bias), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slopes_of_half_types(dtype):
    """Far global keys: in a half type, slope · distance would be off by whole units."""
    pattern = cases.library("(Window(6, 0) | Global([0, 1, 2])) & Causal()")
    tensors = [x.to(dtype) for x in inputs(1000)]
    slopes = alibi_slopes(HEADS, dtype=dtype, device=cases.DEVICE) / 64
    whole = attention(*tensors, pattern, bias=slopes, enable_gqa=True, return_lse=True)
    ours = decode(make(pattern, dtype=dtype), tensors, cut(1000, 9), bias=slopes)
    torch.testing.assert_close(ours[0], whole[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(ours[1], whole[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_gate_by_distance(name):
    pattern, tensors = cases.library(WITH_SLOTS[name]), inputs()
    gate = cases.random(HEADS, 7).double()
    whole = attention(*tensors, pattern, gate=gate, enable_gqa=True, return_lse=True)
    assert_same(decode(make(pattern), tensors, CHUNKS["mixed"], gate=gate), whole)


def test_softcap_and_sink():
    pattern, tensors = cases.library(EXPRESSIONS["heads"]), inputs()
    options = {"softcap": 3.0, "sink": cases.normal(HEADS, seed=7)}
    whole = attention(*tensors, pattern, enable_gqa=True, return_lse=True, **options)
    assert_same(decode(make(pattern), tensors, CHUNKS["mixed"], **options), whole)


@pytest.mark.parametrize(
    "pattern",
    [
        Window(8),
        Full(),
        Global([0]),
        Window(8, 0) | Global([0]),
        Window(8, 0) | GlobalKeys([0, 1]),
        Window(8, 0) | FirstLast(2, 0),
        (Window(8, 0) | Global([0, -1])) & Causal(),
        GlobalKeys([-1]) & Causal(),
        GlobalQueries([-2]) & Causal(),
        FirstLast(0, 1) & Causal(),
        BigBird(8) & Causal(),
        RandomBlocks(2, 8) & Causal(),
        Mask(torch.ones(4, 4, dtype=torch.bool)) & Causal(),
        BlockLayout(torch.ones(4, 4, dtype=torch.bool), 2) & Causal(),
        KeyLists(torch.zeros(4, 2, dtype=torch.long)) & Causal(),
        PerHead([Window(8, 0), Window(8)]),
        PerHead([Window(8, 0), FirstLast(2, 1) & Causal()]),
        Radial(4),
        LocalBlocks(4),
        RandomTokens(0.5),
    ],
    ids=repr,
)
def test_patterns_that_depend_on_what_is_to_come_raise(pattern):
    with pytest.raises(ValueError, match=r"for decoding.*got"):
        make(pattern)


def test_errors_of_the_constructor():
    for options, error in [
        ({"batch_size": 0}, ValueError),
        ({"batch_size": 1.5}, TypeError),
        ({"num_heads_kv": 0}, ValueError),
        ({"head_dim": 0}, ValueError),
        ({"value_dim": -1}, ValueError),
        ({"dtype": torch.int64}, TypeError),
    ]:
        with pytest.raises(error, match=f"sparse_attn: expected .*{next(iter(options))}"):
            make("Window(4, 0)", **options)
    with pytest.raises(TypeError, match="expected pattern"):
        KVCache("Window(4, 0)", batch_size=1, num_heads_kv=1, head_dim=4)


def bad_calls():
    query, key, value = inputs(3)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=cases.DEVICE)
    return {
        "heads": ((query[:, :3], key, value), {}, ValueError, "a multiple of 2 heads"),
        "rank": ((query[0], key, value), {}, ValueError, "query of shape"),
        "no token": ([x[:, :, :0] for x in (query, key, value)], {}, ValueError, "query of shape"),
        "batch": ([x[:1] for x in (query, key, value)], {}, ValueError, "query of shape"),
        "key": ((query, key[:, :, :2], value), {}, ValueError, "key of shape"),
        "value": ((query, key, key), {}, ValueError, "value of shape"),
        "dtype": ((query, key.float(), value), {}, TypeError, "key of dtype torch.float64"),
        "type": ((query, key, None), {}, TypeError, "value to be a Tensor"),
        "device": ((query, key, value.to("meta")), {}, ValueError, "value on"),
        "padding": (None, {"key_padding_mask": mask[:, :2]}, ValueError, "key_padding_mask of sh"),
        "padding type": (None, {"key_padding_mask": mask.int()}, TypeError, "dtype bool"),
        "dropout": (None, {"dropout_p": 0.1}, ValueError, "dropout_p=0"),
        "globals": (None, {"global_mask": mask}, NotImplementedError, "no global_mask"),
        "weights": (None, {"return_weights": True}, NotImplementedError, "return_weights"),
        "sink": (None, {"sink": query.new_zeros(3)}, ValueError, "sink of shape"),
        "dense bias": (None, {"bias": query.new_zeros(1, 1, 3, 3)}, ValueError, "by distance"),
        "blocks": (None, {"bias": BlockBias(query.new_zeros(1, 1, 1, 1), 4)}, ValueError, "by dis"),
        "rows": (None, {"bias": query.new_zeros(HEADS, 3, 5)}, ValueError, "by distance"),
        "slots": (None, {"bias": query.new_zeros(HEADS, 4)}, ValueError, "5 slots"),
        "bias heads": (None, {"bias": query.new_zeros(3)}, ValueError, "for 4 heads"),
        "gate": (None, {"gate": query.new_zeros(HEADS)}, ValueError, "gate of shape"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_a_call_that_raises_appends_nothing(name):
    tensors, options, error, words = bad_calls()[name]
    good = inputs(20)
    cache = make("Window(4, 0)")
    decode(cache, [x[:, :, :10] for x in good], [10])
    with pytest.raises(error, match=words):
        cache.attend(*(tensors or inputs(3)), **options)
    assert cache.length == 10
    ours = decode(cache, [x[:, :, 10:] for x in good], [10])
    assert_same(ours, [x[:, :, 10:] for x in exact("Window(4, 0)", good)])


def test_errors_of_reorder():
    cache = make("Window(4, 0)")
    for index, error in [
        ([2], ValueError),
        ([-1], ValueError),
        ([[0]], ValueError),
        (torch.empty(0, dtype=torch.long), ValueError),
        ([0.5], TypeError),
        ([True, False], TypeError),
    ]:
        with pytest.raises(error, match="expected index"):
            cache.reorder(index)
    assert cache.batch_size == 2


def test_repr():
    cache = make("Window(4, 0)")
    assert repr(cache) == "KVCache(Window(4, 0), length=0, nbytes=0)"


@pytest.mark.parametrize("expression", ["Fixed(7, 2)", "(Window(5) | Global([0])) & Causal()"])
def test_who_sees_whom_at_chosen_places(expression):
    words = cases.library(expression).encode()
    positions, keys = torch.tensor([3, 60, 8]), torch.tensor([0, 59, 60, 6, 8])
    found = torch.ops.sparse_attn._pattern_allows(words, positions, keys, 61)
    assert torch.equal(found, cases.mask(expression, 61)[0][positions][:, keys])
    with pytest.raises(ValueError, match="positions from 0 to"):
        torch.ops.sparse_attn._pattern_allows(words, positions + 1, keys, 61)
    with pytest.raises(TypeError, match="keys of dtype int64"):
        torch.ops.sparse_attn._pattern_allows(words, positions, keys.int(), 61)


def test_every_pattern_says_what_decoding_needs_of_it():
    """Or raises: no causal case of the tests is silently taken for another kind."""
    for expression in cases.PATTERNS.values():
        pattern = cases.library(expression) & Causal()
        assert isinstance(pattern, Pattern)
        ends = ("-1", "BigBird", "RandomBlocks", "FirstLast(3, 2)", "FirstLast(0, 1)")
        if any(word in expression for word in ends):
            with pytest.raises(ValueError, match="for decoding"):
                make(pattern)
        else:
            make(pattern)
