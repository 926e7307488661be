"""Attention through landmarks, against its definition and the code of transformers."""

import math
from itertools import pairwise

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, Shape, inputs
from composed import assert_as_good_as_torch, by_example, dense, same_bits_for_any_threads
from torch.autograd import gradcheck

import sparse_attn
from sparse_attn import NystromSelfAttention
from sparse_attn.functional import attention, nystrom_attention


def segment_means(x, segments):
    """Means of runs of tokens, in order, whose lengths differ by one at most."""
    length = x.shape[2]
    bounds = [s * length // segments for s in range(segments + 1)]
    runs = pairwise(bounds)
    return torch.stack([x[:, :, a:b].mean(2) for a, b in runs if b > a], 2)


def pseudo_inverse(matrix, iterations):
    if iterations is None:
        return torch.linalg.pinv(matrix)
    norm = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    z, one = matrix.mT / norm[..., None, None], torch.eye(matrix.shape[-1]).to(matrix)
    for _ in range(iterations):
        az = matrix @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def definition(*tensors, landmarks, iterations=6, padding=None):
    def one(query, key, value):
        if landmarks >= min(query.shape[2], key.shape[2]):
            return dense(query, key, value)
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = 1 / math.sqrt(query.shape[-1])
        of_queries, of_keys = (segment_means(x.to(wide), landmarks) for x in (query, key))
        middle = (scale * of_queries @ of_keys.mT).softmax(-1)
        last = (scale * of_queries @ key.to(wide).mT).softmax(-1) @ value.to(wide)
        first = (scale * query.to(wide) @ of_keys.mT).softmax(-1)
        return (first @ (pseudo_inverse(middle, iterations) @ last)).to(query.dtype)

    return by_example(one, tensors, padding)


@pytest.mark.parametrize("iterations", [6, 2])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, head_dim=16),
        Shape(33, 70, 16, 9),
        Shape(70, 33, 40, heads=3),
        Shape(20, 1100, 24, batch=1, heads=2),
        Shape(5, 9, 8),
        Shape(9, 5, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_definition(shape, dtype, iterations):
    assert_as_good_as_torch(
        lambda *x: nystrom_attention(*x, 8, iterations=iterations),
        lambda *x: definition(*x, landmarks=8, iterations=iterations),
        inputs(shape, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype):
    tensors = inputs(Shape(50, 90, 16), dtype)
    exact = definition(*(x.double() for x in tensors), landmarks=8)
    output = nystrom_attention(*tensors, 8)
    assert output.dtype == dtype
    # The landmarks, and what is gathered at them, are rounded to half types between the parts.
    assert (output - exact).abs().max() <= 40 * torch.finfo(dtype).eps * exact.abs().max()


def test_padding():
    """As without the padded tokens; with no more of them than landmarks, dense attention."""
    query, key, value = inputs(Shape(40, 57, 16, batch=3), torch.float64)
    padding = torch.arange(57, device=DEVICE) >= torch.tensor([[57], [23], [6]], device=DEVICE)
    padding[1] = padding[1].roll(5)
    output = nystrom_attention(query, key, value, 8, key_padding_mask=padding)
    expected = definition(query, key, value, landmarks=8, padding=padding)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("iterations", [6, None])
def test_what_padding_holds(iterations):
    padding = cases.padding(3, 40)
    padding[1] = True
    results = []
    for junk in (0.0, math.nan, math.inf):
        query, key, value = inputs(Shape(40, head_dim=8, batch=3))
        key, value = (
            x.masked_fill(padding[:, None, :, None], junk).requires_grad_() for x in (key, value)
        )
        query.requires_grad_()
        output = nystrom_attention(
            query, key, value, 8, key_padding_mask=padding, iterations=iterations
        )
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
        results.append([output, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() for x in results[0])
    assert not any(x[1].any() for x in results[0])


def test_padded_queries_of_self_attention():
    """Padded tokens are in no landmark, whatever their queries hold."""
    padding = torch.arange(40, device=DEVICE) >= torch.tensor([[40], [30]], device=DEVICE)
    query, key, value = inputs(Shape(40, head_dim=8), torch.float64)
    expected = nystrom_attention(query, key, value, 8, key_padding_mask=padding)
    alone = definition(*(x[1:, :, :30] for x in (query, key, value)), landmarks=8)
    torch.testing.assert_close(expected[1:, :, :30], alone)
    query = query.masked_fill(padding[:, None, :, None], math.nan)
    output = nystrom_attention(query, key, value, 8, key_padding_mask=padding)
    unpadded = ~padding[:, None, :, None].expand_as(output)
    assert torch.equal(output[unpadded], expected[unpadded])
    given = nystrom_attention(query, key, value, 8, query_padding_mask=padding)
    assert given[1, :, :30].isfinite().all()


@pytest.mark.parametrize("iterations", [3, None])
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(iterations, padded):
    padding = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    padding[0, 1:3], padding[1, 2:] = padded, padded
    leaves = [x.requires_grad_() for x in inputs(Shape(5, 7, 3, 2, heads=2), torch.float64)]
    assert gradcheck(
        lambda *x: nystrom_attention(*x, 3, iterations=iterations, key_padding_mask=padding), leaves
    )


def test_many_landmarks_are_dense():
    for n_q, n_k in ((40, 40), (12, 40), (40, 12)):
        tensors = inputs(Shape(n_q, n_k, 16))
        full = attention(*tensors, sparse_attn.Full())
        assert torch.equal(nystrom_attention(*tensors, min(n_q, n_k)), full)
    # Runs of equal tokens, each of them a segment: the landmarks are the tokens.
    query, key, value = inputs(Shape(12, head_dim=16), torch.float64)
    query, key = (x.repeat_interleave(5, 2) for x in (query, key))
    value = cases.normal(2, 4, 60, 16)
    output = nystrom_attention(query, key, value, 12, iterations=None)
    torch.testing.assert_close(output, attention(query, key, value, sparse_attn.Full()))


def test_the_iteration_of_transformers():
    """Nyströmformer's own, with its starting point for each matrix ("exact")."""
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    from transformers import NystromformerConfig

    from sparse_attn.functional.nystrom import _pseudo_inverse

    theirs = modeling.NystromformerSelfAttention(
        NystromformerConfig(hidden_size=16, num_attention_heads=2, segment_means_seq_len=64)
    )
    theirs.init_option = "exact"
    matrix = cases.normal(2, 2, 8, 8).softmax(-1)
    ours = _pseudo_inverse(matrix, 6)
    torch.testing.assert_close(theirs.iterative_inv(matrix, 6), ours)


def test_the_package():
    """nystrom_attention's module, whose starting point is that of the whole batch: converged, it is
    the same."""
    package = pytest.importorskip("nystrom_attention", reason="an optional peer")
    theirs = package.NystromAttention(
        32, dim_head=8, heads=4, num_landmarks=8, pinv_iterations=30, residual=False
    ).double()
    ours = NystromSelfAttention(32, 4, num_landmarks=8, iterations=30, bias=False).double()
    with torch.no_grad():
        for name, weight in zip(
            ("query", "key", "value"), theirs.to_qkv.weight.chunk(3), strict=True
        ):
            getattr(ours, name).weight.copy_(weight)
        ours.output.weight.copy_(theirs.to_out[0].weight)
    x = cases.normal(2, 64, 32).cpu()
    torch.testing.assert_close(ours(x) + theirs.to_out[0].bias, theirs(x))


def test_threads():
    tensors = inputs(Shape(700, 1500, 32, batch=1, heads=3))
    for iterations in (6, None):
        same_bits_for_any_threads(
            lambda *x, i=iterations: nystrom_attention(*x, 100, iterations=i), tensors
        )


def test_empty_and_options():
    for shape in (Shape(0, 5, 8), Shape(5, 0, 8), Shape(5, 7, 8, batch=0), Shape(5, 7, 8, 0)):
        leaves = [x.requires_grad_() for x in inputs(shape)]
        output = nystrom_attention(*leaves, 2)
        output.sum().backward()
        assert output.shape == (*leaves[0].shape[:3], leaves[2].shape[3])
    query, key, value = inputs(Shape(20, 30, 8, kv_heads=2))
    padding = cases.padding(2, 30)
    output = nystrom_attention(query, key, value, 5, enable_gqa=True, key_padding_mask=padding)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = nystrom_attention(query, *repeated, 5, key_padding_mask=padding)
    torch.testing.assert_close(output, expected)


def test_autocast_and_compiled():
    leaves = [x.requires_grad_() for x in inputs(Shape(20, 30, 8))]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = nystrom_attention(*leaves, 5)
    assert torch.equal(output, nystrom_attention(*(x.bfloat16() for x in leaves), 5))
    torch._dynamo.reset()
    padding = cases.padding(2, 30)

    def call(*x):
        return nystrom_attention(*x, 5, key_padding_mask=padding)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        function(*leaves).sum().backward()
    torch.testing.assert_close(call(*leaves), compiled(*leaves))


def test_layer():
    layer = NystromSelfAttention(24, 3, num_landmarks=5, conv_kernel=7, dropout=0.1, device=DEVICE)
    x = cases.normal(2, 33, 24, dtype=torch.float32)
    padding = torch.arange(33, device=DEVICE) >= torch.tensor([[33], [20]], device=DEVICE)
    layer(x, padding).square().sum().backward()
    assert layer.conv.weight.grad.any()
    layer.eval()
    both = layer(x, padding)
    torch.testing.assert_close(both[1:, :20], layer(x[1:, :20]))
    layer.conv = None
    query, key, value = (
        p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (layer.query, layer.key, layer.value)
    )
    expected = nystrom_attention(query, key, value, 5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.output(expected))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_landmarks": 0}, ValueError, "num_landmarks to be at least 1"),
        ({"iterations": 0}, ValueError, "iterations to be at least 1"),
        ({"return_lse": True}, TypeError, "got return_lse"),
        ({"query_padding_mask": torch.zeros(2, 12)}, TypeError, "query_padding_mask to be a bool"),
        ({"key_padding_mask": torch.zeros(2, 9).bool()}, ValueError, "key_padding_mask of shape"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        nystrom_attention(*inputs(Shape(10, 12, 8)), **{"num_landmarks": 3, **options})
    with pytest.raises(ValueError, match="conv_kernel to be odd, got 4"):
        NystromSelfAttention(24, 3, num_landmarks=5, conv_kernel=4)
