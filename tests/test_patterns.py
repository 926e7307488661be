"""Patterns: who sees whom, their algebra, and what they say about themselves."""

import dataclasses

import cases
import numpy as np
import pytest
import torch

from sparse_attn import (
    BigBird,
    Causal,
    Checkerboard,
    Fixed,
    Full,
    Global,
    GlobalKeys,
    GlobalQueries,
    LocalBlocks,
    Pattern,
    PerHead,
    RandomTokens,
    Strided,
    Window,
)

LENGTHS = [
    *((1, 1), (2, 2), (5, 5), (64, 64), (67, 67), (130, 130), (257, 257)),
    *((40, 67), (1, 67), (1, 128), (3, 130), (131, 200)),
    *((67, 40), (9, 1), (200, 131), (150, 64)),
]


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
@pytest.mark.parametrize("name", cases.PATTERNS)
def test_mask_is_the_definition(name, n_q, n_k):
    ours = cases.pattern(name).mask(n_q, n_k, heads=4)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, cases.mask(cases.PATTERNS[name], n_q, n_k))


@pytest.mark.parametrize("name", cases.PATTERNS)
def test_fewer_queries_are_the_last_rows(name):
    """Ends are aligned: what a query sees does not depend on how many are asked with it."""
    pattern = cases.pattern(name)
    whole = pattern.mask(131, heads=4)
    for n_q in (1, 3, 64, 100):
        assert torch.equal(pattern.mask(n_q, 131, heads=4), whole[:, -n_q:])


def test_mask_without_heads_is_square():
    assert Window(3).mask(9).shape == (9, 9)
    assert Window(3).mask(9, 5).shape == (9, 5)
    assert torch.equal(Window(3).mask(9), cases.mask("Window(3)", 9)[0])


@pytest.mark.parametrize("tokens", [[], [0], [-1], [3, 3, 3], [5, 2, -20], [19, -20, 0, -1]])
@pytest.mark.parametrize("kind", ["Global", "GlobalKeys", "GlobalQueries"])
def test_tokens_in_any_order_and_from_the_end(kind, tokens):
    expression = f"{kind}({tokens})"
    assert torch.equal(cases.library(expression).mask(20, heads=4), cases.mask(expression, 20))
    longer = f"{kind}({tokens})"
    assert torch.equal(cases.library(longer).mask(27, 20, heads=4), cases.mask(longer, 27, 20))


@pytest.mark.parametrize(
    "expression",
    [
        "Window(10**9)",
        "Window(math.inf)",
        "Window(2**62, 2**62, dilation=2**62)",
        "Window(3, 2, dilation=2**40)",
        "Window(math.inf, dilation=66)",
        "Window(66, 0) | Window(0, 66)",
        "Global(range(67))",
        "Strided(2**62)",
        "Fixed(10**9, 10**9)",
        "LocalBlocks(2**62)",
        "RandomBlocks(10**9, 7)",
        "RandomBlocks(3, 2**62, seed=-(2**63))",
        "RandomTokens(2.0**-32)",
        "RandomTokens(1e-300, seed=-1)",
        "RandomTokens(1 - 2.0**-32)",
        "BigBird(2**62)",
        "BigBird(3, random_blocks=10**9, seed=-5)",
        "BigBird(3, window_blocks=10**12)",
        "BigBird(3, global_blocks=10**12)",
        "Checkerboard(2**62)",
        "Radial(2**61)",
        "FirstLast(2**62, 2**62)",
        "FirstLast(40, 0) & Strided(5)",
        "(RandomBlocks(4, 16) | Radial(3)) & Checkerboard(48)",
    ],
)
def test_extremes(expression):
    assert torch.equal(cases.library(expression).mask(67, heads=4), cases.mask(expression))


def test_heads_are_in_equal_groups():
    pattern = PerHead([Window(1), Full()])
    expected = [Window(1).mask(9)] * 3 + [Full().mask(9)] * 3
    assert torch.equal(pattern.mask(9, heads=6), torch.stack(expected))


