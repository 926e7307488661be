"""Random shapes and random trees of patterns, in float64, against the definition."""

import cases
import reference
import torch
from cases import Shape
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import attention

# Weighted to the edges of tiles (64), with the shortest first so that failures shrink.
LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 129]), st.just(200))
SIDES = st.one_of(st.integers(0, 20), st.sampled_from(["math.inf", "10**9"]))


def windows() -> st.SearchStrategy[str]:
    return st.builds("Window({}, {}, dilation={})".format, SIDES, SIDES, st.integers(1, 9))


def tokens(n_k: int) -> st.SearchStrategy[str]:
    lists = st.lists(st.integers(-n_k, n_k - 1), max_size=4)
    kinds = st.sampled_from(["Global", "GlobalKeys", "GlobalQueries"])
    return st.builds("{}({})".format, kinds, lists)


def fixed(stride: int, summary: int) -> str:
    return f"Fixed({stride}, {summary % (stride + 1)})"


def blocks() -> st.SearchStrategy[str]:
    """Patterns of blocks, strides and chance."""
    size, few, seed = st.integers(1, 70), st.integers(0, 4), st.integers(-9, 2**33)
    share = st.sampled_from([0, 0.02, 0.3, 0.9, 1])
    return st.one_of(
        st.builds("{}({})".format, st.sampled_from(["Strided", "LocalBlocks", "Radial"]), size),
        st.builds("Checkerboard({})".format, size),
        st.builds(fixed, size, size),
        st.builds("FirstLast({}, {})".format, size, few),
        st.builds("RandomBlocks({}, {}, seed={})".format, few, size, seed),
        st.builds("RandomTokens({}, seed={})".format, share, seed),
        st.builds("BigBird({}, {}, {}, {}, {})".format, size, few, few, few, seed),
    )


def trees(n_k: int) -> st.SearchStrategy[str]:
    leaves = st.one_of(windows(), tokens(n_k), blocks(), st.sampled_from(["Full()", "Causal()"]))
    return st.recursive(
        leaves,
        lambda part: st.builds("({} {} {})".format, part, st.sampled_from("|&"), part),
        max_leaves=5,
    )


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """One call: sizes, a pattern for all heads or for each, and masks."""
    n_q, n_k, batch = draw(LENGTHS), draw(LENGTHS), draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    shape = Shape(
        n_q=n_q,
        n_k=draw(st.sampled_from([n_q, n_k])),
        head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.integers(1, 20)),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
    )
    groups = draw(st.sampled_from([None, 1, heads]))
    if groups is None:
        expression = draw(trees(shape.n_k))
    else:
        parts = draw(st.lists(trees(shape.n_k), min_size=groups, max_size=groups))
        expression = f"PerHead([{', '.join(parts)}])"
    options = {}
    for name in ("key_padding_mask", "global_mask"):
        if draw(st.booleans()):
            seed = draw(st.integers(0, 99))
            options[name] = cases.global_tokens(batch, shape.n_k, seed)
    return {"shape": shape, "expression": expression, "options": options}


@given(calls())
@settings(max_examples=100)
def test_attention(call):
    shape, expression, options = call["shape"], call["expression"], call["options"]
    rule = cases.definition(expression)
    heads = getattr(rule, "rules", [rule])
    if len({head.causal for head in heads}) > 1:  # what global tokens mean there is not defined
        options.pop("global_mask", None)
    tensors = cases.inputs(shape, torch.float64)
    allowed = reference.allowed_pairs(rule, *tensors[:2], **options)
    reference.check(
        lambda query, key, value: attention(
            query,
            key,
            value,
            cases.library(expression),
            enable_gqa=True,
            return_lse=True,
            **options,
        ),
        tensors,
        allowed,
    )


@st.composite
def sized_trees(draw: st.DrawFn) -> tuple[str, int, int]:
    n_k = draw(LENGTHS)
    return draw(trees(n_k)), draw(LENGTHS), n_k


@given(sized_trees())
@settings(max_examples=100)
def test_mask_and_cost(case):
    expression, n_q, n_k = case
    pattern = cases.library(expression)
    expected = torch.from_numpy(cases.definition(expression).mask(n_q, n_k, 1)[0].copy())
    assert torch.equal(pattern.mask(n_q, n_k), expected)
    cost = pattern.cost(n_q, n_k)
    assert cost.pairs == expected.sum()
    assert cost.visited >= cost.pairs
    assert eval(repr(pattern), cases.NAMESPACE) == pattern
