"""Patterns that hold tensors: layouts of blocks, masks and lists of keys."""

import math

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, SHAPES, SIZED, Shape, check, inputs

from sparse_attn import (
    BlockLayout,
    Causal,
    FirstLast,
    Fixed,
    Full,
    Global,
    KeyLists,
    LocalBlocks,
    Mask,
    PerHead,
    Radial,
    RandomBlocks,
    RandomTokens,
    Strided,
    Window,
    attention,
)

LENGTHS = [(1, 1), (5, 5), (67, 67), (130, 130), (40, 67), (1, 130), (67, 40), (200, 131), (9, 1)]


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
@pytest.mark.parametrize("name", SIZED)
def test_mask_and_cost_are_the_definition(name, n_q, n_k):
    pattern = cases.library(SIZED[name], Shape(n_q, n_k))
    assert torch.equal(pattern.mask(n_q, n_k, heads=4), cases.mask(SIZED[name], n_q, n_k))
    own = cases.mask(SIZED[name], n_q, n_k, pattern.heads)
    cost = pattern.cost(n_q, n_k)
    assert cost.pairs == own.sum()
    assert cost.overhead >= 1


@pytest.mark.parametrize("name", SIZED)
def test_causal(name):
    pattern = cases.library(SIZED[name], Shape(40))
    assert pattern.causal is cases.definition(SIZED[name], Shape(40)).causal
    if pattern.causal:
        assert not pattern.mask(40, heads=4).triu(1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZED)
