"""`SparseWeights` against the dense softmax, and Hugging Face's layout of them."""

import copy
import math
import pickle
import subprocess
import sys

import cases
import numpy as np
import pytest
import reference
import torch
from cases import DEVICE, PATTERNS, SIZED, Shape
from philox import philox, seed_key
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from sparse_attn import (
    BlockBias,
    Causal,
    Global,
    GlobalKeys,
    PerHead,
    RandomTokens,
    SlotBias,
    SparseWeights,
    Window,
    alibi_slopes,
    attention,
)
from sparse_attn.weights import attention_weights

EXPRESSIONS = PATTERNS | SIZED


def dense_weights(
    query: Tensor,
    key: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    gate: Tensor | float = 1.0,
    softcap: float | None = None,
    bias: Tensor | float = 0.0,
    sink: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The definition in section 6.2, on dense tensors; the sink is one more column."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = gate * scale * (query @ key.mT)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + bias).masked_fill(~allowed, -math.inf)
    if sink is not None:
        column = sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    weights = weights[..., : key.shape[2]]
    return weights if kept is None else weights * kept / (1 - dropout_p)


def allowed_pairs(expression: str, shape: Shape, masks: dict | None = None) -> Tensor:
    query, key, _ = cases.inputs(shape)
    rule = cases.definition(expression, shape)
    masks = masks or {}
    return reference.allowed_pairs(
        rule, query, key, masks.get("key_padding_mask"), masks.get("global_mask")
    ).expand(shape.batch, -1, -1, -1)


def both(expression: str, shape: Shape, dtype=torch.float64, **masks: Tensor):
    """(output, weights) of one call, the inputs, and the dense weights."""
    tensors = cases.inputs(shape, dtype)
    pattern = cases.library(expression, shape)
    gqa = shape.kv_heads is not None
    results = attention(*tensors, pattern, return_weights=True, enable_gqa=gqa, **masks)
    allowed = allowed_pairs(expression, shape, masks)
    query, key = (x.double() for x in tensors[:2])
    return results, tensors, dense_weights(query, key, allowed)


@pytest.mark.parametrize("lengths", [(67, 67), (37, 70), (70, 37), (1, 67)], ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_equals_dense_softmax(name, lengths):
    shape = Shape(*lengths, head_dim=8)
    (output, weights), (_, _, value), expected = both(EXPRESSIONS[name], shape)
    assert weights.shape == expected.shape
    torch.testing.assert_close(weights.to_dense(), expected)
    torch.testing.assert_close(weights @ value, output)
    sums = weights.to_dense().sum(-1)
    assert torch.equal(sums.round(decimals=9), (expected > 0).any(-1).double())


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("masked", ["padding", "global", "both"])
@pytest.mark.parametrize(
    "name", ["window_global", "causal_global", "empty_rows", "per_head_sparse"]
)
def test_masks_and_grouped_queries(name, masked, kv_heads):
    shape, masks = Shape(67, head_dim=8, kv_heads=kv_heads), {}
    if masked != "global":
        masks["key_padding_mask"] = cases.padding(2, 67)
    if masked != "padding" and name != "per_head_sparse":
        masks["global_mask"] = cases.global_tokens(2, 67)
    (output, weights), (_, _, value), expected = both(PATTERNS[name], shape, **masks)
    torch.testing.assert_close(weights.to_dense(), expected)
    torch.testing.assert_close(weights @ value, output)
    assert not weights.values.isnan().any()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dtypes(dtype):
    shape = Shape(67, kv_heads=2)
    (output, weights), (_, _, value), expected = both("Window(16) | Global([0])", shape, dtype)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    product = weights @ value
    assert product.dtype == dtype
    # Of the same half-precision inputs: only the last rounding is in their type.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(product, output, rtol=2 * eps, atol=8 * eps)
    wide = torch.finfo(weights.dtype).eps
    torch.testing.assert_close(weights.to_dense().double(), expected, rtol=64 * wide, atol=wide)


def test_order_of_the_results():
    tensors = cases.inputs(Shape(20))
    output, lse, weights = attention(*tensors, Window(3), return_lse=True, return_weights=True)
    for result, other in zip((output, lse), attention(*tensors, Window(3), return_lse=True),
                             strict=True):  # fmt: skip
        assert torch.equal(result, other)
    assert isinstance(weights, SparseWeights)
    assert isinstance(attention(*tensors, Window(3), return_weights=True), tuple)


TABLES = Shape(19, 23, head_dim=4, batch=2)
WINDOWED = (
    "PerHead([Window(3, 2, 1), Window(3, 2, 2), Window(2, 3, 3) | Global([0]), Window(5, 0)])"
)


def slot_table(table: Tensor, shape: Shape, neutral: float) -> Tensor:
    """(batch, heads, n_q, n_k) from (.., heads, n_q or 1, slots), pair by pair."""
    result = table.new_full((shape.batch, shape.heads, shape.n_q, shape.n_k), neutral)
    windows = [(3, 1), (3, 2), (2, 3), (5, 1)]  # left and dilation of WINDOWED
    table = table.expand(shape.batch, -1, shape.n_q, -1)
    for h, (left, dilation) in enumerate(windows):
        for i in range(shape.n_q):
            for slot in range(table.shape[-1]):
                j = i + shape.n_k - shape.n_q + (slot - left) * dilation
                if 0 <= j < shape.n_k:
                    result[:, h, i, j] = table[:, h, i, slot]
    return result


def distances(shape: Shape) -> Tensor:
    position = torch.arange(shape.n_q, device=DEVICE) + shape.n_k - shape.n_q
    return (position[:, None] - torch.arange(shape.n_k, device=DEVICE)).abs()


def tables(kind: str, neutral: float) -> tuple:
    """What the user gives, its tensor, and the function to the dense table."""
    shape, seed = TABLES, 5
    sizes = {
        "slots": (4, 6),
        "slots_rows": (4, 19, 6),
        "slots_examples": (2, 4, 1, 6),
        "slots_all": (2, 4, 19, 6),
        "dense": (2, 4, 19, 23),
        "dense_shared": (1, 1, 19, 23),
        "blocks": (1, 4, 4, 5),
        "slopes": (4,),
    }
    table = cases.normal(*sizes[kind], seed=seed)
    if kind in ("slots", "slots_rows"):
        grown = {"slots": lambda t: t[None, :, None], "slots_rows": lambda t: t[None]}[kind]
        return table, lambda t: t, lambda t: slot_table(grown(t), shape, neutral)
    if kind.startswith("slots"):
        return table, SlotBias, lambda t: slot_table(t, shape, neutral)
    if kind == "blocks":
        return table, lambda t: BlockBias(t, 5), lambda t: t.repeat_interleave(
            5, 2)[:, :, :19].repeat_interleave(5, 3)[..., :23]  # fmt: skip
    if kind == "slopes":
        return table, lambda t: t, lambda t: -t.view(1, 4, 1, 1) * distances(shape)
    return table, lambda t: t, lambda t: t


KINDS = ["slots", "slots_rows", "slots_examples", "slots_all", "dense", "dense_shared", "blocks"]


@pytest.mark.parametrize(
    ("argument", "kind"),
    [*(("bias", kind) for kind in (*KINDS, "slopes")), *(("gate", kind) for kind in KINDS)],
)
def test_tables(argument, kind):
    """Values and gradients of a bias or a gate of each shape."""
    neutral = float(argument == "gate")
    table, wrap, spread = tables(kind, neutral)
    query, key, _ = cases.inputs(TABLES, torch.float64)
    masks = {"key_padding_mask": cases.padding(2, 23)}
    allowed = allowed_pairs(WINDOWED, TABLES, masks)
    pattern = cases.library(WINDOWED, TABLES)
    cotangent = cases.normal(2, 4, 19, 23, seed=3)
    results = []
    for call in (
        lambda t, q, k: attention_weights(q, k, pattern, **masks, **{argument: wrap(t)}).to_dense(),
        lambda t, q, k: dense_weights(q, k, allowed, **{argument: spread(t)}),
    ):
        leaves = [x.clone().requires_grad_() for x in (table, query, key)]
        weights = call(*leaves)
        results.append((weights, *torch.autograd.grad(weights, leaves, cotangent)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)
    assert results[0][1].abs().max() > 0


def test_alibi_of_half_types():
    query, key, _ = cases.inputs(Shape(40), torch.bfloat16)
    slopes = alibi_slopes(4, device=DEVICE)
    weights = attention_weights(query, key, Causal(), bias=slopes)
    bias = -slopes.view(1, 4, 1, 1) * distances(Shape(40, 40))
    expected = dense_weights(query.double(), key.double(), Causal().mask(40).to(DEVICE), bias=bias)
    torch.testing.assert_close(weights.to_dense().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_of_minus_infinity_excludes():
    """A key of some rows, all keys of one: no NaN in values or gradients."""
    shape = Shape(15, head_dim=4)
    query, key, _ = cases.inputs(shape, torch.float64)
    bias = torch.zeros(1, 1, 15, 15, dtype=torch.float64, device=DEVICE)
    bias[..., 3:6, 4] = bias[..., 7, :] = -math.inf
    leaves = [x.requires_grad_() for x in (query, key, bias)]
    weights = attention_weights(query, key, Window(4), bias=bias)
    allowed = Window(4).mask(15).to(DEVICE) & (bias > -math.inf)
    torch.testing.assert_close(weights.to_dense(), dense_weights(query, key, allowed))
    assert torch.equal(weights.to_dense()[:, :, 7], torch.zeros_like(weights.to_dense()[:, :, 7]))
    gradients = torch.autograd.grad(weights.values.square().sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("name", ["window_global", "empty_rows", "per_head_sparse"])
def test_sink_softcap_and_scale(name, given_lse):
    shape = Shape(31, head_dim=4)
    query, key, value = cases.inputs(shape, torch.float64)
    pattern, allowed = cases.pattern(name), allowed_pairs(PATTERNS[name], shape)
    sink = torch.tensor([0.5, -2.0, 40.0, -math.inf], dtype=torch.float64, device=DEVICE)
    options = {"scale": 1.7, "softcap": 2.5, "sink": sink}
    _, lse = attention(query, key, value, pattern, return_lse=True)
    cotangent = cases.normal(2, 4, 31, 31, seed=3)
    results = []
    for call in (
        lambda q, k, **o: attention_weights(
            q, k, pattern, lse if given_lse else None, **o).to_dense(),
        lambda q, k, **o: dense_weights(q, k, allowed, **o),
    ):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in (query, key, sink)]
        weights = call(*leaves[:2], **(options | {"sink": leaves[2]}))
        results.append((weights, *torch.autograd.grad(weights, leaves, cotangent)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)
    rest = 1 - results[0][0].sum(-1)
    assert (rest[:, 2] > 0.99).all()
    assert rest[:, 3][allowed[:, 3].any(-1)].abs().max() < 1e-12


def test_huge_logits():
    query, key, _ = cases.inputs(Shape(20), torch.float32)
    weights = attention_weights(1e4 * query, key, Window(3))
    assert weights.values.isfinite().all()
    torch.testing.assert_close(weights.to_dense().sum(-1), torch.ones(2, 4, 20, device=DEVICE))


def kept_pairs(seed: int, p: float, shape: Shape) -> Tensor:
    """16 bits for each pair, eight keys to a draw of Philox: csrc/dropout.h."""
    head = np.arange(shape.batch * shape.heads).reshape(shape.batch, shape.heads, 1, 1)
    i, j = np.arange(shape.n_q)[:, None], np.arange(shape.n_k)
    words = philox((j >> 3, i, head, 3), seed_key(seed))
    bits = np.choose((j & 7) >> 1, words) >> (16 * (j & 1)).astype(np.uint64) & np.uint64(0xFFFF)
    return torch.from_numpy(bits.astype(np.int64) >= round(p * 65536)).to(DEVICE)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_dropout(seed, p):
    shape = Shape(33, 41, head_dim=4)
    query, key, value = cases.inputs(shape, torch.float64)
    pattern, allowed = cases.pattern("per_head"), allowed_pairs(PATTERNS["per_head"], shape)
    kept = kept_pairs(seed, p, shape)
    given = torch.tensor(seed, device=DEVICE)
    weights = attention_weights(query, key, pattern, dropout_p=p, dropout_seed=given)
    expected = dense_weights(query, key, allowed) * kept / (1 - p if p < 1 else 1)
    torch.testing.assert_close(weights.to_dense(), expected, rtol=1e-12, atol=1e-12)
    leaves = [x.requires_grad_() for x in (query, key)]
    again = attention_weights(*leaves, pattern, dropout_p=p, dropout_seed=given)
    assert torch.equal(again.values, weights.values)
    gradients = torch.autograd.grad((again @ value).sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)


def test_dropout_without_a_seed_follows_torchs():
    query, key, _ = cases.inputs(Shape(100))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention_weights(query, key, Window(30), dropout_p=0.25).values

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert (draw(1) == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


FUSED = {
    "bias": {"bias": cases.normal(4, 9)},
    "gate": {"gate": cases.normal(2, 1, 40, 40)},
    "alibi": {"bias": alibi_slopes(4, device=DEVICE, dtype=torch.float64)},
    "sink": {"sink": cases.normal(4)},
    "softcap": {"softcap": 0.7, "scale": 2.0},
    "dropout": {"dropout_p": 0.3},
    "all": {
        "bias": BlockBias(cases.normal(1, 4, 8, 8), 5),
        "gate": SlotBias(cases.normal(2, 4, 40, 9)),
        "sink": cases.normal(4, seed=1),
        "softcap": 1.5,
        "dropout_p": 0.2,
        "dropout_seed": torch.tensor(5, device=DEVICE),
        "key_padding_mask": cases.padding(2, 40),
    },
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_output_is_the_weights_times_the_values(name):
    """With every option; dropout draws one seed for both."""
    query, key, value = cases.inputs(Shape(40, head_dim=8), torch.float64)
    pattern = Window(4, 4, 2) | Global([0])
    output, weights = attention(query, key, value, pattern, return_weights=True, **FUSED[name])
    torch.testing.assert_close(weights @ value, output)


SMALL = Shape(6, 7, head_dim=3, value_dim=2, batch=1, kv_heads=2)


@pytest.mark.parametrize("name", ["window", "empty_rows", "per_head", "window_global"])
def test_derivatives(name):
    """Of a function of all that the weights and their products depend on, to second order."""
    query, key, value = (x.requires_grad_() for x in cases.inputs(SMALL, torch.float64))
    slopes = torch.rand(4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    sink = torch.randn(4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    gate = cases.normal(1, 4, 6, 7).requires_grad_()
    pattern = cases.pattern(name)

    def call(query, key, value, slopes, sink, gate):
        weights = attention_weights(
            query, key, pattern, enable_gqa=True, bias=slopes, sink=sink, gate=gate, softcap=3.0
        )
        return weights @ value, weights.values

    given = (query, key, value, slopes, sink, gate)
    assert gradcheck(call, given, check_forward_ad=True)
    assert gradgradcheck(call, given, check_fwd_over_rev=True)


def test_gradient_through_attention():
    """An auxiliary loss on the weights reaches query and key as the dense one does."""
    shape = Shape(40, head_dim=8)
    leaves = [x.requires_grad_() for x in cases.inputs(shape, torch.float64)]
    output, weights = attention(*leaves, Window(5), return_weights=True)
    loss = output.square().sum() + weights.values.square().sum()
    dense = dense_weights(*leaves[:2], Window(5).mask(40).to(DEVICE))
    expected = (dense @ leaves[2]).square().sum() + dense.square().sum()
    torch.testing.assert_close(loss, expected)
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True)
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other)


def test_torch_func():
    query, key, value = cases.inputs(Shape(9, head_dim=3), torch.float64)

    def entropy(query: Tensor) -> Tensor:
        values = attention_weights(query, key, Window(2)).values
        return -(values * values.log()).sum()

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(entropy(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(entropy)(query), expected)
    _, tangent = torch.func.jvp(entropy, (query,), (value,))
    torch.testing.assert_close(tangent, (expected * value).sum())
    many = torch.vmap(entropy)(torch.stack([query, 2 * query]))
    torch.testing.assert_close(many, torch.stack([entropy(query), entropy(2 * query)]))


def test_threads_do_not_matter():
    shape = Shape(300, kv_heads=2)
    before, results = torch.get_num_threads(), []
    bias = cases.normal(4, 33, dtype=torch.float32)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            leaves = [x.requires_grad_() for x in (*cases.inputs(shape), bias.clone())]
            weights = attention_weights(
                *leaves[:2], Window(16), bias=leaves[3], enable_gqa=True, sink=leaves[3][:, 0]
            )
            output = weights @ leaves[2]
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    query, key, value = cases.inputs(Shape(40))
    with torch.autocast(DEVICE.type, low):
        output, weights = attention(query, key, value, Window(5), return_weights=True)
        product = weights @ value.to(low)
    expected = attention_weights(query.to(low), key.to(low), Window(5))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.values, expected.values, rtol=1e-6, atol=1e-7)
    eps = torch.finfo(low).eps
    torch.testing.assert_close(product, output, rtol=2 * eps, atol=8 * eps)


def test_compile_breaks_the_graph_and_goes_on():
    torch._dynamo.reset()
    query, key, value = cases.inputs(Shape(30))

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, weights = attention(query * 2, key, value, Window(5), return_weights=True)
        return output + (weights @ value).sin()

    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), call(query, key, value))
    torch._dynamo.reset()


def test_compile_in_one_graph():
    """Where torch is told that sizes may depend on data."""
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(30))]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seed = torch.tensor(3, device=DEVICE)
        weights = attention_weights(query, key, Window(5), dropout_p=0.5, dropout_seed=seed)
        return weights.matmul(value).sin() + weights.to_dense().sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    expected = call(*leaves)
    torch.testing.assert_close(result, expected)
    pairs = zip(*(torch.autograd.grad(x.sum(), leaves) for x in (result, expected)), strict=True)
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other)
    torch._dynamo.reset()


def some_weights(pattern: str = "Window(4) | Global([0])", n: int = 30) -> SparseWeights:
    query, key, _ = cases.inputs(Shape(n), torch.float64)
    return attention_weights(query, key, cases.library(pattern))


def test_csr_of_like_heads_is_a_batch():
    weights = some_weights()
    sparse = weights.to_csr()
    assert sparse.layout == torch.sparse_csr
    assert sparse.shape == (2, 4, 30, 30)
    assert torch.equal(sparse.to_dense(), weights.to_dense())


def test_csr_of_unlike_heads_is_a_matrix():
    weights = some_weights(PATTERNS["per_head"])
    sparse = weights.to_csr()
    assert sparse.shape == (2 * 4 * 30, 30)
    assert torch.equal(sparse.to_dense(), weights.to_dense().view(-1, 30))


def test_csr_is_differentiable():
    query, key, _ = cases.inputs(Shape(10), torch.float64)
    query.requires_grad_()
    weights = attention_weights(query, key, cases.pattern("per_head"))
    vector = cases.normal(10, 1)
    (ours,) = torch.autograd.grad((weights.to_csr() @ vector).square().sum(), query)
    weights = attention_weights(query, key, cases.pattern("per_head"))
    (expected,) = torch.autograd.grad((weights.to_dense() @ vector).square().sum(), query)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_products(kv_heads):
    weights, dense = (
        some_weights(PATTERNS["per_head"]),
        some_weights(PATTERNS["per_head"]).to_dense(),
    )
    value, rows = cases.normal(2, kv_heads, 30, 5), cases.normal(2, 4, 30, 5)
    repeated = value.repeat_interleave(4 // kv_heads, 1)
    torch.testing.assert_close(weights @ value, dense @ repeated)
    torch.testing.assert_close(weights.transposed_matmul(rows), dense.mT @ rows)


def test_copies():
    weights = some_weights().to(DEVICE)
    others = [copy.copy(weights), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))]
    for other in others:
        assert torch.equal(other.to_dense(), weights.to_dense())
        assert torch.equal(other.to_longformer(), weights.to_longformer())
        assert repr(other) == repr(weights)


def test_repr_dtype_device():
    weights = some_weights()
    assert "(2, 4, 30, 30)" in repr(weights)
    assert "Window(4) | Global([0])" in repr(weights)
    assert weights.dtype == torch.float64
    assert weights.device.type == DEVICE.type
    assert weights.detach().values.requires_grad is False


@pytest.mark.parametrize("n", [30, 1500])
def test_plot(n):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    weights = some_weights("Window(4) | GlobalKeys([0])", n)
    axes = weights.plot(1, 2)
    (image,) = axes.get_images()
    picture = torch.from_numpy(np.asarray(image.get_array()).astype(float))
    dense = weights.to_dense()[1, 2].cpu()
    if n == 30:
        assert torch.equal(picture, dense)
    else:
        assert picture.shape == (512, 512)
        assert picture.max() == dense.max()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    given = pyplot.figure().subplots()
    assert weights.plot(ax=given) is given
    pyplot.close("all")
    with pytest.raises(IndexError, match="head"):
        weights.plot(0, 4)


# ---- Hugging Face's layout ---------------------------------------------------------------------


def layout_by_hand(
    dense: Tensor, side: int, tokens: list[list[int]], zero: Tensor, dilation: int = 1
) -> Tensor:
    """(batch, heads, n_q, G + 2 · side + 1) out of dense weights, key by key."""
    batch, heads, n_q, n_k = dense.shape
    most = max(map(len, tokens))
    result = dense.new_zeros(batch, heads, n_q, most + 2 * side + 1)
    for b in range(batch):
        for i in range(n_q):
            if zero[b, i]:
                continue
            for rank, token in enumerate(tokens[b]):
                result[b, :, i, rank] = dense[b, :, i, token]
            for slot in range(2 * side + 1):
                j = i + n_k - n_q + (slot - side) * dilation
                if 0 <= j < n_k and j not in tokens[b]:
                    result[b, :, i, most + slot] = dense[b, :, i, j]
    return result


@pytest.mark.parametrize("lengths", [(21, 21), (9, 21), (21, 9)], ids=str)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize(("left", "right"), [(4, 4), (4, 0), (1, 3)], ids=str)
def test_longformer_layout(left, right, dilation, lengths):
    n_q, n_k = lengths
    shape = Shape(*lengths, head_dim=4)
    globals_ = torch.zeros(2, n_k, dtype=torch.bool, device=DEVICE)
    globals_[0, [2, 5]] = globals_[1, 8] = True
    padding = cases.padding(2, n_k)
    padding[1, :9] = False
    query, key, _ = cases.inputs(shape, torch.float64)
    pattern = Window(left, right, dilation) | GlobalKeys([1])
    weights = attention_weights(query, key, pattern, global_mask=globals_, key_padding_mask=padding)
    tokens = [
        [t for t in range(n_k) if (globals_[b, t] or t == 1) and not padding[b, t]]
        for b in range(2)
    ]
    position = torch.arange(n_q, device=DEVICE) + n_k - n_q
    zero = (globals_ | padding)[:, position.clamp(min=0)] & (position >= 0)
    expected = layout_by_hand(weights.to_dense(), max(left, right), tokens, zero, dilation)
    assert torch.equal(weights.to_longformer(), expected)


def test_longformer_layout_per_head():
    pattern = PerHead([Window(4), Window(4, dilation=2), Window(2), Window(2, dilation=3)])
    query, key, _ = cases.inputs(Shape(25, head_dim=4), torch.float64)
    weights = attention_weights(query, key, pattern)
    dense, layout = weights.to_dense(), weights.to_longformer()
    nothing = torch.zeros(2, 25, dtype=torch.bool)
    for head, dilation in enumerate((1, 2, 1, 3)):
        one = layout_by_hand(dense[:, head : head + 1], 4, [[], []], nothing, dilation)
        assert torch.equal(layout[:, head : head + 1], one)


@pytest.mark.parametrize(
    "pattern",
    [Window(4) | RandomTokens(0.3), Causal(), Window(2) | Window(9), Global([0])],
    ids=repr,
)
def test_patterns_that_have_no_longformer_layout(pattern):
    query, key, _ = cases.inputs(Shape(25))
    with pytest.raises(ValueError, match="to_longformer"):
        attention_weights(query, key, pattern).to_longformer()


def test_longformer_layout_is_differentiable():
    query, key, _ = cases.inputs(Shape(7, head_dim=2, batch=1, heads=1), torch.float64)
    pattern = Window(2) | Global([3])
    call = lambda q, k: attention_weights(q, k, pattern).to_longformer()  # noqa: E731
    assert gradcheck(call, (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [
        ([32, 32, 32], [[], [], []]),
        ([32, 20, 7], [[0], [0, 5, 19], []]),
        ([32, 20, 7], [[3, 4, 5, 6, 31], [0, 25], [6]]),  # 25 is padding: masked wins
    ],
)
def test_longformer_layout_equals_hugging_face(lengths, tokens):
    longformer = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer", reason="compares with transformers"
    )
    embed, heads, window, n = 32, 4, 8, 32
    config = longformer.LongformerConfig(
        hidden_size=embed,
        num_attention_heads=heads,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    theirs = longformer.LongformerSelfAttention(config, layer_id=0).eval().to(DEVICE)
    x = cases.normal(3, n, embed, dtype=torch.float32)
    token = torch.arange(n, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    is_global = torch.zeros(3, n, dtype=torch.bool, device=DEVICE)
    for row, chosen in zip(is_global, tokens, strict=True):
        row[chosen] = True
    is_global &= token
    numbers = torch.zeros(3, n, device=DEVICE)
    numbers[~token], numbers[is_global] = (
        torch.finfo(torch.float32).min,
        torch.finfo(torch.float32).max,
    )
    with torch.no_grad():
        expected = theirs(
            x,
            attention_mask=numbers,
            is_index_masked=~token,
            is_index_global_attn=is_global,
            is_global_attn=bool(is_global.any()),
            output_attentions=True,
        )[1].transpose(1, 2)
        query, key = (
            f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (theirs.query, theirs.key)
        )
        weights = attention_weights(
            query,
            key,
            Window.from_longformer(window),
            key_padding_mask=~token,
            global_mask=is_global,
        )
    layout = weights.to_longformer()
    assert layout.shape == expected.shape
    torch.testing.assert_close(layout, expected, rtol=1e-5, atol=1e-6)


# ---- errors and memory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda w: w @ cases.normal(2, 4, 29, 5), ValueError, ["value", "29"]),
        (lambda w: w @ cases.normal(2, 3, 30, 5), ValueError, ["value", "3"]),
        (lambda w: w @ cases.normal(4, 30, 5), ValueError, ["value", "(4, 30, 5)"]),
        (lambda w: w @ cases.normal(2, 4, 30, 5).float(), TypeError, ["value", "float32"]),
        (lambda w: w @ 3, TypeError, ["@"]),
        (lambda w: w.matmul(3), TypeError, ["value", "int"]),
        (lambda w: w.transposed_matmul(cases.normal(2, 2, 30, 5)), ValueError, ["rows"]),
        (lambda w: w.transposed_matmul(3), TypeError, ["rows", "int"]),
    ],
)
def test_wrong_factors(call, exception, words):
    with pytest.raises(exception) as caught:
        call(some_weights())
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "exception", "words"),
    [
        ({"bias": (4, 6)}, ValueError, ["bias", "slots", "6"]),
        ({"gate": (3, 9)}, ValueError, ["gate", "4", "3"]),
        ({"bias": (2, 4, 30, 29)}, ValueError, ["bias", "29"]),
        ({"bias": (3, 4, 30, 30)}, ValueError, ["bias", "3"]),
        ({"bias": (5,)}, ValueError, ["bias", "5"]),
        ({"gate": (4,)}, ValueError, ["gate", "(4,)"]),
    ],
)
def test_wrong_tables(options, exception, words):
    query, key, _ = cases.inputs(Shape(30))
    options = {name: cases.normal(*size) for name, size in options.items()}
    with pytest.raises(exception) as caught:
        attention_weights(query, key, Window(4), **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["batch", "n_q", "n_k"])
