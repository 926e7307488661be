"""Bias, gate, soft cap, dropout and sink against the dense definition, gradients included."""

import math

import cases
import pytest
import reference
import shaped
import torch
from cases import DEVICE, Shape
from shaped import SLOTTED, TABLES, Call

import sparse_attn
from sparse_attn import (
    BlockBias,
    Causal,
    Full,
    KeyLists,
    LocalBlocks,
    PerHead,
    RandomTokens,
    SlotBias,
    Strided,
    Window,
    alibi_slopes,
    attention,
)

# Expressions with the window whose slots a table would have, or None.
PATTERNS = {
    "window": ("Window(9, 4)", [(9, 4, 1)]),
    "dilated": ("Window(5, 7, dilation=3)", [(5, 7, 3)]),
    "causal_global": ("(Window(12, 0) | Global([0, 3])) & Causal()", [(12, 0, 1)]),
    "dilated_global": ("Window(6, dilation=2) | Global([0, -1])", [(6, 6, 2)]),
    "per_head": ("PerHead([Window(8), Window(8, dilation=2)])", [(8, 8, 1), (8, 8, 2)]),
    "blocks": ("BigBird(16, seed=1)", None),
    "random": ("RandomTokens(0.05) | Window(2)", [(2, 2, 1)]),
    "full": ("Full()", None),
}

SHAPES = {
    "base": Shape(n_q=131, head_dim=20, value_dim=12),
    "gqa": Shape(n_q=70, head_dim=16, kv_heads=2),
    "more_keys": Shape(n_q=40, n_k=131, head_dim=16),
    "more_queries": Shape(n_q=131, n_k=40, head_dim=16),
}


def run(name, kinds, shape, dtype=torch.float32, **options):
    """One call with tables of the kinds given for bias and gate, against the definition."""
    expression, windows = PATTERNS[name]
    query, key, value = tensors = cases.inputs(shape, dtype)
    call = Call(shape.batch, shape.heads, shape.n_q, key.shape[2], windows or ())
    tables = [TABLES[kind] if kind else None for kind in kinds]
    leaves = [
        cases.normal(*table.shape(call), seed=5 + i, dtype=dtype)
        for i, table in enumerate(tables)
        if table
    ]
    if kinds[0] == "slopes":  # as they are: steep ones make logits of hundreds
        leaves[0] = 0.1 * leaves[0].abs()
    masks = {k: options.pop(k) for k in ("key_padding_mask", "global_mask") if k in options}
    allowed = reference.allowed_pairs(
        cases.definition(expression, shape._replace(n_k=key.shape[2])), query, key, **masks
    )
    p, seed = options.pop("dropout_p", 0.0), 12345 + 2**40
    factors = shaped.kept_pairs(call, p, seed).double() / (1 - p) if p else None
    if options.pop("sink", False):
        leaves.append(cases.normal(shape.heads, seed=9, dtype=dtype))
        sink = True
    else:
        sink = False
    pattern = cases.library(expression, shape)

    def split(rest):
        rest = list(rest)
        given = [rest.pop(0) if table else None for table in tables]
        return given, (rest.pop(0) if sink else None)

    def ours(q, k, v, *rest):
        given, its_sink = split(rest)
        bias, gate = (
            table.given(x) if table else None for table, x in zip(tables, given, strict=True)
        )
        return attention(
            q,
            k,
            v,
            pattern,
            bias=bias,
            gate=gate,
            sink=its_sink,
            enable_gqa=shape.kv_heads is not None,
            return_lse=True,
            dropout_p=p,
            dropout_seed=torch.tensor(seed, device=DEVICE),
            **masks,
            **options,
        )

    def dense(q, k, v, *rest, **how):
        given, its_sink = split(rest)
        bias, gate = (
            table.spread(x, call, neutral) if table else None
            for table, x, neutral in zip(tables, given, (0.0, 1.0), strict=True)
        )
        return shaped.attention(
            q, k, v, allowed, bias=bias, gate=gate, sink=its_sink, factors=factors, **options, **how
        )

    n_v = value.shape[-1]
    cotangents = (
        cases.normal(*query.shape[:3], n_v, seed=2, dtype=dtype),
        cases.normal(*query.shape[:3], seed=3, dtype=torch.float32),
    )
    shaped.check(ours, dense, [*tensors, *leaves], cotangents)


