"""Gated attention, and attention over pairs or with gates that the content makes."""

import math

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, Shape, inputs
from composed import (
    assert_as_good_as_torch,
    assert_as_good_on_average,
    dense,
    same_bits_for_any_threads,
)
from torch.autograd import gradcheck

import sparse_attn
from sparse_attn import (
    BlockBias,
    BlockLayout,
    DynamicSparseSelfAttention,
    KeyLists,
    SlotBias,
    Window,
)
from sparse_attn.functional import attention, choose_blocks, dynamic_attention, gated_attention

SHAPE = Shape(33, 57, 16, 9)
CAUSAL = sparse_attn.Causal().mask(33, 57).to(DEVICE)


def gate(*size, dtype=torch.float64):
    return cases.normal(*size, seed=4, dtype=dtype).sigmoid()


GATES = {
    "pairs": (2, 4, 33, 57),
    "of_heads": (4, 33, 57),
    "one": (33, 57),
    "of_keys": (2, 4, 1, 57),
    "of_queries": (2, 1, 33, 1),
    "keys_of_all": (57,),
    "scalar": (),
    "of_examples": (2, 1, 1, 1),
}


# The error of a single number is chance, so its half types are judged by many draws, below.
NUMBERS = [
    (name, dtype)
    for name in GATES
    for dtype in DTYPES[:3]
    if not (name == "scalar" and dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), NUMBERS, ids=str)
def test_dynamic_gates(name, dtype):
    padding = torch.arange(57, device=DEVICE) >= torch.tensor([[57], [31]], device=DEVICE)
    for causal in (False, True):
        assert_as_good_as_torch(
            lambda q, k, v, g, c=causal: dynamic_attention(
                q, k, v, lambda *_: g, is_causal=c, key_padding_mask=padding
            ),
            lambda q, k, v, g, c=causal: dense(
                q, k, v, padding, gate=g, allowed=CAUSAL if c else None
            ),
            [*inputs(SHAPE, dtype), gate(*GATES[name], dtype=dtype)],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_gate_for_all_pairs(dtype):
    sizes = ((2, 4, 33, 16), (2, 4, 57, 16), (2, 4, 57, 9), ())
    draws = [
        [cases.normal(*size, seed=5 * i + j, dtype=dtype) for j, size in enumerate(sizes)]
        for i in range(30)
    ]
    assert_as_good_on_average(
        lambda q, k, v, g: dynamic_attention(q, k, v, lambda *_: g),
        lambda q, k, v, g: dense(q, k, v, gate=g),
        draws,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(2, 4, 33, 57), (33, 57), (2, 1, 1, 57), (4, 33, 1), (57,), ()])
def test_dynamic_masks(size, causal):
    mask = cases.bits(*size, share=0.3)
    allowed = mask & CAUSAL if causal else mask.expand(2, 4, 33, 57)
    assert_as_good_as_torch(
        lambda *x: dynamic_attention(*x, lambda *_: mask, is_causal=causal),
        lambda *x: dense(*x, allowed=allowed),
        inputs(SHAPE),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_patterns(causal):
    tensors = inputs(SHAPE)
    layout = BlockLayout(cases.bits(2, 4, 5, 8), 8)
    lists = KeyLists(cases.numbers(2, 4, 33, 5, below=57))
    for pattern in (layout, lists, Window(3) | layout):
        output = dynamic_attention(*tensors, lambda *_, p=pattern: p, is_causal=causal)
        expected = attention(*tensors, pattern & sparse_attn.Causal() if causal else pattern)
        assert torch.equal(output, expected)
    table = BlockBias(gate(2, 4, 5, 8, dtype=torch.float32), 8)
    seen = sparse_attn.Causal() if causal else sparse_attn.Full()
    output = dynamic_attention(*tensors, lambda *_: table, is_causal=causal)
    assert torch.equal(output, attention(*tensors, seen, gate=table))


def test_gated():
    tensors = inputs(SHAPE, torch.float64)
    for size in ((2, 4, 33, 57), (1, 4, 33, 57), (2, 1, 33, 57)):
        assert_as_good_as_torch(
            gated_attention, lambda *x: dense(*x[:3], gate=x[3]), [*tensors, gate(*size)]
        )
    window = Window(4, 2)
    distance = torch.arange(57, device=DEVICE) - torch.arange(24, 57, device=DEVICE)[:, None]
    slots = (distance + 4).clamp(0, 6)
    table = gate(4, 7)
    expected = dense(*tensors, gate=table[:, slots], allowed=window.mask(33, 57).to(DEVICE))
    for given in (table, SlotBias(table[None, :, None])):
        output = gated_attention(*tensors, given, pattern=window)
        torch.testing.assert_close(output, expected)


def test_content_makes_the_gate():
    """Gradients reach it, and the module that made it."""
    module = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64, device=DEVICE)
    leaves = [x.requires_grad_() for x in inputs(Shape(4, 6, 3, 2, heads=2), torch.float64)]

    def generate(query, key, value):
        return torch.sigmoid(module(query) @ key.mT)

    def per_key(query, key, value):
        return torch.sigmoid(module(key).sum(-1))[:, :, None]

    for made in (generate, per_key):
        assert gradcheck(
            lambda q, k, v, w, made=made: dynamic_attention(q, k, v, made, is_causal=True),
            [*leaves, module.weight],
        )
        (grad,) = torch.autograd.grad(dynamic_attention(*leaves, made).sum(), module.weight)
        assert grad.any()


