"""The tutorials' modules: their interfaces, their masks, and never a NaN."""

import sys
from functools import partial

import example_scripts
import pytest
import torch
from example_scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

from tutorial_modules import DroppingAttention, KeepingAttention, NeighborAttention

from sparse_attn import RandomTokens, Window

run = partial(example_scripts.run, "tutorial_modules.py")


def test_one_number_is_a_share_dropped_and_one_a_share_kept():
    assert DroppingAttention(64, 4, sparsity_ratio=0.75).pattern == RandomTokens(0.25)
    assert KeepingAttention(64, 4, sparsity=0.75).pattern == RandomTokens(0.75)
    assert NeighborAttention(embed_size=64, heads=4, k=3).pattern == Window(3)


def random_ones(kept: float) -> list[torch.nn.Module]:
    return [
        DroppingAttention(d_model=64, num_heads=4, sparsity_ratio=1 - kept),
        KeepingAttention(d_model=64, n_heads=4, sparsity=kept),
    ]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 1.0])
def test_no_share_gives_a_nan(kept):
    for layer in random_ones(kept):
        x = torch.randn(3, 50, 64, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_two_calls_differ_unless_the_mask_is_no_longer_random():
    x = torch.randn(2, 50, 64)
    for layer in random_ones(0.3):
        assert not torch.equal(layer(x), layer(x))
    for layer in (*random_ones(1.0), NeighborAttention(64, 4, 3)):
        assert torch.equal(layer(x), layer(x))


def test_other_queries_than_keys():
    for layer in (*random_ones(0.3), NeighborAttention(64, 4, 3)):
        query, memory = torch.randn(2, 9, 64), torch.randn(2, 30, 64)
        assert layer(query, memory, memory).shape == (2, 9, 64)


def test_whole_run():
    text = run("--batch", "2", "--length", "100", "--width", "32", "--heads", "4", "--k", "5")
    assert text.count("output (2, 100, 32), all finite") == 3
    assert text.count("differs by up to 0\n") == 1
    assert "10.7 % of the pairs" in text


def test_wrong_options_say_why():
    assert "share from 0 to 1" in run("--kept", "2", status=2)
    assert "multiple of num_heads" in run("--width", "30", status=2)
    assert "--kept" in run("--help")
