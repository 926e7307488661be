"""Layers of linear attention, and its state for decoding."""

import copy
import io
import math
from itertools import pairwise

import cases
import pytest
import torch
from cases import DEVICE, Shape

from sparse_attn import LinearSelfAttention, LinearState, PerformerSelfAttention
from sparse_attn.functional import linear_attention, orthogonal_features, performer_attention

LAYERS = [LinearSelfAttention, PerformerSelfAttention]


def layer_of(kind, **options):
    torch.manual_seed(0)
    return kind(24, 4, device=DEVICE, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_projections_around_the_function(kind, causal):
    layer, x = layer_of(kind, causal=causal), cases.normal(2, 30, 24, dtype=torch.float32)
    padding = cases.padding(2, 30)
    heads = [
        projection(x).unflatten(-1, (4, 6)).transpose(1, 2)
        for projection in (layer.query, layer.key, layer.value)
    ]
    options = {"key_padding_mask": padding, "is_causal": causal}
    if kind is LinearSelfAttention:
        rows = linear_attention(*heads, **options)
    else:
        assert layer.projection.shape == (int(6 * math.log(6)), 6)
        rows = performer_attention(*heads, projection=layer.projection, **options)
    expected = layer.output(rows.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, padding), expected)
    assert not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_of_the_heads_output(kind):
    layer = layer_of(kind, dropout=1.0)
    x = cases.normal(2, 10, 24, dtype=torch.float32)
    torch.testing.assert_close(layer(x), layer.output.bias.expand(2, 10, 24))
    layer.eval()
    assert not torch.allclose(layer(x), layer.output.bias.expand(2, 10, 24))


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_train_and_compile(kind):
    layer = layer_of(kind, causal=True)
    x = cases.normal(2, 20, 24, dtype=torch.float32)
    expected = layer(x)
    expected.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    doubled = copy.deepcopy(layer).double()
    torch.testing.assert_close(doubled(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_module_as_feature_map_is_trained():
    feature_map = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Softplus()).to(DEVICE)
    layer = layer_of(LinearSelfAttention, feature_map=feature_map)
    layer(cases.normal(2, 9, 24, dtype=torch.float32)).sum().backward()
    assert feature_map[0].weight.grad.any()
    assert "feature_map.0.weight" in layer.state_dict()


def test_redrawing():
    layer = layer_of(PerformerSelfAttention, redraw_interval=3, num_features=8)
    x = cases.normal(1, 5, 24, dtype=torch.float32)
    drawn = []
    for _ in range(7):
        layer(x).sum().backward()
        drawn.append(layer.projection)
    changes = [not torch.equal(a, b) for a, b in pairwise(drawn)]
    assert changes == [False, False, True, False, False, True]
    layer.eval()
    for _ in range(5):
        layer(x)
    assert torch.equal(layer.projection, drawn[-1])
    layer.train()
    layer.fix_projection()
    for _ in range(5):
        layer(x)
    assert torch.equal(layer.projection, drawn[-1])


def test_a_redraw_between_forward_and_backward():
    layer = layer_of(PerformerSelfAttention, redraw_interval=1, num_features=8)
    x = cases.normal(1, 5, 24, dtype=torch.float32)
    (layer(x) + layer(x) + layer(x)).sum().backward()


def test_redrawing_goes_on_from_a_state_dict():
    options = {"redraw_interval": 2, "num_features": 8, "seed": 3}
    layer, x = layer_of(PerformerSelfAttention, **options), torch.ones(1, 5, 24, device=DEVICE)
    for _ in range(3):
        layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    other = layer_of(PerformerSelfAttention, **options)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for _ in range(4):
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer.projection, other.projection)
    assert not torch.equal(
        layer_of(PerformerSelfAttention, seed=4).projection,
        layer_of(PerformerSelfAttention).projection,
    )


