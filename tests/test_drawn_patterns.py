"""Masks drawn by hand: they hold the library and the reference to the papers."""

import cases
import pytest
import torch

# An expression, the number of keys, and the rows of its mask: x is a pair.
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
    ("Strided(3)", 7, [".xxxx..", "..xxxx.", "x..xxxx"]),
    ("Strided(3)", 6, ["x.....", "xx....", "xxx...", "xxxx..", ".xxxx.", "..xxxx"]),
    ("Strided(1)", 3, ["x..", "xx.", "xxx"]),
    ("Fixed(3, 1)", 7, ["xxx....", "..xx...", "..xxx..", "..xxxx.", "..x..xx"]),
    ("Fixed(3, 0)", 4, ["x...", "xx..", "xxx.", "...x"]),
    ("Fixed(2, 1)", 2, ["..", "x.", "xx"]),
    ("LocalBlocks(2)", 5, ["xx...", "xx...", "..xx.", "..xx.", "....x"]),  # a partial last block
    ("LocalBlocks(3)", 8, ["......xx", "......xx"]),
    ("LocalBlocks(2)", 3, ["...", "...", "xx.", "xx.", "..x"]),  # no block before the first
    ("Checkerboard()", 4, ["x.x.", ".x.x", "x.x.", ".x.x"]),
    ("Checkerboard(2)", 5, ["xx..x", "xx..x", "..xx.", "..xx.", "xx..x"]),
    ("Checkerboard()", 2, ["..", "..", "x.", ".x"]),
    ("Radial(0)", 3, ["x..", ".x.", "..x"]),
    ("Radial(1)", 9, ["...x.xxxx", "x...x.xxx"]),
    ("Radial(3)", 9, ["x.x.xxxxx"]),
    ("Radial(1)", 3, ["x.x", "xx.", "xxx", "xxx", "xxx"]),  # distances count before the first, too
    ("FirstLast(1, 2)", 5, ["x..xx", "x..xx"]),
    ("FirstLast(0, 1)", 2, [".x", ".x", ".x"]),
    ("FirstLast(9, 0)", 2, ["xx", "xx"]),
    ("Window(2, 0)", 5, ["xxx..", ".xxx.", "..xxx"]),  # the last two neighbors,
    ("FirstLast(0, 2)", 5, ["...xx", "...xx", "...xx"]),  # and the last two of the sequence
    ("Window(0, 2)", 5, ["..xxx", "...xx", "....x"]),  # the next two neighbors,
    ("FirstLast(2, 0)", 5, ["xx...", "xx...", "xx..."]),  # and the first two of the sequence
    ("BigBird(2, 0, 1, 0)", 5, ["xx...", "xx...", "..xx.", "..xx.", "....x"]),
    ("BigBird(2, 0, 3, 0)", 5, ["xxxx.", "xxxx.", "xxxxx", "xxxxx", "..xxx"]),
    ("BigBird(2, 0, 1, 1)", 7, ["xxxx..x", "xxxx..x", "xx..xxx", "xx..xxx", "xxxxxxx"]),
    ("BigBird(1, 0, 1, 2)", 6, ["xxxxxx", "xxx.xx", "xx.xxx", "xxxxxx", "xxxxxx"]),
    ("BigBird(2, 0, 1, 1)", 5, ["xx..x", "xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxxx"]),
    ("RandomBlocks(9, 2)", 3, ["...", "xxx", "xxx", "xxx"]),
    ("RandomBlocks(0, 2)", 3, ["...", "...", "..."]),
    ("RandomTokens(1)", 3, ["xxx", "xxx", "xxx", "xxx"]),
    ("RandomTokens(0.0)", 3, ["...", "...", "..."]),
]


@pytest.mark.parametrize(("expression", "n_k", "rows"), DRAWN)
def test_masks_drawn_by_hand(expression, n_k, rows):
    drawn = torch.tensor([[letter == "x" for letter in row] for row in rows])
    assert torch.equal(cases.mask(expression, len(rows), n_k, heads=1)[0], drawn)
    assert torch.equal(cases.library(expression).mask(len(rows), n_k), drawn)