def test_empty(name):
    shape = Shape(**({"n_q": 5, "n_k": 6, "batch": 2} | {name: 0}))
    query, key, value = cases.inputs(shape)
    output, weights = attention(query, key, value, Window(2), return_weights=True)
    assert weights.to_dense().shape == (shape.batch, 4, shape.n_q, shape.n_k)
    assert torch.equal(weights @ value, output)
    assert weights.to_longformer().shape == (shape.batch, 4, shape.n_q, 5)


# Peak resident memory of making weights and their gradients in a fresh process.
PROBE = """
import sys, torch
sys.path.insert(0, {tests!r})
import cases
from sparse_attn import Global, Window, attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    leaves = [x.requires_grad_() for x in cases.inputs(
        cases.Shape(n_q=n, head_dim=16, batch=1, heads=1))]
    before = peak()
    output, weights = attention(*leaves, Window(16) | Global([0]), return_weights=True)
    (weights @ leaves[2]).square().sum().backward()
    weights.detach().to_longformer()
    return peak() - before

step(256)
print(step({n}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
def test_memory_is_linear():
    n = 32768
    program = PROBE.format(tests=sys.path[0], n=n)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # 35 pairs a query; a dense matrix of float32 would be 4 GiB.
    assert int(result.stdout) <= 35 * n * 400


@pytest.mark.parametrize("sink", [-math.inf, -1e3, 0.0, 1e3, math.inf])
def test_extreme_sinks(sink):
    query, key, value = cases.inputs(Shape(n_q=20, head_dim=8), torch.float64)
    sinks = torch.full((4,), sink, dtype=torch.float64, device=DEVICE, requires_grad=True)
    output, weights = attention(query, key, value, Window(3), sink=sinks, return_weights=True)
    torch.testing.assert_close(weights @ value, output)
    (gradient,) = torch.autograd.grad((weights @ value).sum(), sinks)
    assert gradient.isfinite().all()
