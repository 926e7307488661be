"""How far information travels through stacked layers, against powers of the masks."""

import matplotlib.pyplot as plt
import pytest
import torch

from sparse_attn import BigBird, Causal, Global, PerHead, RandomBlocks, Strided, Window

PATTERNS = [
    Window(3),
    Window(5, 0),
    Window(2, dilation=4),
    Window(1) | Global([7]),
    Strided(6),
    RandomBlocks(2, 5),
    BigBird(8) & Causal(),
    PerHead([Window(1), Window(1, dilation=8)]),
]


def power(patterns, n):
    """What the first layers reach: a path of allowed pairs, or none, in each of them."""
    reached = torch.eye(n, dtype=torch.float64)
    for pattern in patterns:
        mask = pattern.mask(n, heads=pattern.heads).any(0) | torch.eye(n, dtype=torch.bool)
        reached = (mask.double() @ reached > 0).double()
    return reached > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 40, 65])
def test_equal_layers_are_powers_of_the_mask(pattern, n):
    pattern = Window(1) if n < 8 and "7" in repr(pattern) else pattern
    field = pattern.receptive_field(n, 4)
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    for layers in range(1, 5):
        expected = power([pattern] * layers, n)
        assert torch.equal(field.mask(layers), expected)
        assert field.distance[layers - 1] == apart[expected].max()
        assert field.share[layers - 1] == pytest.approx(expected.double().mean().item())
    complete = [layers for layers in range(1, 5) if power([pattern] * layers, n).all()]
    assert field.layers_to_connect == (complete[0] if complete else None)
    assert torch.equal(field.mask(), field.mask(4))


def test_layers_may_differ():
    stack = [Window(2, dilation=dilation) for dilation in (1, 3, 9)]
    field = stack[0].receptive_field(80, stack[1:])
    assert field.distance == (2, 8, 26)
    assert torch.equal(field.mask(), power(stack, 80))
    assert not torch.equal(field.mask(2), power(stack[1:], 80))


def test_what_connects_everything():
    assert Window(4).receptive_field(41, 12).layers_to_connect == 10
    assert (Window(1) | Global([0])).receptive_field(100, 3).layers_to_connect == 2
    assert Window(4, 0).receptive_field(41, 12).layers_to_connect is None


def test_plot():
    for pattern in (Window(2), Window(20) | Global([0])):
        ax = pattern.receptive_field(24, 3).plot()
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
        assert "after" in ax.get_title()
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1), ValueError), ((8, 0), ValueError), ((8, 1.5), TypeError), ((8, [3]), TypeError)],
)
def test_errors(arguments, error):
    with pytest.raises(error, match="sparse_attn: expected"):
        Window(2).receptive_field(*arguments)
