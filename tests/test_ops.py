"""The registered operators: their contract with torch, and how they behave under its tools."""

import cases
import pytest
import torch
from cases import DEVICE, PATTERNS, Shape
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sparse_attn import Causal, Global, PerHead, Window, attention

OPS = torch.ops.sparse_attn
SHAPE = Shape(n_q=9, head_dim=8, value_dim=4)
GQA = SHAPE._replace(kv_heads=2)
UNBOUNDED = 2**63 - 1

# The fronts: operator, its own arguments, and the pattern that they stand for.
FRONTS = [
    ("window_attention", (3,), Window(3)),
    ("window_attention", (3, 0), Window(3, 0)),
    ("window_attention", (UNBOUNDED, 1), Window(float("inf"), 1)),
    ("dilated_attention", (2, None, 3), Window(2, dilation=3)),
    ("dilated_attention", (2, 0, 2), Window(2, 0, dilation=2)),
    ("global_attention", ([0, -1], 2), Window(2) | Global([0, -1])),
    ("global_attention", ([1], 2, 1, 2), Window(2, 1, dilation=2) | Global([1])),
    ("global_attention", ([], 2), Window(2)),
]


def general(pattern) -> tuple[list[int]]:
    return (list(pattern.encode()),)


CALLS = [
    *((name, arguments) for name, arguments, _ in FRONTS),
    *(("attention", general(cases.pattern(name))) for name in ("window", "nested", "per_head")),
]

OPTIONS = {
    "plain": (SHAPE, {}),
    "padding": (SHAPE, {"key_padding_mask": cases.padding(2, 9)}),
    "global_mask": (SHAPE, {"global_mask": cases.global_tokens(2, 9, seed=1), "scale": 0.5}),
    "gqa": (GQA, {"enable_gqa": True}),
    "other_length": (SHAPE._replace(n_q=5, n_k=9), {}),
}

SAMPLED = ["plain", *(pytest.param(o, marks=pytest.mark.sample) for o in OPTIONS if o != "plain")]


def backward_arguments(name: str, tensors: list[Tensor], arguments: tuple, options: dict) -> tuple:
    """Everything that a backward op takes before the pattern, from one forward call."""
    output, lse = getattr(OPS, name)(*tensors, *arguments, **options)
    grad_output = cases.normal(*output.shape, seed=2, dtype=output.dtype)
    grad_lse = cases.normal(*lse.shape, seed=3, dtype=lse.dtype)
    return grad_output, grad_lse, *tensors, output, lse


@pytest.mark.parametrize("option", SAMPLED)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=str)
def test_opcheck(name, arguments, option):
    shape, options = OPTIONS[option]
    leaves = [x.requires_grad_() for x in cases.inputs(shape)]
    opcheck(getattr(OPS, name).default, (*leaves, *arguments), options)


@pytest.mark.parametrize("option", SAMPLED)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=str)
def test_opcheck_of_backward(name, arguments, option):
    shape, options = OPTIONS[option]
    given = backward_arguments(name, cases.inputs(shape), arguments, options)
    backward = getattr(OPS, f"{name}_backward").default
    opcheck(backward, (*given, *arguments), options)
    opcheck(backward, (given[0], None, *given[2:], *arguments), options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck_of_dtypes(dtype):
    leaves = [x.requires_grad_() for x in cases.inputs(SHAPE, dtype)]
    opcheck(OPS.window_attention.default, (*leaves, 3))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("name", "arguments", "pattern"), FRONTS, ids=str)
def test_fronts_are_the_general_op(name, arguments, pattern, option):
    shape, options = OPTIONS[option]
    tensors = cases.inputs(shape)
    ours = getattr(OPS, name)(*tensors, *arguments, **options)
    expected = OPS.attention(*tensors, *general(pattern), **options)
    python = attention(*tensors, pattern, return_lse=True, **options)
    for result, other, third in zip(ours, expected, python, strict=True):
        assert torch.equal(result, other)
        assert torch.equal(result, third)

    given = backward_arguments(name, tensors, arguments, options)
    ours = getattr(OPS, f"{name}_backward")(*given, *arguments, **options)
    expected = OPS.attention_backward(*given, *general(pattern), **options)
    for result, other in zip(ours, expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=str)
def test_backward_op_is_what_autograd_calls(name, arguments):
    tensors = cases.inputs(SHAPE)
    given = backward_arguments(name, tensors, arguments, {})
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(getattr(OPS, name)(*leaves, *arguments), leaves, given[:2])
    ours = getattr(OPS, f"{name}_backward")(*(x.detach() for x in given), *arguments)
    for result, other in zip(ours, expected, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=str)
def test_meta(name, arguments, dtype):
    tensors = cases.inputs(SHAPE, dtype)
    given = backward_arguments(name, tensors, arguments, {})
    real = (*given[5:], *getattr(OPS, f"{name}_backward")(*given, *arguments))
    nowhere = [x.to("meta") for x in given]
    meta = getattr(OPS, name)(*nowhere[2:5], *arguments)
    meta = (*meta, *getattr(OPS, f"{name}_backward")(*nowhere, *arguments))
    for result, expected in zip(meta, real, strict=True):
        assert result.device.type == "meta"
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert result.stride() == expected.stride()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    Window(2),
    Window(2, 0, dilation=3),
    (Window(2, 0) | Global([0])) & Causal(),
    PerHead([Window(2), Window(1, dilation=2)]),
]


