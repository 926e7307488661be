"""Wrong arguments of patterns: refused when the pattern is made, by name."""

import math

import cases
import pytest
import torch
from test_errors import refuses

from sparse_attn import BlockLayout, Global, KeyLists, Mask, Pattern, PerHead, Window

# The name of each argument that is a count, the least that is allowed, and the rest of the call.
COUNTS = {
    "Strided stride": ("stride", 1, "Strided({})"),
    "Fixed stride": ("stride", 1, "Fixed({}, 0)"),
    "Fixed summary": ("summary", 0, "Fixed(8, {})"),
    "LocalBlocks block": ("block", 1, "LocalBlocks({})"),
    "RandomBlocks blocks_per_row": ("blocks_per_row", 0, "RandomBlocks({}, 16)"),
    "RandomBlocks block": ("block", 1, "RandomBlocks(3, {})"),
    "BigBird block": ("block", 1, "BigBird({})"),
    "BigBird random_blocks": ("random_blocks", 0, "BigBird(16, random_blocks={})"),
    "BigBird window_blocks": ("window_blocks", 0, "BigBird(16, window_blocks={})"),
    "BigBird global_blocks": ("global_blocks", 0, "BigBird(16, global_blocks={})"),
    "Checkerboard block": ("block", 1, "Checkerboard({})"),
    "Radial radius": ("radius", 0, "Radial({})"),
    "FirstLast first": ("first", 0, "FirstLast({}, 0)"),
    "FirstLast last": ("last", 0, "FirstLast(0, {})"),
    "BlockLayout block": ("block", 1, "BlockLayout(bits(2, 2), {})"),
}
SEEDED = ["RandomBlocks(3, 16, {})", "RandomTokens(0.5, {})", "BigBird(16, seed={})"]


def refuses_expression(expression: str, exception: type | tuple, words: list[str]) -> None:
    refuses(
        lambda: cases.library(expression), exception, ["sparse_attn: expected", ", got", *words]
    )


@pytest.mark.parametrize("name", COUNTS)
def test_counts_below_the_least(name):
    argument, least, call = COUNTS[name]
    cases.library(call.format(least))
    for value in (least - 1, -5, -(2**70)):
        refuses_expression(call.format(value), ValueError, [argument, str(value)])


@pytest.mark.parametrize("value", ["1.5", "16.0", "'16'", "None", "math.nan", "math.inf", "[16]"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_are_no_ints(name, value):
    argument, _, call = COUNTS[name]
    refuses_expression(call.format(value), TypeError, [argument, str(cases.library(value))])


@pytest.mark.parametrize(("stride", "summary"), [(1, 2), (8, 9), (16, 2**70)])
def test_more_summaries_than_a_segment_has(stride, summary):
    refuses_expression(f"Fixed({stride}, {summary})", ValueError, ["summary", str(summary)])


@pytest.mark.parametrize("value", ["1.5", "'0'", "None", "[0]", "math.nan"])
@pytest.mark.parametrize("call", SEEDED)
def test_seeds_that_are_no_ints(call, value):
    refuses_expression(call.format(value), TypeError, ["seed"])


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
@pytest.mark.parametrize("call", SEEDED)
def test_seeds_beyond_64_bits(call, value):
    refuses_expression(call.format(value), ValueError, ["seed", str(value)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1, 2, -1, 1 + 2**-52])
def test_no_such_probability(value):
    name = {math.inf: "math.inf", -math.inf: "-math.inf"}.get(value, repr(value))
    name = "math.nan" if math.isnan(value) else name
    refuses_expression(f"RandomTokens({name})", ValueError, ["keep_prob", str(value)])


@pytest.mark.parametrize("value", ["'0.5'", "None", "[0.5]", "1j"])
def test_probabilities_that_are_no_numbers(value):
    refuses_expression(f"RandomTokens({value})", TypeError, ["keep_prob"])


TENSORS = {
    "layout": lambda tensor: BlockLayout(tensor, 16),
    "mask": Mask,
    "indices": KeyLists,
    "counts": lambda tensor: KeyLists(torch.zeros(2, 2, dtype=torch.int64), tensor),
}


def good(name: str, *size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool if name in ("layout", "mask") else torch.int64)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_none(name):
    for value in ([[True, False]], good(name, 2, 2).numpy(), "mask", 3):
        words = [name, type(value).__name__]
        refuses(lambda value=value: TENSORS[name](value), TypeError, words)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_dtype(name):
    wrong = [torch.float32, torch.int64 if name in ("layout", "mask") else torch.bool]
    for dtype in wrong:
        tensor = good(name, 2, 2).to(dtype)
        words = [name, str(dtype).removeprefix("torch.")]
        refuses(lambda tensor=tensor: TENSORS[name](tensor), TypeError, words)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_rank(name):
    least = 1 if name == "counts" else 2
    for rank in (0, least - 1, least + 3):
        tensor = good(name, *[2] * rank)
        words = [name, str(list(tensor.shape))]
        refuses(lambda tensor=tensor: TENSORS[name](tensor), ValueError, words)


def test_a_pattern_itself_is_none():
    refuses(Pattern, TypeError, ["Pattern"])


def test_arguments_that_are_missing_or_unknown():
    for expression in ("Fixed(8)", "RandomBlocks(3)", "FirstLast(3)", "BigBird()", "Radial(1, 2)"):
        with pytest.raises(TypeError):
            cases.library(expression)


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda: Global(torch.tensor(3)), TypeError, ["tokens", "a sequence of ints"]),
        (lambda: PerHead(torch.tensor([1, 2])), TypeError, ["patterns", "a sequence of patterns"]),
        (lambda: Window(1).cost(9, tile=3), TypeError, ["tile", "(rows, keys)", "3"]),
        (lambda: Window(1).cost(9, tile=(3,)), ValueError, ["tile", "(rows, keys)", "(3,)"]),
        (lambda: Window(1).cost(9, dtype="x"), TypeError, ["dtype", "torch.dtype", "'x'"]),
    ],
)
def test_arguments_of_another_kind(call, exception, words):
    refuses(call, exception, ["sparse_attn: expected", ", got", *words])