@pytest.mark.parametrize(
    ("options", "exception", "word"),
    [
        ({"num_features": 0}, ValueError, "num_features"),
        ({"redraw_interval": 0}, ValueError, "redraw_interval"),
        ({"kernel": "cosine"}, ValueError, "kernel"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"eps": -1}, ValueError, "eps"),
        ({"dropout": 2.0}, ValueError, "dropout"),
    ],
)
def test_wrong_options_of_a_layer(options, exception, word):
    with pytest.raises(exception, match=word):
        PerformerSelfAttention(24, 4, **options)


def test_wrong_feature_map_of_a_layer():
    with pytest.raises(TypeError, match="feature_map"):
        LinearSelfAttention(24, 4, feature_map="elu")


# ---- decoding -----------------------------------------------------------------------------------


def kinds(heads: int, dtype: torch.dtype) -> dict:
    """Options of a state, and the function that it is to equal."""
    weights = orthogonal_features(30, 8, dtype=dtype, device=DEVICE)
    per_head = orthogonal_features(30, 8, num_heads=heads, dtype=dtype, device=DEVICE)
    phi = torch.nn.functional.softplus
    return {
        "elu": ({}, linear_attention, {}),
        "map": ({"feature_map": phi, "eps": 0.1}, linear_attention,
                {"feature_map": phi, "eps": 0.1}),
        "softmax": ({"projection": weights}, performer_attention, {"projection": weights}),
        "heads": ({"projection": per_head, "eps": 0.0, "scale": 0.7}, performer_attention,
                  {"projection": per_head, "eps": 0.0, "scale": 0.7}),
        "relu": ({"projection": weights, "kernel": "relu"}, performer_attention,
                 {"projection": weights, "kernel": "relu"}),
    }  # fmt: skip


KINDS = ["elu", "map", "softmax", "heads", "relu"]
STEPS = [[1] * 12, [5, 7], [12], [3, 1, 1, 4, 3]]


def decode(state, tensors, steps, padding=None):
    rows, begin = [], 0
    for step in steps:
        part = [x[:, :, begin : begin + step] for x in tensors]
        mask = None if padding is None else padding[:, begin : begin + step]
        rows.append(state.attend(*part, key_padding_mask=mask))
        begin += step
    return torch.cat(rows, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_sequence(kind, steps, padded):
    shape = Shape(12, head_dim=8, value_dim=5, kv_heads=2)
    query, key, value = cases.inputs(shape, torch.float64)
    key = key * torch.logspace(-1, 1, 12, device=DEVICE, dtype=torch.float64)[:, None]
    padding = (cases.random(2, 12) < 0.4) if padded else None
    options, function, given = kinds(4, torch.float64)[kind]
    state = LinearState(batch_size=2, num_heads_kv=2, head_dim=8, value_dim=5,
                        dtype=torch.float64, device=DEVICE, **options)  # fmt: skip
    rows = decode(state, (query, key, value), steps, padding)
    expected = function(query, key, value, key_padding_mask=padding, is_causal=True,
                        enable_gqa=True, **given)  # fmt: skip
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-10)
    assert state.length == 12


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_constant(kind):
    options, _, _ = kinds(4, torch.float32)[kind]
    state = LinearState(batch_size=2, num_heads_kv=4, head_dim=8, device=DEVICE, **options)
    sizes = set()
    for _ in range(5):
        state.attend(*cases.inputs(Shape(3, head_dim=8)))
        sizes.add(state.nbytes)
    assert len(sizes) == 1
    assert 0 < sizes.pop() <= 2 * 4 * 9 * 35 * 4


def test_wild_norms_in_a_state():
    weights = orthogonal_features(30, 8, device=DEVICE)
    query, key, value = cases.inputs(Shape(40, head_dim=8))
    for sizes in (torch.logspace(-2, 2, 40), torch.logspace(2, -2, 40)):
        wild = key * sizes.to(DEVICE)[:, None]
        state = LinearState(batch_size=2, num_heads_kv=4, head_dim=8, projection=weights,
                            device=DEVICE)  # fmt: skip
        rows = decode(state, (query, wild, value), [1] * 40)
        exact = performer_attention(
            *(x.double() for x in (query, wild, value)), projection=weights, is_causal=True
        )
        torch.testing.assert_close(rows.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["elu", "softmax"])