@pytest.mark.parametrize("pattern", COMPILED, ids=repr)
@pytest.mark.parametrize("masks", [False, True])
def test_compile_once_for_all_lengths(pattern, masks, dynamo):
    """One graph for the first length, one for all others."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(query: Tensor, key: Tensor, value: Tensor, *options: Tensor) -> Tensor:
        named = dict(zip(("key_padding_mask", "global_mask"), options, strict=False))
        output, lse = attention(query, key, value, pattern, return_lse=True, **named)
        return output.square().sum() + torch.where(lse.isinf(), 0, lse).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n in (2, 3, 64, 129, 1000):
        leaves = [x.requires_grad_() for x in cases.inputs(Shape(n_q=n, head_dim=16))]
        options = (cases.padding(2, n), cases.global_tokens(2, n)) if masks else ()
        ours = compiled(*leaves, *options)
        expected = loss(*leaves, *options)
        torch.testing.assert_close(ours, expected)
        pairs = zip(*(torch.autograd.grad(x, leaves) for x in (ours, expected)), strict=True)
        for gradient, other in pairs:
            torch.testing.assert_close(gradient, other)
    assert counter.frame_count <= 2


def test_compile_with_inductor(dynamo):
    pattern = Window(5) | Global([0])
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(n_q=67, head_dim=16))]

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query * 2, key, value, pattern).sin().sum()

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for result, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, other)


def test_compile_of_the_op_itself(dynamo):
    tensors = cases.inputs(SHAPE)
    compiled = torch.compile(OPS.window_attention, backend="aot_eager", fullgraph=True)
    for result, other in zip(compiled(*tensors, 3), OPS.window_attention(*tensors, 3), strict=True):
        assert torch.equal(result, other)


class Layer(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, Window(3, 1) | Global([0]))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, dynamo):
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        Layer(),
        tuple(cases.inputs(Shape(n_q=67, head_dim=16))),
        dynamic_shapes=({2: length},) * 3,
        strict=strict,
    )
    for n in (2, 67, 200):
        tensors = cases.inputs(Shape(n_q=n, head_dim=16))
        assert torch.equal(program.module()(*tensors), Layer()(*tensors))


def test_export_saves_and_loads(tmp_path):
    tensors = tuple(cases.inputs(SHAPE))
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(Layer(), tensors), path)
    loaded = torch.export.load(path).module()
    assert torch.equal(loaded(*tensors), Layer()(*tensors))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    tensors = cases.inputs(SHAPE)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.autocast(DEVICE.type, low):
        output, lse = attention(*leaves, Window(3), return_lse=True)
        mixed = attention(tensors[0].to(low), *tensors[1:], Window(3))
    assert output.dtype == mixed.dtype == low
    assert lse.dtype == torch.float32
    expected = attention(*(x.to(low) for x in tensors), Window(3))
    assert torch.equal(output, expected)
    assert torch.equal(mixed, expected)
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=str)
def test_autocast_of_every_op(name, arguments):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output, lse = getattr(OPS, name)(*cases.inputs(SHAPE), *arguments)
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert attention(*cases.inputs(SHAPE, torch.float64), Window(3)).dtype == torch.float64


@pytest.mark.parametrize("name", ["window", "per_head", "causal_global"])
def test_inference_mode(name):
    tensors = cases.inputs(SHAPE)
    expected = attention(*tensors, cases.pattern(name), return_lse=True)
    with torch.inference_mode():
        results = attention(*tensors, cases.pattern(name), return_lse=True)
    for result, other in zip(results, expected, strict=True):
        assert result.is_inference()
        assert torch.equal(result, other)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 1, 1), (0, None, None), (None, 2, 0)], ids=str)
@pytest.mark.parametrize("name", ["window", "per_head", "causal_global"])
def test_vmap_is_a_loop(name, in_dims):
    count = 3
    tensors = [
        x if dim is None else torch.stack([(n + 1) * x for n in range(count)], dim)
        for x, dim in zip(cases.inputs(SHAPE), in_dims, strict=True)
    ]

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return attention(query, key, value, cases.pattern(name), return_lse=True)

    results = torch.vmap(call, in_dims=in_dims)(*tensors)
    for n in range(count):
        chosen = [
            x if dim is None else x.select(dim, n) for x, dim in zip(tensors, in_dims, strict=True)
        ]
        for result, expected in zip(results, call(*chosen), strict=True):
            torch.testing.assert_close(result[n], expected)


def test_vmap_of_the_gradient():
    tensors = [torch.stack([x, 2 * x]) for x in cases.inputs(SHAPE, torch.float64)]

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, Window(3)).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    results = torch.vmap(gradient)(*tensors)
    for n in range(2):
        for result, expected in zip(results, gradient(*(x[n] for x in tensors)), strict=True):
            torch.testing.assert_close(result[n], expected)


def test_checkpointing():
    leaves = [x.requires_grad_() for x in cases.inputs(SHAPE)]
    pattern = cases.library(PATTERNS["window_global"])
    plain = torch.autograd.grad(attention(*leaves, pattern).square().sum(), leaves)
    output = torch.utils.checkpoint.checkpoint(attention, *leaves, pattern, use_reentrant=False)
    again = torch.autograd.grad(output.square().sum(), leaves)
    for result, expected in zip(again, plain, strict=True):
        assert torch.equal(result, expected)