SOME = [
    *(Window(3), Window(2, 0, 3), Causal(), Strided(4), Checkerboard(2)),
    *(Global([0, -2]), GlobalKeys([5]), GlobalQueries([1])),
    *(BigBird(3), RandomTokens(0.3)),
]


@pytest.mark.parametrize("a", SOME, ids=repr)
@pytest.mark.parametrize("b", SOME, ids=repr)
def test_algebra(a, b):
    assert torch.equal((a | b).mask(31), a.mask(31) | b.mask(31))
    assert torch.equal((a & b).mask(31), a.mask(31) & b.mask(31))
    assert torch.equal((a & (a | b)).mask(31), a.mask(31))
    assert torch.equal(((a & b) | (b & Full())).mask(31), b.mask(31))


def assert_repr_is_an_expression(pattern: Pattern) -> None:
    again = eval(repr(pattern), cases.NAMESPACE)
    assert again == pattern
    assert hash(again) == hash(pattern)


@pytest.mark.parametrize("name", cases.PATTERNS)
def test_repr_is_an_expression(name):
    assert_repr_is_an_expression(cases.pattern(name))


@pytest.mark.parametrize("pattern", [Strided(7), Fixed(7, 2), Fixed(48, 0)], ids=repr)
def test_factors_are_the_two_heads_of_the_paper(pattern):
    local, far = pattern.factors
    assert torch.equal((local | far).mask(99, 131), pattern.mask(99, 131))
    assert local.causal
    assert far.causal
    assert_repr_is_an_expression(local)
    assert_repr_is_an_expression(far)


def test_equality_is_by_value():
    assert Window(3) == Window(3)
    assert Window(3) != Window(4)
    assert Window(3) != Causal()
    assert Global([0, 1]) == Global((0, 1))
    assert (Window(3) | Global([0])) == (Window(3) | Global([0]))
    assert (Window(3) | Global([0])) != (Window(3) & Global([0]))
    assert PerHead([Window(3), Full()]) != PerHead([Full(), Window(3)])
    assert BigBird(16) == BigBird(16, random_blocks=3, window_blocks=3, global_blocks=1, seed=0)
    assert BigBird(16) != BigBird(16, seed=1)
    assert RandomTokens(0.5) != RandomTokens(0.5, seed=1)
    assert Fixed(8, 2) != Fixed(8, 1)
    assert LocalBlocks(8) != Checkerboard(8)
    assert len({Window(3), Window(3), Full(), Full(), Window(3) | Full()}) == 3


@pytest.mark.parametrize(
    ("pattern", "field"),
    [
        (Window(3), "left"),
        (Global([0]), "tokens"),
        (Window(3), "dilation"),
        (BigBird(16), "seed"),
        (RandomTokens(0.5), "keep_prob"),
        (Fixed(8, 2), "summary"),
    ],
)
def test_frozen(pattern, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pattern, field, 1)


@pytest.mark.parametrize("name", cases.PATTERNS)
def test_causal(name):
    pattern = cases.pattern(name)
    assert pattern.causal is cases.definition(cases.PATTERNS[name]).causal
    if pattern.causal:
        assert not pattern.mask(40, heads=4).triu(1).any()


@pytest.mark.parametrize(
    "expression",
    [
        "Causal() | Window(3, 0)",
        "Causal() | Window(3)",
        "Full() & Causal()",
        "Window(3, 0) | Global([0])",
        "(Window(3) & Causal()) | Window(2, 0)",
        "PerHead([Causal(), Window(2, 0)])",
        "Window(3, 1)",
        "Window(0)",
        "Strided(3) | Fixed(5, 1)",
        "Strided(3) | LocalBlocks(5)",
        "BigBird(5) & Strided(2)",
        "FirstLast(1, 0)",
        "Radial(3) & Window(2, 0)",
        "PerHead([Strided(3), Fixed(5, 1)])",
        "PerHead([Strided(3), Checkerboard()])",
    ],
)
def test_causal_of_compositions(expression):
    assert cases.library(expression).causal is cases.definition(expression).causal


