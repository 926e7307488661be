"""Gradients against finite differences in float64, for every pattern."""

import cases
import pytest
import torch
from cases import DEVICE, PATTERNS, SIZED, Shape
from torch import Tensor
from torch.autograd import gradcheck

from sparse_attn import Window, attention

SMALL = Shape(n_q=9, head_dim=3, value_dim=2, batch=1)


def holds(expression: str, shape: Shape, **options) -> bool:
    """gradcheck of output and log-sum-exp; rows without keys leave their -inf out."""
    pattern = cases.library(expression, shape)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = attention(query, key, value, pattern, return_lse=True, **options)
        return output, torch.where(lse.isinf(), 0, lse)

    leaves = [x.requires_grad_() for x in cases.inputs(shape, torch.float64)]
    return gradcheck(call, leaves)


@pytest.mark.parametrize("name", [*PATTERNS, *SIZED])
def test_patterns(name):
    assert holds((PATTERNS | SIZED)[name], SMALL)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL._replace(n_q=5, n_k=9),
        SMALL._replace(n_q=9, n_k=5),
        SMALL._replace(kv_heads=2),
        SMALL._replace(kv_heads=1, value_dim=5),
        SMALL._replace(batch=2, n_q=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["window_causal", "window_global", "per_head", "empty_rows"])
def test_shapes(name, shape):
    assert holds(PATTERNS[name], shape, enable_gqa=shape.kv_heads is not None)


@pytest.mark.sample
@pytest.mark.parametrize("name", PATTERNS)
def test_masks(name):
    shape = SMALL._replace(batch=2, n_q=6)
    global_mask = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]], device=DEVICE).bool()
    padding = cases.padding(2, 6)
    # Which heads are causal decides what global tokens mean; a mixed list is a case of its own.
    if name != "per_head":
        assert holds(PATTERNS[name], shape, global_mask=global_mask)
        assert holds(PATTERNS[name], shape, global_mask=global_mask, key_padding_mask=padding)
    assert holds(PATTERNS[name], shape, key_padding_mask=padding, scale=0.7)


def test_longer_than_a_tile():
    assert holds(
        "Window(3, dilation=2) | Global([0])",
        Shape(n_q=131, head_dim=1, value_dim=1, batch=1, heads=1),
    )


def scalar(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output, lse = attention(query, key, value, Window(2), return_lse=True)
    return output.square().sum() + lse.sum()


def test_torch_func_grad():
    tensors = cases.inputs(SMALL, torch.float64)
    ours = torch.func.grad(scalar, argnums=(0, 1, 2))(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(scalar(*leaves), leaves)
    for gradient, other in zip(ours, expected, strict=True):
        assert torch.equal(gradient, other)


def test_torch_func_vjp():
    tensors = cases.inputs(SMALL, torch.float64)
    output, vjp = torch.func.vjp(lambda *x: attention(*x, Window(2)), *tensors)
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(attention(*leaves, Window(2)), leaves, torch.ones_like(output))
    for gradient, other in zip(vjp(torch.ones_like(output)), expected, strict=True):
        assert torch.equal(gradient, other)