def fits(name, kind):
    return kind not in SLOTTED or PATTERNS[name][1] is not None


KINDS = [(name, kind) for name in PATTERNS for kind in TABLES if fits(name, kind)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("name", "kind"), KINDS, ids=str)
@pytest.mark.sample
def test_bias(name, kind, dtype):
    run(name, (kind, None), SHAPES["base"], dtype)


@pytest.mark.parametrize(("name", "kind"), [x for x in KINDS if x[1] != "slopes"], ids=str)
@pytest.mark.sample
def test_gate(name, kind):
    run(name, (None, kind), SHAPES["base"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_all_together(name, shape):
    slotted = PATTERNS[name][1] is not None
    run(
        name,
        ("toeplitz" if slotted else "blocks", "slots" if slotted else "dense_shared"),
        SHAPES[shape],
        softcap=1.5,
        dropout_p=0.2,
        sink=True,
        scale=0.7,
    )


@pytest.mark.parametrize("name", ["window", "dilated_global", "random"])
def test_with_masks(name):
    shape = SHAPES["base"]
    run(
        name,
        ("toeplitz", "dense_of_heads"),
        shape,
        key_padding_mask=cases.padding(shape.batch, shape.n_q),
        global_mask=cases.global_tokens(shape.batch, shape.n_q),
        sink=True,
    )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("option", [{"softcap": 0.5}, {"softcap": 30.0}, {"sink": True}], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_softcap_and_sink(name, option, dtype):
    run(name, (None, None), SHAPES["base"], dtype, **option)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.sample
def test_dropout(name, p, dtype):
    run(name, (None, None), SHAPES["base"], dtype, dropout_p=p)


def all_dropped(p, seed=None, pattern=None, n=64, **options):
    """Probabilities after dropout, (batch, heads, n, n): an identity for values shows them."""
    query, key, _ = cases.inputs(Shape(n_q=n, head_dim=8))
    eye = torch.eye(n, device=DEVICE).expand(2, 4, n, n)
    seed = None if seed is None else torch.tensor(seed, device=DEVICE)
    return attention(query, key, eye, pattern or Full(), dropout_p=p, dropout_seed=seed, **options)


def test_dropout_keeps_the_share_it_should():
    kept = all_dropped(0.3, seed=1, n=200) != 0
    # 320,000 draws: five standard deviations are 0.004.
    assert abs(kept.float().mean().item() - 0.7) < 0.005
    # Neither rows, columns, heads nor examples repeat each other.
    for a, b in [(kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[..., 8:], kept[..., :-8])]:
        assert 0.5 < (a == b).float().mean().item() < 0.65
    assert 0.5 < (kept[:, :, 1:] == kept[:, :, :-1]).float().mean().item() < 0.65


def test_dropout_is_of_the_pair_not_of_the_pattern():
    full = all_dropped(0.5, seed=7) != 0
    for pattern in (Window(9), LocalBlocks(16), RandomTokens(0.2), Window(3, dilation=4)):
        allowed = pattern.mask(64).to(DEVICE)
        assert torch.equal(all_dropped(0.5, seed=7, pattern=pattern) != 0, full & allowed)


def test_dropout_of_everything_and_of_nothing():
    assert torch.equal(all_dropped(1.0, seed=1), torch.zeros(2, 4, 64, 64, device=DEVICE))
    assert torch.equal(all_dropped(0.0, seed=1), all_dropped(0.0))


def test_dropout_draws_its_seed_from_torch():
    torch.manual_seed(3)
    first, second = all_dropped(0.5), all_dropped(0.5)
    torch.manual_seed(3)
    assert torch.equal(first, all_dropped(0.5))
    assert not torch.equal(first, second)
    assert torch.equal(all_dropped(0.5, seed=-5), all_dropped(0.5, seed=-5))


def test_infinite_bias_excludes_keys():
    query, key, value = cases.inputs(Shape(n_q=40, head_dim=8))
    bias = torch.zeros(1, 1, 40, 40, device=DEVICE)
    bias[..., 5:9] = -math.inf
    bias[:, :, 20] = -math.inf
    mask = (bias[0, 0] == 0) & Window(6).mask(40).to(DEVICE)
    leaves = [x.requires_grad_() for x in (query, key, value, bias)]
    output, lse = attention(*leaves[:3], Window(6), bias=leaves[3], return_lse=True)
    expected = attention(query, key, value, sparse_attn.Mask(mask))
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[:, :, 20], torch.zeros(2, 4, 8, device=DEVICE))
    assert lse[:, :, 20].isneginf().all()
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[3].masked_fill(mask, 0), torch.zeros_like(bias))


def test_the_lowest_bias_is_finite():
    """Hugging Face's way to mask: numbers so low that nothing is left of the logits."""
    for dtype in cases.DTYPES:
        query, key, value = cases.inputs(Shape(n_q=20, head_dim=8), dtype)
        bias = torch.full((1, 1, 20, 20), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
        bias[..., :10, :] = 0
        sink = torch.zeros(4, dtype=dtype, device=DEVICE)
        leaves = [x.requires_grad_() for x in (query, key, value, bias, sink)]
        output = attention(*leaves[:3], Window(4), bias=bias, sink=sink)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("shift", [-14.0, -7.0, 0.0, 7.0, 14.0])
def test_gradients_beside_a_small_share_are_precise(shift):
    """In float32: of a sink with almost none of the weight, and of keys with almost none."""

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value, sink)]
        output = attention(*leaves[:3], Window(3), sink=leaves[3])
        return torch.autograd.grad(output, leaves, grad_output.to(dtype))

    query, key, value = cases.inputs(cases.Shape(n_q=20), torch.float32)
    grad_output = cases.normal(*query.shape[:-1], value.shape[-1], seed=5, dtype=torch.float32)
    sink = torch.full((query.shape[1],), shift, device=DEVICE)
    for found, exact in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("sink", [-math.inf, -1e4, 0.0, 1e4])