DISTANCE = np.subtract.outer(np.arange(40), np.arange(40))  # i - j


@pytest.mark.parametrize("window", [1, 2, 7, 8])
@pytest.mark.parametrize("dilation", [1, 3])
def test_from_longformer(window, dilation):
    steps = DISTANCE // dilation
    expected = (DISTANCE % dilation == 0) & (abs(steps) <= window // 2)
    pattern = Window.from_longformer(window, dilation=dilation)
    assert np.array_equal(pattern.mask(40).numpy(), expected)


@pytest.mark.parametrize(("left", "right"), [(3, 5), (-1, 0), (4, -1), (-1, -1), (0, 0)])
def test_from_flash(left, right):
    expected = np.ones_like(DISTANCE, bool)
    if left >= 0:
        expected &= left >= DISTANCE
    if right >= 0:
        expected &= -right <= DISTANCE
    assert np.array_equal(Window.from_flash(left, right).mask(40).numpy(), expected)


@pytest.mark.parametrize("window", [1, 2, 9, 100])
def test_from_mistral(window):
    pattern = Window.from_mistral(window)
    assert np.array_equal(pattern.mask(40).numpy(), (DISTANCE >= 0) & (window > DISTANCE))
    assert pattern.causal


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (67, 67), (200, 200), (40, 67), (67, 40)])
@pytest.mark.parametrize("expression", cases.PATTERNS.values(), ids=cases.PATTERNS)
def test_cost_counts_the_pairs(expression, n_q, n_k):
    pattern = cases.library(expression)
    pairs = int(cases.mask(expression, n_q, n_k, pattern.heads).sum())
    cost = pattern.cost(n_q, n_k, head_dim=32, dtype=torch.bfloat16)
    assert cost.pairs == pairs
    assert cost.flops >= 4 * 32 * pairs
    assert cost.bytes > 0
    assert cost.visited >= pairs
    if pairs:
        assert cost.overhead >= 1
        assert cost.overhead == pytest.approx(cost.visited / pairs)
        assert pattern.cost(n_q, n_k, tile=(64, 64)).overhead >= 1


def test_cost_of_a_long_sequence_is_exact():
    n, w = 1_000_003, 256
    assert Window(w).cost(n).pairs == n * (2 * w + 1) - w * (w + 1)
    assert Causal().cost(n).pairs == n * (n + 1) // 2
    assert LocalBlocks(64).cost(n).pairs == (n // 64) * 64**2 + (n % 64) ** 2


def test_cost_of_the_sparse_transformer_is_exact():
    n, stride, summary = 128 * 100, 128, 8
    segments = n // stride
    local = n * stride - stride * (stride - 1) // 2  # the first rows see less
    assert Strided(stride).cost(n).pairs == local + stride * segments * (segments - 1) // 2
    segment = segments * stride * (stride + 1) // 2
    earlier = summary * stride * segments * (segments - 1) // 2
    assert Fixed(stride, summary).cost(n).pairs == segment + earlier


def test_cost_of_bigbird_is_exact():
    """Random blocks apart: two global rows and columns, and three blocks of a window between."""
    block, blocks = 64, 200
    pairs = 2 * blocks + (blocks - 4) * 5 + 2 * 4  # rows 1 and n - 2 share one with the ends
    assert BigBird(block, random_blocks=0).cost(block * blocks).pairs == pairs * block**2


def test_cost_grows_with_the_size_of_numbers():
    half, single = (Window(8).cost(100, dtype=d).bytes for d in (torch.float16, torch.float32))
    assert half < single
    assert Window(8).cost(100, head_dim=128).flops == 2 * Window(8).cost(100, head_dim=64).flops


def test_plot():
    pytest.importorskip("matplotlib", reason="plots need matplotlib").use("Agg")
    axes = (Window(3) | Global([0])).plot(32)
    assert axes.figure is not None
    assert axes.has_data()