def test_reset_reorder_and_half_types(kind):
    options, function, given = kinds(4, torch.float32)[kind]
    tensors = cases.inputs(Shape(10, head_dim=8), torch.bfloat16)
    state = LinearState(batch_size=2, num_heads_kv=4, head_dim=8, dtype=torch.bfloat16,
                        device=DEVICE, **options)  # fmt: skip
    state.reorder([1, 0])
    first = [x[:, :, :6] for x in tensors]
    with torch.inference_mode():
        rows = state.attend(*first)
    assert rows.dtype == torch.bfloat16
    order = torch.tensor([1, 1, 0])
    state.reorder(order)
    assert state.batch_size == 3
    chosen = [x[order.to(DEVICE)] for x in tensors]
    rows = state.attend(*(x[:, :, 6:] for x in chosen))
    expected = function(*chosen, is_causal=True, **given)[:, :, 6:]
    torch.testing.assert_close(rows, expected)
    state.reset()
    assert (state.length, state.batch_size) == (0, 2)
    torch.testing.assert_close(state.attend(*first), function(*first, is_causal=True, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_differentiable(kind):
    options, function, given = kinds(4, torch.float64)[kind]
    tensors = cases.inputs(Shape(9, head_dim=8), torch.float64)
    state = LinearState(batch_size=2, num_heads_kv=4, head_dim=8, dtype=torch.float64,
                        device=DEVICE, **options)  # fmt: skip
    state.attend(*(x[:, :, :5] for x in tensors))
    last = [x[:, :, 5:].clone().requires_grad_() for x in tensors]
    rows = state.attend(*last)
    whole = [torch.cat([x[:, :, :5], y], 2) for x, y in zip(tensors, last, strict=True)]
    expected = function(*whole, is_causal=True, **given)[:, :, 5:]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), last) for x in (rows, expected)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "exception", "words"),
    [
        ({"batch_size": 0}, ValueError, ["batch_size", "0"]),
        ({"head_dim": 2.0}, TypeError, ["head_dim", "2.0"]),
        ({"dtype": torch.int64}, TypeError, ["dtype", "int64"]),
        ({"scale": 1.0}, ValueError, ["scale", "1.0"]),
        ({"feature_map": 1}, TypeError, ["feature_map", "1"]),
        ({"projection": torch.zeros(3, 9)}, ValueError, ["projection", "(3, 9)"]),
        ({"projection": torch.zeros(3, 5, 8)}, ValueError, ["projection", "3"]),
        ({"projection": 5}, TypeError, ["projection", "int"]),
        ({"projection": torch.ones(3, 8), "feature_map": torch.exp}, ValueError, ["feature_map"]),
    ],
)
def test_wrong_options_of_a_state(options, exception, words):
    given = {"batch_size": 2, "num_heads_kv": 4, "head_dim": 8} | options
    with pytest.raises(exception, match="sparse_attn: expected") as caught:
        LinearState(**given)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("change", "exception", "word"),
    [
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "query"),
        (lambda q, k, v: (q, k[:1], v), ValueError, "key"),
        (lambda q, k, v: (q, k, v[..., :2]), ValueError, "value"),
        (lambda q, k, v: (q.double(), k, v), TypeError, "query"),
        (lambda q, k, v: (q, None, v), TypeError, "key"),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), ValueError, "query"),
    ],
)
def test_wrong_tokens(change, exception, word):
    state = LinearState(batch_size=2, num_heads_kv=4, head_dim=8, device=DEVICE)
    with pytest.raises(exception, match=f"sparse_attn: expected {word}"):
        state.attend(*change(*cases.inputs(Shape(3, head_dim=8))))
    assert state.length == 0
    with pytest.raises(ValueError, match="index"):
        state.reorder([2])
    with pytest.raises(TypeError, match="index"):
        state.reorder([0.5])