def test_extreme_sinks(sink):
    query, key, value = cases.inputs(Shape(n_q=20, head_dim=8))
    padding = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    padding[0, :12] = False  # the second example has no keys
    sinks = torch.full((4,), sink, device=DEVICE, requires_grad=True)
    plain = attention(query, key, value, Window(3), key_padding_mask=padding)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output, lse = attention(
        *leaves, Window(3), key_padding_mask=padding, sink=sinks, return_lse=True
    )
    share = torch.sigmoid(lse - sink).nan_to_num(0)[..., None]
    torch.testing.assert_close(output, plain * share)
    gradients = torch.autograd.grad(output.sum() + lse.exp().sum(), [*leaves, sinks])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(threads):
    def results():
        leaves = [x.requires_grad_() for x in cases.inputs(Shape(n_q=300, head_dim=16, batch=3))]
        tables = [
            cases.normal(4, 13, seed=1, dtype=torch.float32).requires_grad_(),
            cases.normal(1, 1, 19, 19, seed=2, dtype=torch.float32).requires_grad_(),
        ]
        output = attention(
            *leaves,
            Window(6, dilation=2) | RandomTokens(0.01),
            bias=tables[0],
            gate=BlockBias(tables[1], 16),
            dropout_p=0.3,
            dropout_seed=torch.tensor(1, device=DEVICE),
        )
        made = torch.autograd.grad(output.square().sum(), [*leaves, *tables], create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in made), [*leaves, *tables])
        return [output, *made, *second]

    expected = results()
    torch.set_num_threads(threads)
    try:
        for result, other in zip(results(), expected, strict=True):
            assert torch.equal(result, other)
    finally:
        torch.set_num_threads(1)


def test_slots_are_geometry():
    """A pair takes its slot's number whichever part of the pattern allows it."""
    query, key, value = cases.inputs(Shape(n_q=30, head_dim=8, batch=1))
    table = cases.normal(4, 5, seed=1, dtype=torch.float32)
    both = attention(query, key, value, Window(2) | LocalBlocks(10), bias=table)
    call = Call(1, 4, 30, 30, [(2, 2, 1)])
    spread = TABLES["toeplitz"].spread(table, call, 0.0)
    torch.testing.assert_close(
        both, attention(query, key, value, Window(2) | LocalBlocks(10), bias=spread)
    )