def test_what_padding_holds():
    padding = cases.padding(2, 57)
    padding[1] = True
    weight = cases.normal(16, 16).requires_grad_()

    def generate(query, key, value):
        return torch.sigmoid(query @ weight @ key.mT)

    def per_key(query, key, value):
        return torch.sigmoid(key @ weight).mean(-1)[:, :, None]

    for made in (generate, per_key):
        results = []
        for junk in (0.0, math.nan, math.inf):
            query, key, value = inputs(SHAPE, torch.float64)
            key, value = (x.masked_fill(padding[:, None, :, None], junk) for x in (key, value))
            leaves = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), weight]
            output = dynamic_attention(*leaves[:3], made, key_padding_mask=padding)
            results.append([output, *torch.autograd.grad(output.sum(), leaves)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert not results[0][0][1].any()


def test_grouped_queries():
    query, key, value = inputs(Shape(20, 30, 8, kv_heads=2))
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    for size in ((1, 4, 1, 30), (1, 1, 1, 30), (1, 4, 20, 1), (4, 20, 30)):
        made = gate(*size, dtype=torch.float32)
        output = dynamic_attention(query, key, value, lambda *_, m=made: m, enable_gqa=True)
        expected = dense(query, *repeated, gate=made)
        torch.testing.assert_close(output, expected)


def test_threads_and_sizes():
    tensors = [*inputs(Shape(600, 900, 16, batch=1, heads=2)), gate(2, 1, 900, dtype=torch.float32)]
    same_bits_for_any_threads(lambda *x: dynamic_attention(*x[:3], lambda *_: x[3]), tensors)
    for shape in (Shape(0, 5, 8), Shape(5, 0, 8), Shape(5, 7, 8, batch=0)):
        tensors = inputs(shape)
        for made in (gate(1, 1, shape.n_k), gate(shape.n_q, shape.n_k), gate() > 0):
            made = made if made.dtype == torch.bool else made.float()
            assert not dynamic_attention(*tensors, lambda *_, m=made: m * True).isnan().any()


QKV = inputs(Shape(10, 12, 8))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (None, TypeError, "generate to return a bool or floating Tensor.* got NoneType"),
        (torch.ones(10, 12).int(), TypeError, r"got torch\.int32"),
        (gate(9, 12), ValueError, r"broadcastable to \(2, 4, 10, 12\), got one of shape \(9, 12\)"),
        (gate(1, 2, 4, 10, 12), ValueError, "broadcastable to"),
        ((gate(10, 12),), TypeError, "got tuple"),
        (BlockLayout(cases.bits(2, 2), 5), ValueError, "layout of shape"),
    ],
)
def test_wrong_returns(made, error, message):
    with pytest.raises(error, match=message):
        dynamic_attention(*QKV, lambda *_: made)


def test_errors():
    with pytest.raises(TypeError, match="generate to be callable, got 3"):
        dynamic_attention(*QKV, 3)
    with pytest.raises(TypeError, match="is_causal to be True or False"):
        dynamic_attention(*QKV, lambda *_: QKV[0], is_causal=1)
    with pytest.raises(TypeError, match="the gate to come from generate"):
        dynamic_attention(*QKV, lambda *_: Window(1), gate=gate(10, 12))
    with pytest.raises(TypeError, match="gate to be a Tensor, a SlotBias or a BlockBias, got None"):
        gated_attention(*QKV, None)
    with pytest.raises(ValueError, match="exactly one finite Window"):
        gated_attention(*QKV, gate(4, 7, dtype=torch.float32))
    for given in ({}, {"generate": torch.sigmoid, "keep": 2}):
        with pytest.raises(TypeError, match="expected one of generate and keep"):
            DynamicSparseSelfAttention(16, 2, **given)
    with pytest.raises(ValueError, match="keep to be a share"):
        DynamicSparseSelfAttention(16, 2, keep=1.5)
    with pytest.raises(TypeError, match="generate to be callable"):
        DynamicSparseSelfAttention(16, 2, generate="gate")


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.of_key = torch.nn.Linear(8, 1)

    def forward(self, query, key, value):
        return torch.sigmoid(self.of_key(key)).mT


@pytest.mark.parametrize("causal", [False, True])
class TestLayer:
    def test_gates(self, causal):
        layer = DynamicSparseSelfAttention(24, 3, generate=Gate(), causal=causal).to(DEVICE)
        assert "generate.of_key.weight" in layer.state_dict()
        x = cases.normal(2, 31, 24, dtype=torch.float32)
        layer(x, cases.padding(2, 31)).sum().backward()
        assert layer.generate.of_key.weight.grad.any()
        self.check_causal(layer, x, causal)

    @pytest.mark.parametrize("keep", [2, 0.4])
    def test_blocks(self, causal, keep):
        layer = DynamicSparseSelfAttention(24, 3, keep=keep, block=8, causal=causal).to(DEVICE)
        x = cases.normal(2, 45, 24, dtype=torch.float32)
        padding = cases.padding(2, 45)
        heads = [
            p(x).unflatten(-1, (3, 8)).transpose(1, 2)
            for p in (layer.query, layer.key, layer.value)
        ]
        chosen = choose_blocks(
            *heads[:2], block=8, keep=keep, is_causal=causal, key_padding_mask=padding
        )
        pattern = chosen & sparse_attn.Causal() if causal else chosen
        expected = attention(*heads, pattern, key_padding_mask=padding)
        expected = layer.output(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, padding), expected)
        self.check_causal(layer, x, causal)

    def check_causal(self, layer, x, causal):
        changed = x.clone()
        changed[:, 20:] += 1
        same = torch.equal(layer(x)[:, :20], layer(changed)[:, :20])
        assert same == causal


def test_masks_and_compile():
    layer = DynamicSparseSelfAttention(
        24, 3, generate=lambda q, k, v: q @ k.mT > 0, causal=True, dropout=0.1
    ).to(DEVICE)
    layer.eval()
    x = cases.normal(2, 31, 24, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
