"""What all layers between projections of one input have in common."""

import math

import pytest
import torch
from cases import DEVICE
from torch import nn

import sparse_attn

EMBED, HEADS, LENGTH = 32, 4, 37

LAYERS = {
    "dynamic": ("DynamicSparseSelfAttention", {"keep": 2, "block": 8}),
    "learned": ("LearnedSparseSelfAttention", {"pattern": sparse_attn.Window(4)}),
    "linear": ("LinearSelfAttention", {}),
    "linformer": ("LinformerSelfAttention", {"seq_len": 64, "k": 8}),
    "low_rank": ("LowRankSelfAttention", {"rank": 3}),
    "nystrom": ("NystromSelfAttention", {"num_landmarks": 5, "conv_kernel": 5}),
    "performer": ("PerformerSelfAttention", {}),
    "reformer": ("ReformerSelfAttention", {"num_buckets": 8, "chunk_length": 8}),
    "routing": ("RoutingSelfAttention", {"num_clusters": 3, "window": 8}),
    "threshold": ("ThresholdSelfAttention", {"threshold": 0.05}),
    "topk": ("TopKSelfAttention", {"k": 5}),
}
ALL = pytest.mark.parametrize("name", LAYERS)
# The sizes of what threshold_attention chooses are in the data.
WITHOUT_DATA = pytest.mark.parametrize("name", sorted(set(LAYERS) - {"threshold"}))


def make(name, **options):
    torch.manual_seed(0)
    kind, own = LAYERS[name]
    return getattr(sparse_attn, kind)(EMBED, HEADS, **{"device": DEVICE, **own, **options})


def example():
    x = torch.randn(2, LENGTH, EMBED, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[0, 30:] = True
    return x, mask


@ALL
@pytest.mark.parametrize("held", [math.nan, math.inf, 1e38])
def test_padded_tokens_hold_anything(name, held):
    x, mask = example()

    def results(filler):
        layer = make(name)
        inputs = x.masked_fill(mask[..., None], filler).requires_grad_()
        output = layer(inputs, mask)[~mask]
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        return {"output": output, "x": inputs.grad, **gradients}

    for part, expected in (want := results(0.0)).items():
        assert expected.isfinite().all(), part
    for part, got in results(held).items():
        torch.testing.assert_close(got, want[part], msg=lambda text, part=part: f"{part}: {text}")


@ALL
def test_finite_padding_leaves_outputs_alone(name):
    x, mask = example()
    layer = make(name).eval()
    parts = (getattr(layer, part)(x) for part in layer.projections)
    heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
    expected = layer.output(layer.attend(*heads, mask).transpose(1, 2).flatten(2))
    assert torch.equal(layer(x, mask), expected)


@ALL
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "expected x to be a floating-point Tensor, got list"),
        (None, TypeError, "expected x to be a floating-point Tensor, got NoneType"),
        (torch.zeros(2, 3, EMBED, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(2, 3, EMBED, dtype=torch.float64), TypeError, "x of dtype torch.float32"),
        (torch.zeros(2, 3, EMBED + 1), ValueError, "expected x of shape"),
        (torch.zeros(3, EMBED), ValueError, "expected x of shape"),
    ],
)
def test_wrong_inputs_raise(name, x, error, message):
    x = x.to(DEVICE) if isinstance(x, torch.Tensor) else x
    with pytest.raises(error, match=f"^sparse_attn: .*{message}"):
        make(name)(x)


@ALL
def test_wrong_masks_raise(name):
    x, mask = example()
    layer = make(name)
    for wrong, error in ((mask.float(), TypeError), (mask[:, 1:], ValueError), (3, TypeError)):
        with pytest.raises(error, match=r"^sparse_attn: expected key_padding_mask"):
            layer(x, wrong)


@ALL
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("dropout", "a", TypeError),
        ("dropout", True, TypeError),
        ("dropout", math.nan, ValueError),
        ("dropout", -0.1, ValueError),
        ("bias", "no", TypeError),
        ("dtype", torch.int32, TypeError),
    ],
)
def test_wrong_options_raise(name, option, value, error):
    with pytest.raises(error, match=f"^sparse_attn: expected {option}"):
        make(name, **{option: value})


def test_causal_is_a_bool():
    with pytest.raises(
        TypeError, match=r"^sparse_attn: expected causal to be True or False, got 1"
    ):
        make("linear", causal=1)


@pytest.mark.parametrize("length", [0, 1, LENGTH])
@ALL
def test_any_length(name, length):
    x = torch.randn(2, length, EMBED, device=DEVICE, requires_grad=True)
    make(name)(x).sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.isfinite().all()


@WITHOUT_DATA
def test_meta_tensors(name):
    layer = make(name).eval().to("meta")
    x = torch.empty(2, LENGTH, EMBED, device="meta")
    assert layer(x).shape == x.shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@WITHOUT_DATA
def test_vmap(name):
    layer = make(name).eval()
    x = torch.randn(3, 2, LENGTH, EMBED, device=DEVICE)
    expected = torch.stack([layer(each) for each in x])
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)


def test_projections_may_take_other_dtypes_than_their_weights():
    class Widening(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    layer = make("topk")
    for part in layer.projections:
        setattr(layer, part, Widening(EMBED, EMBED, device=DEVICE))
    x, mask = example()
    assert layer(x.double(), mask).shape == x.shape