@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        Causal(),
        Window(math.inf, 0),
        LocalBlocks(4),
        Window(2) | Window(3),
        Strided(3),
        PerHead([Window(2), Causal()]),
        PerHead([Window(2), Window(3)]),
    ],
    ids=str,
)
def test_patterns_without_slots(pattern):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    for given in (cases.normal(4, 5), SlotBias(cases.normal(1, 4, 16, 5))):
        with pytest.raises(ValueError, match="slots"):
            attention(query, key, value, pattern, bias=given)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("bias", (3,), "heads"),
        ("bias", (4, 6), "7"),
        ("bias", (3, 7), "heads"),
        ("bias", (4, 15, 7), "queries"),
        ("bias", (1, 4, 16, 15), "keys"),
        ("bias", (3, 4, 16, 16), "examples"),
        ("bias", (), "shape"),
        ("bias", (1, 1, 1, 1, 1), "shape"),
        ("gate", (4,), "gate"),
        ("gate", (4, 9), "7"),
        ("sink", (3,), "sink"),
        ("sink", (4, 1), "sink"),
    ],
)
def test_wrong_shapes(name, shape, words):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    with pytest.raises(ValueError, match=words):
        attention(query, key, value, Window(3), **{name: torch.zeros(shape, device=DEVICE)})


@pytest.mark.parametrize("name", ["bias", "gate", "sink"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.float16])
def test_wrong_dtypes(name, dtype):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    given = torch.zeros((4,) if name == "sink" else (4, 7), device=DEVICE).to(dtype)
    with pytest.raises(TypeError, match=name):
        attention(query, key, value, Window(3), **{name: given})


@pytest.mark.parametrize("name", ["bias", "gate"])
def test_tables_in_float32_beside_half_types(name):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8), torch.bfloat16)
    table = cases.normal(4, 7, dtype=torch.float32).requires_grad_()
    output = attention(query, key, value, Window(3), **{name: table})
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert table.grad.dtype == torch.float32


@pytest.mark.parametrize("seed", [1, torch.tensor(1.0), torch.tensor([1]), torch.tensor([[1]])])
def test_wrong_seeds(seed):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    seed = seed.to(DEVICE) if isinstance(seed, torch.Tensor) else seed
    with pytest.raises((TypeError, ValueError), match="dropout_seed"):
        attention(query, key, value, Window(3), dropout_p=0.5, dropout_seed=seed)


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.nan, math.inf])
def test_wrong_softcaps(softcap):
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    with pytest.raises(ValueError, match="softcap"):
        attention(query, key, value, Window(3), softcap=softcap)


def test_wrong_wrappers():
    with pytest.raises(TypeError, match="Tensor"):
        SlotBias([[1.0]])
    with pytest.raises(ValueError, match="shape"):
        SlotBias(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="block"):
        BlockBias(torch.zeros(1, 1, 2, 2), 0)
    query, key, value = cases.inputs(Shape(n_q=16, head_dim=8))
    with pytest.raises(TypeError, match="bias"):
        attention(query, key, value, Window(3), bias=0.5)
    with pytest.raises(ValueError, match="blocks"):
        attention(query, key, value, Window(3), bias=BlockBias(torch.zeros(1, 1, 2, 3), 8))


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -(h + 1) for h in range(8)]
    # Twelve heads: those of eight, then every other one of sixteen (Press et al., their code).
    expected = [2.0 ** -(h + 1) for h in range(8)] + [2.0 ** -(h + 0.5) for h in range(4)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(2, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


def test_index_lists_with_tables():
    shape = Shape(n_q=50, head_dim=8)
    query, key, value = cases.inputs(shape)
    lists = cases.numbers(50, 6, below=50)
    mask = KeyLists(lists).mask(50).to(DEVICE)
    dense = cases.normal(1, 4, 50, 50, seed=1, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (query, key, value, dense)]
    cotangent = cases.normal(2, 4, 50, 8, seed=4, dtype=torch.float32)
    results = []
    for pattern in (KeyLists(lists), sparse_attn.Mask(mask)):
        output = attention(*leaves[:3], pattern, bias=dense, gate=dense, softcap=2.0)
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
