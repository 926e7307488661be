"""Patterns: who sees whom, their algebra, and what they say about themselves."""

import dataclasses

import cases
import numpy as np
import pytest
import torch

from sparse_attn import Causal, Full, Global, GlobalKeys, GlobalQueries, PerHead, Window

LENGTHS = [(1, 1), (2, 2), (67, 67), (130, 130), (40, 67), (67, 40), (1, 67)]


def mask(expression: str, n_q: int = 67, n_k: int | None = None, heads: int = 4) -> torch.Tensor:
    return torch.from_numpy(cases.definition(expression).mask(n_q, n_k, heads).copy())


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
@pytest.mark.parametrize("name", cases.PATTERNS)
def test_mask_is_the_definition(name, n_q, n_k):
    ours = cases.pattern(name).mask(n_q, n_k, heads=4)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, mask(cases.PATTERNS[name], n_q, n_k))


# Drawn by hand: rows are queries, x is a pair. They hold the reference to the table, too.
DRAWN = [
    ("Window(1)", 4, ["xx..", "xxx.", ".xxx", "..xx"]),
    ("Window(2, 0)", 4, ["x...", "xx..", "xxx.", ".xxx"]),
    ("Window(0, 1)", 4, ["xx..", ".xx.", "..xx", "...x"]),
    ("Window(1, dilation=2)", 4, ["x.x.", ".x.x", "x.x.", ".x.x"]),
    ("Window(math.inf, 0, dilation=2)", 4, ["x...", ".x..", "x.x.", ".x.x"]),
    ("Window(1, 0)", 5, ["..xx.", "...xx"]),  # the ends are aligned
    ("Window(1, 0)", 2, ["..", "..", "x.", "xx"]),  # queries before the first key see nothing
    ("Window(0, 1)", 2, ["..", "x.", "xx", ".x"]),  # or what comes after them
    ("Causal()", 4, ["xxx.", "xxxx"]),
    ("Full()", 2, ["xx", "xx", "xx"]),
    ("Global([1])", 4, [".x..", "xxxx", ".x..", ".x.."]),
    ("GlobalKeys([1, -1])", 4, [".x.x", ".x.x", ".x.x", ".x.x"]),
    ("GlobalQueries([1, -1])", 4, ["....", "xxxx", "....", "xxxx"]),
    ("GlobalQueries([1, -1])", 4, ["....", "xxxx"]),
    ("Global([0])", 2, ["x.", "x.", "xx", "x."]),  # a negative position is no token
    ("(Window(1, 0) | Global([0])) & Causal()", 4, ["x...", "xx..", "xxx.", "x.xx"]),
]


@pytest.mark.parametrize(("expression", "n_k", "rows"), DRAWN)
def test_masks_drawn_by_hand(expression, n_k, rows):
    drawn = torch.tensor([[letter == "x" for letter in row] for row in rows])
    assert torch.equal(mask(expression, len(rows), n_k, heads=1)[0], drawn)
    assert torch.equal(cases.library(expression).mask(len(rows), n_k), drawn)


def test_mask_without_heads_is_square():
    assert Window(3).mask(9).shape == (9, 9)
    assert Window(3).mask(9, 5).shape == (9, 5)
    assert torch.equal(Window(3).mask(9), mask("Window(3)", 9)[0])


@pytest.mark.parametrize("tokens", [[], [0], [-1], [3, 3, 3], [5, 2, -20], [19, -20, 0, -1]])
@pytest.mark.parametrize("kind", ["Global", "GlobalKeys", "GlobalQueries"])
def test_tokens_in_any_order_and_from_the_end(kind, tokens):
    expression = f"{kind}({tokens})"
    assert torch.equal(cases.library(expression).mask(20, heads=4), mask(expression, 20))
    longer = f"{kind}({tokens})"
    assert torch.equal(cases.library(longer).mask(27, 20, heads=4), mask(longer, 27, 20))


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
    ],
)
def test_extremes(expression):
    assert torch.equal(cases.library(expression).mask(67, heads=4), mask(expression))


def test_heads_are_in_equal_groups():
    pattern = PerHead([Window(1), Full()])
    expected = [Window(1).mask(9)] * 3 + [Full().mask(9)] * 3
    assert torch.equal(pattern.mask(9, heads=6), torch.stack(expected))


SOME = [Window(3), Window(2, 0, 3), Global([0, -2]), GlobalKeys([5]), GlobalQueries([1]), Causal()]


@pytest.mark.parametrize("a", SOME, ids=repr)
@pytest.mark.parametrize("b", SOME, ids=repr)
def test_algebra(a, b):
    assert torch.equal((a | b).mask(31), a.mask(31) | b.mask(31))
    assert torch.equal((a & b).mask(31), a.mask(31) & b.mask(31))
    assert torch.equal((a & (a | b)).mask(31), a.mask(31))
    assert torch.equal(((a & b) | (b & Full())).mask(31), b.mask(31))


@pytest.mark.parametrize("expression", cases.PATTERNS.values())
def test_repr_is_an_expression(expression):
    pattern = cases.library(expression)
    again = eval(repr(pattern), cases.NAMESPACE)
    assert again == pattern
    assert hash(again) == hash(pattern)


def test_equality_is_by_value():
    assert Window(3) == Window(3)
    assert Window(3) != Window(4)
    assert Window(3) != Causal()
    assert Global([0, 1]) == Global((0, 1))
    assert (Window(3) | Global([0])) == (Window(3) | Global([0]))
    assert (Window(3) | Global([0])) != (Window(3) & Global([0]))
    assert PerHead([Window(3), Full()]) != PerHead([Full(), Window(3)])
    assert len({Window(3), Window(3), Full(), Full(), Window(3) | Full()}) == 3


@pytest.mark.parametrize(
    ("pattern", "field"),
    [(Window(3), "left"), (Global([0]), "tokens"), (Window(3), "dilation")],
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
    heads = len(pattern.patterns) if isinstance(pattern, PerHead) else 1
    pairs = int(mask(expression, n_q, n_k, heads).sum())
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


def test_cost_grows_with_the_size_of_numbers():
    half, single = (Window(8).cost(100, dtype=d).bytes for d in (torch.float16, torch.float32))
    assert half < single
    assert Window(8).cost(100, head_dim=128).flops == 2 * Window(8).cost(100, head_dim=64).flops


def test_plot():
    pytest.importorskip("matplotlib", reason="plots need matplotlib").use("Agg")
    axes = (Window(3) | Global([0])).plot(32)
    assert axes.figure is not None
    assert axes.has_data()