def test_attention_of_dtypes(name, dtype):
    check(SIZED[name], inputs(SHAPES["base"], dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SIZED)
def test_attention_of_shapes(name, shape):
    check(SIZED[name], inputs(SHAPES[shape]))


@pytest.mark.parametrize("name", SIZED)
def test_attention_with_padding_and_global_tokens(name):
    tensors = inputs(Shape(n_q=70, head_dim=32, batch=3))
    options = {"key_padding_mask": cases.padding(3, 70), "global_mask": cases.global_tokens(3, 70)}
    check(SIZED[name], tensors, **options)


TABLE = torch.tensor([[True, False], [False, True]], device=DEVICE)


@pytest.mark.parametrize("offset", [-3, 2])
def test_rows_are_raw(offset):
    """Query i is row i of the tensor, wherever the ends of the sequences lie."""
    n_q, n_k = 5, 5 + offset
    mask = cases.bits(n_q, n_k)
    assert torch.equal(Mask(mask).mask(n_q, n_k), mask.cpu())
    layout = cases.bits(3, cases.blocks(n_k, 2))
    whole = layout.repeat_interleave(2, 0).repeat_interleave(2, 1)[:n_q, :n_k]
    assert torch.equal(BlockLayout(layout, 2).mask(n_q, n_k), whole.cpu())


@pytest.mark.parametrize(
    "size", [(1, 4, 2, 2), (2, 1, 2, 2), (1, 1, 2, 2), (2, 4, 2, 2), (1, 2, 2), (4, 2, 2), (2, 2)]
)
def test_one_stands_for_all(size):
    """A batch or head dimension of 1, or none, serves every example or head."""
    layout = cases.bits(*size)
    tensors = inputs(Shape(n_q=20, head_dim=8))
    ours = attention(*tensors, BlockLayout(layout, 10))
    same = attention(*tensors, BlockLayout(layout.expand(2, 4, 2, 2).contiguous(), 10))
    assert torch.equal(ours, same)


def test_layouts_of_other_strides():
    layout = cases.bits(4, 3, 2)
    for view in (layout.mT, layout.flip(0).mT, layout[:, :2], layout[::2].expand(2, 3, 2)):
        n_q, n_k = (16 * blocks for blocks in view.shape[-2:])
        ours = BlockLayout(view, 16).mask(n_q, n_k, heads=4 if view.shape[0] == 4 else 2)
        expected = view.contiguous().repeat_interleave(16, -2).repeat_interleave(16, -1)
        assert torch.equal(ours, expected.cpu())


@pytest.mark.parametrize("block", [1, 10])
def test_edits_in_place_are_seen(block):
    n = 20
    table = torch.eye(n // block, device=DEVICE) > 0
    pattern = Mask(table) if block == 1 else BlockLayout(table, block)
    tensors = inputs(Shape(n_q=n, head_dim=8))
    before = attention(*tensors, pattern)
    table.fill_(True)
    assert pattern.mask(n).all()
    after = attention(*tensors, pattern)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, attention(*tensors, Full()))


PAIRS = [
    (BlockLayout(TABLE, 16), BlockLayout(TABLE, 16)),
    (Mask(TABLE), Mask(TABLE)),
    (KeyLists(TABLE.long()), KeyLists(TABLE.long())),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=["layout", "mask", "lists"])
def test_equality_is_by_identity(one, other):
    assert one == one
    assert hash(one) == hash(one)
    assert one != other
    assert len({one, other, one}) == 2
    assert (one | Window(3)) == (one | Window(3))
    assert (one | Window(3)) != (other | Window(3))


@pytest.mark.parametrize("pattern", [pair[0] for pair in PAIRS], ids=["layout", "mask", "lists"])
def test_repr_tells_the_size(pattern):
    assert type(pattern).__name__ in repr(pattern)
    assert "[2, 2]" in repr(pattern)


def test_an_empty_mask_gives_zeros():
    tensors = [x.requires_grad_() for x in inputs(Shape(n_q=70, head_dim=8))]
    nobody = Mask(torch.zeros(70, 70, dtype=torch.bool, device=DEVICE))
    output, lse = attention(*tensors, nobody, return_lse=True)
    assert torch.equal(output, torch.zeros_like(output))
    assert lse.isneginf().all()
    for gradient in torch.autograd.grad(output.sum(), tensors):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_full_mask_is_full_attention():
    tensors = inputs(Shape(n_q=70, head_dim=8))
    mask = Mask(torch.ones(70, 70, dtype=torch.bool, device=DEVICE))
    torch.testing.assert_close(attention(*tensors, mask), attention(*tensors, Full()))


def test_masks_of_other_patterns_are_these_patterns():
    tensors = inputs(Shape(n_q=150, head_dim=16))
    for pattern in (Window(9) | Global([0]), Causal(), RandomTokens(0.1)):
        mask = Mask(pattern.mask(150).to(DEVICE))
        torch.testing.assert_close(attention(*tensors, mask), attention(*tensors, pattern))


# A pattern, and words of the message when it is used on 2 examples of 4 heads of 20 tokens.
WRONG_SIZES = {
    "layout too small": (BlockLayout(cases.bits(2, 1), 10), ["layout", "[2, 1]"]),
    "layout too large": (BlockLayout(cases.bits(2, 3), 10), ["layout", "[2, 3]"]),
    "layout for other heads": (BlockLayout(cases.bits(3, 2, 2), 10), ["3", "4"]),
    "layout for another batch": (BlockLayout(cases.bits(3, 4, 2, 2), 10), ["3", "2"]),
    "mask too small": (Mask(cases.bits(20, 19)), ["[20, 20]", "[20, 19]"]),
    "mask too large": (Mask(cases.bits(21, 20)), ["[20, 20]", "[21, 20]"]),
    "mask for other heads": (Mask(cases.bits(3, 20, 20)), ["3", "4"]),
    "lists of fewer queries": (KeyLists(cases.numbers(19, 3, below=20)), ["indices", "19"]),
    "a key beyond the last": (KeyLists(torch.full((20, 3), 20, device=DEVICE)), ["20"]),
    "a negative key": (KeyLists(torch.full((20, 3), -1, device=DEVICE)), ["-1"]),
    "the least int32": (
        KeyLists(torch.full((20, 3), -(2**31), dtype=torch.int32, device=DEVICE)),
        ["-2147483648"],
    ),
    "more than are listed": (
        KeyLists(cases.numbers(20, 3, below=20), torch.full((20,), 4, device=DEVICE)),
        ["counts", "4"],
    ),
}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_tensors_that_do_not_fit(name):
    pattern, words = WRONG_SIZES[name]
    tensors = inputs(Shape(n_q=20, head_dim=8))
    for used in (pattern, pattern | Window(2), pattern & Causal()):
        with pytest.raises(ValueError, match=r"sparse_attn: expected .* got ") as caught:
            attention(*tensors, used)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_tensors_on_another_device():
    tensors = inputs(Shape(n_q=20, head_dim=8))
    layout = torch.ones(2, 2, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="meta"):
        attention(*tensors, BlockLayout(layout, 10))


@pytest.mark.parametrize(
    "pattern",
    [
        BlockLayout(cases.bits(2, 1, 1), 8) | BlockLayout(cases.bits(3, 1, 1), 8),
        PerHead([BlockLayout(cases.bits(3, 1, 1), 8), Window(1)]),
        BlockLayout(torch.ones(0, 1, 1, dtype=torch.bool), 8),
        BlockLayout(torch.ones(0, 1, 1, 1, dtype=torch.bool), 8),
        KeyLists(torch.zeros(0, 8, 2, dtype=torch.long)),
        BlockLayout(torch.ones(1, 1, dtype=torch.bool, device="meta"), 8),
    ],
    ids=["other heads", "PerHead", "no heads", "no examples", "no lists", "no data"],
)
def test_what_cannot_be_inspected(pattern):
    with pytest.raises(ValueError, match=r"sparse_attn: expected .* got "):
        pattern.cost(8)


@pytest.mark.parametrize("where", [1, 2])
def test_a_query_without_keys_gives_zeros_beside_nan(where):
    """Nobody sees key 5, which is NaN, and query 3 sees none."""
    tensors = inputs(Shape(n_q=64, head_dim=16, batch=1))
    tensors[where][:, :, 5] = math.nan
    leaves = [x.requires_grad_() for x in tensors]
    mask = torch.ones(64, 64, dtype=torch.bool, device=DEVICE)
    mask[3], mask[:, 5] = False, False
    output = attention(*leaves, Mask(mask))
    assert torch.equal(output[:, :, 3], torch.zeros_like(output[:, :, 3]))
    gradient = torch.autograd.grad(output.sum(), leaves[0])[0]
    assert torch.equal(gradient[:, :, 3], torch.zeros_like(gradient[:, :, 3]))


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (RandomBlocks(1, 2**63 - 1), Full()),
        (RandomBlocks(10**30, 10**30), Full()),
        (RandomBlocks(10**18, 1), Full()),
        (LocalBlocks(10**30), Full()),
        (BlockLayout(torch.ones(1, 1, dtype=torch.bool, device=DEVICE), 10**19), Full()),
        (FirstLast(10**30, 10**30), Full()),
        (Strided(10**30), Causal()),
        (Fixed(10**30, 1), Causal()),
        (Radial(10**30), Full()),
    ],
    ids=str,
)
def test_huge_parameters(pattern, same):
    assert torch.equal(pattern.mask(70), same.mask(70))
    tensors = inputs(Shape(n_q=70, head_dim=8))
    torch.testing.assert_close(attention(*tensors, pattern), attention(*tensors, same))


def test_an_expanded_mask_is_planned_once():
    mask = cases.bits(70, 70)
    tensors = inputs(Shape(n_q=70, head_dim=8))
    expanded = Mask(mask.expand(2, 4, 70, 70))
    assert torch.equal(attention(*tensors, expanded), attention(*tensors, Mask(mask)))
    assert expanded.cost(70).pairs == Mask(mask).cost(70).pairs
