"""Attention to keys of lower rank and to mixtures of keys, against its definitions."""

import math

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, Shape, inputs
from composed import (
    assert_as_good_as_torch,
    assert_as_good_on_average,
    dense,
    linformer_definition,
    low_rank_definition,
    of_rank,
    same_bits_for_any_threads,
    tucker_definition,
)
from torch.autograd import gradcheck

import sparse_attn
from sparse_attn import LinformerSelfAttention, LowRankSelfAttention
from sparse_attn.functional import (
    attention,
    linformer_attention,
    low_rank_attention,
    tucker_attention,
)

SHAPES = [
    Shape(n_q=33, n_k=70, head_dim=16, value_dim=9),
    Shape(n_q=70, n_k=33, head_dim=40, heads=3),
    Shape(n_q=7, n_k=1100, head_dim=24, batch=1, heads=2),
    Shape(n_q=12, n_k=9, head_dim=32, value_dim=5, heads=2),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestDefinitions:
    def check(self, ours, definition, shape, dtype, padded, extra=(), draws=1):
        padding = cases.padding(shape.batch, shape.n_k) if padded else None
        functions = (
            lambda *x: ours(*x, key_padding_mask=padding),
            lambda *x: definition(*x, padding=padding),
        )
        if draws > 1:
            tensors = [self.tensors(shape, dtype, seed) for seed in range(draws)]
            assert_as_good_on_average(*functions, tensors)
        else:
            assert_as_good_as_torch(*functions, [*self.tensors(shape, dtype), *extra])

    def tensors(self, shape, dtype, seed=0):
        query, key, value = inputs(shape, dtype, seed=seed)
        # Singular values that lie apart: their distances condition the problem.
        key = key * torch.linspace(0.5, 2, key.shape[1]).to(key)[:, None, None]
        return [query, key * torch.linspace(0.5, 2, key.shape[3]).to(key), value]

    def test_low_rank(self, shape, dtype, padded):
        self.check(
            lambda *x, **k: low_rank_attention(*x, 5, **k),
            lambda *x, **k: low_rank_definition(*x, rank=5, **k),
            shape,
            dtype,
            padded,
        )

    @pytest.mark.parametrize("iterations", [0, 2])
    def test_tucker(self, shape, dtype, padded, iterations):
        ranks = (1, 1, 1) if padded else (2, 6, 5)
        self.check(
            lambda *x, **k: tucker_attention(*x, ranks, iterations=iterations, **k),
            lambda *x, **k: tucker_definition(*x, ranks=ranks, iterations=iterations, **k),
            shape,
            dtype,
            padded,
            draws=8 if dtype == torch.bfloat16 else 1,  # which its gradient magnifies the most
        )

    def test_linformer(self, shape, dtype, padded):
        def drawn(*size, seed):
            return cases.normal(*size, seed=seed, dtype=dtype) / math.sqrt(shape.n_k)

        shared = drawn(shape.n_k + 3, 17, seed=5)
        of_heads = drawn(shape.heads, shape.n_k, 17, seed=6)
        for extra in ([shared], [shared, of_heads], [of_heads]):
            self.check(linformer_attention, linformer_definition, shape, dtype, padded, extra)


FUNCTIONS = {
    "low_rank": lambda *x, **k: low_rank_attention(*x, 3, **k),
    "tucker": lambda *x, **k: tucker_attention(*x, (1, 4, 3), **k),
    "tucker_fitted": lambda *x, **k: tucker_attention(*x, (1, 2, 2), iterations=1, **k),
    "linformer": lambda *x, **k: linformer_attention(*x, projection(x[1]), **k),
}


NUMBERS = {dtype: cases.normal(2500, 4, seed=9, dtype=dtype) / 8 for dtype in DTYPES}


def projection(key):
    return NUMBERS[key.dtype]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_k", [3, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, n_k, padded):
    """Fewer keys than features, and padding, repeat the eigenvalue 0."""
    padding = torch.zeros(2, n_k, dtype=torch.bool, device=DEVICE)
    padding[0, 1:3], padding[1, 2:] = padded, padded
    shape = Shape(2, n_k, head_dim=5, value_dim=2, heads=2)
    leaves = [x.requires_grad_() for x in inputs(shape, torch.float64)]
    fast = name.startswith("tucker")  # a second for each pass
    assert gradcheck(
        lambda *x: FUNCTIONS[name](*x, key_padding_mask=padding), leaves, fast_mode=fast
    )


def test_gradcheck_of_projections():
    leaves = [*inputs(Shape(4, 7, 3, heads=2), torch.float64)]
    leaves += [projection(leaves[1])[:14].view(2, 7, 4), projection(leaves[1])[20:28]]
    leaves = [x.requires_grad_() for x in leaves]
    assert gradcheck(linformer_attention, leaves)
    assert gradcheck(lambda q, k, v, *p: linformer_attention(q, k, v, *p[::-1]), leaves)


@pytest.mark.parametrize("kept", [True, False])
def test_repeated_singular_values_have_finite_gradients(kept):
    """Orthogonal keys have one singular value many times, on one side of the rank."""
    basis = torch.linalg.qr(cases.normal(20, 8, seed=2))[0]
    sizes = torch.tensor([3.0] * 4 + [2, 1, 0.5, 0.2] if kept else [3, 2.5, 2, 1.5] + [1.0] * 4)
    key = (basis * sizes.to(basis)).expand(1, 1, 20, 8).contiguous().requires_grad_()
    query, _, value = inputs(Shape(5, 20, 8, batch=1, heads=1), torch.float64)
    assert gradcheck(lambda key: low_rank_attention(query, key, value, 4), [key])


def test_repeated_across_the_rank_is_finite():
    key = torch.eye(8, dtype=torch.float64, device=DEVICE)[None, None].repeat(1, 1, 3, 1)
    query, _, value = inputs(Shape(5, 24, 8, batch=1, heads=1), torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = low_rank_attention(*leaves, 4)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (output, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_controls_the_error(dtype):
    """No logit is further off than the next singular value allows, and full rank is exact."""
    query, key, value = inputs(Shape(40, 200, 16, heads=2), dtype)
    key = key * torch.logspace(0, -3, 16).to(key)
    exact, largest = attention(query, key, value, sparse_attn.Full()), query.norm(dim=-1).max()
    sizes = torch.linalg.svdvals(key.double())
    errors = []
    for rank in range(1, 17):
        output = low_rank_attention(query, key, value, rank)
        errors.append((output - exact).abs().max().item())
        dropped = sizes[..., rank].max().item() if rank < 16 else 0.0
        # |softmax(a) − softmax(b)|₁ ≤ 2 max |a − b|
        bound = 2 * value.abs().max() * largest * dropped / 4
        assert errors[-1] <= bound + 1e-5
    assert torch.equal(low_rank_attention(query, key, value, 16), exact)
    assert errors[0] > 10 * errors[8] > 0


def test_ill_conditioned_keys_in_float32():
    """The products of the keys are summed in float64: their squares would drown small values."""
    query, key, value = inputs(Shape(20, 300, 12, batch=1, heads=1))
    key = key * torch.logspace(0, -5, 12).to(key)
    definition = dense(query.double(), of_rank(key.double(), 9), value.double())
    ours = low_rank_attention(query, 1e4 * key, value, 9, scale=1e-4 / math.sqrt(12))
    assert (ours - definition).abs().max() < 1e-6


@pytest.mark.parametrize("ranks", [(4, 64, 16), (9, 999, 99)])
def test_full_ranks_are_dense(ranks):
    tensors = inputs(Shape(30, 70, 16))
    full = attention(*tensors, sparse_attn.Full())
    assert torch.equal(tucker_attention(*tensors, ranks), full)
    assert torch.equal(low_rank_attention(*tensors, ranks[2]), full)
    assert torch.equal(
        low_rank_attention(tensors[0], *(x[:, :, :5] for x in tensors[1:]), 5),
        attention(tensors[0], *(x[:, :, :5] for x in tensors[1:]), sparse_attn.Full()),
    )
    identity = torch.eye(80, device=DEVICE)[:, :70]
    torch.testing.assert_close(linformer_attention(*tensors, identity), full)


@pytest.mark.parametrize("name", FUNCTIONS)
class TestProperties:
    def test_what_padding_holds(self, name):
        shape = Shape(20, 40, 8)
        padding = cases.padding(2, 40)
        padding[1] = True
        results = []
        for junk in (0.0, math.nan, math.inf):
            query, key, value = inputs(shape)
            key, value = (
                x.masked_fill(padding[:, None, :, None], junk).requires_grad_()
                for x in (key, value)
            )
            query.requires_grad_()
            output = FUNCTIONS[name](query, key, value, key_padding_mask=padding)
            results.append([output, *torch.autograd.grad(output.sum(), (query, key, value))])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        output, query, *others = results[0]
        assert not output[1].any()
        assert not query[1].any()
        assert not any(x.masked_select(padding[:, None, :, None]).any() for x in others)

    def test_padded_examples_are_as_alone(self, name):
        query, key, value = inputs(Shape(20, 40, 8), torch.float64)
        padding = torch.arange(40, device=DEVICE) >= torch.tensor([[40], [23]], device=DEVICE)
        both = FUNCTIONS[name](query, key, value, key_padding_mask=padding)
        alone = FUNCTIONS[name](query[1:], key[1:, :, :23], value[1:, :, :23])
        torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-12)

    def test_threads(self, name):
        tensors = inputs(Shape(700, 2100, 32, value_dim=24, batch=1, heads=3))
        same_bits_for_any_threads(FUNCTIONS[name], tensors)

    def test_empty(self, name):
        for shape in (Shape(0, 5, 8), Shape(5, 0, 8), Shape(5, 7, 8, batch=0), Shape(5, 7, 8, 0)):
            leaves = [x.requires_grad_() for x in inputs(shape)]
            output = FUNCTIONS[name](*leaves)
            output.sum().backward()
            assert output.shape == (*leaves[0].shape[:3], leaves[2].shape[3])
            assert not output.any()

    def test_options(self, name):
        query, key, value = inputs(Shape(20, 30, 8, kv_heads=2))
        output, lse, weights = FUNCTIONS[name](
            query, key, value, enable_gqa=True, return_lse=True, return_weights=True, scale=0.3
        )
        repeated = (x.repeat_interleave(2, 1) for x in (key, value))
        if not name.startswith("tucker"):  # whose heads are those of the keys
            expected = FUNCTIONS[name](query, *repeated, scale=0.3)
            torch.testing.assert_close(output, expected)
        assert lse.shape == output.shape[:3]
        torch.testing.assert_close(weights.to_dense().sum(-1), torch.ones_like(lse))

    def test_autocast(self, name):
        leaves = [x.requires_grad_() for x in inputs(Shape(20, 30, 8))]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = FUNCTIONS[name](*leaves)
            assert FUNCTIONS[name](*(x.double() for x in leaves)).dtype == torch.float64
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert all(x.grad.dtype == torch.float32 for x in leaves)
        half = FUNCTIONS[name](*(x.detach().bfloat16() for x in leaves))
        assert torch.equal(output, half)

    def test_compiled(self, name):
        if name.startswith("tucker"):
            pytest.skip("the same steps as low_rank, many times over")
        torch._dynamo.reset()
        leaves = [x.requires_grad_() for x in inputs(Shape(20, 30, 8))]
        padding = cases.padding(2, 30)

        def call(*x):
            return FUNCTIONS[name](*x, key_padding_mask=padding)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = [
            [f(*leaves), *torch.autograd.grad(f(*leaves).sum(), leaves)] for f in (call, compiled)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    def test_inference_mode(self, name):
        tensors = inputs(Shape(20, 30, 8))
        with torch.inference_mode():
            output = FUNCTIONS[name](*tensors)
        assert torch.equal(output, FUNCTIONS[name](*tensors))


@pytest.mark.parametrize(
    "layer",
    [
        lambda **k: LinformerSelfAttention(24, 3, seq_len=40, k=5, **k),
        lambda **k: LinformerSelfAttention(24, 3, seq_len=40, k=5, per_head=True, **k),
        lambda **k: LinformerSelfAttention(24, 3, seq_len=40, k=5, share_kv=True, **k),
        lambda **k: LowRankSelfAttention(24, 3, rank=4, **k),
    ],
)
class TestLayers:
    def test_against_the_function(self, layer):
        layer = layer(bias=False, device=DEVICE, dtype=torch.float64).eval()
        x = cases.normal(2, 31, 24)
        padding = cases.padding(2, 31)
        heads = (
            p(x).unflatten(-1, (3, 8)).transpose(1, 2)
            for p in (layer.query, layer.key, layer.value)
        )
        if isinstance(layer, LowRankSelfAttention):
            expected = low_rank_definition(*heads, rank=4, padding=padding)
        else:
            expected = linformer_definition(*heads, layer.proj_k, layer.proj_v, padding)
        expected = layer.output(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, padding), expected)

    def test_training(self, layer):
        layer = layer(dropout=0.5, device=DEVICE)
        x = cases.normal(2, 31, 24, dtype=torch.float32)
        assert not torch.equal(layer(x), layer(x))
        layer(x).square().sum().backward()
        assert all(
            p.grad.isfinite().all() and p.grad.any()
            for p in layer.parameters()
            if p is not layer.key.bias
        )
        assert torch.equal(layer.eval()(x), layer(x))
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16

    def test_state(self, layer):
        first, second = (layer(device=DEVICE) for _ in range(2))
        second.load_state_dict(first.state_dict())
        x = cases.normal(1, 12, 24, dtype=torch.float32)
        assert torch.equal(first(x), second(x))

    def test_causal_is_refused(self, layer):
        with pytest.raises(NotImplementedError, match="later ones too"):
            layer(causal=True)


def test_linformer_parameters():
    layer = LinformerSelfAttention(32, 4, seq_len=50, k=16, device=DEVICE)
    assert layer.proj_k.shape == layer.proj_v.shape == (50, 16)
    assert layer.proj_k.abs().max() <= 0.25
    assert layer.proj_k.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.1)
    assert LinformerSelfAttention(32, 4, seq_len=50, k=16, share_kv=True).proj_v is None
    assert LinformerSelfAttention(32, 4, seq_len=50, k=16, per_head=True).proj_k.shape == (
        4,
        50,
        16,
    )
    with pytest.raises(ValueError, match=r"at most 50 tokens \(seq_len\), got 51"):
        layer(torch.randn(1, 51, 32, device=DEVICE))


def test_vmap_of_linformer():
    query, key, value = inputs(Shape(10, 12, 8))
    of_one = torch.func.vmap(lambda *x: linformer_attention(*x, NUMBERS[torch.float32]))
    mapped = of_one(query[:, None], key[:, None], value[:, None])[:, 0]
    torch.testing.assert_close(
        mapped, linformer_attention(query, key, value, NUMBERS[torch.float32])
    )


QKV = inputs(Shape(10, 12, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: low_rank_attention(*QKV, 0), ValueError, "rank to be at least 1, got 0"),
        (lambda: low_rank_attention(*QKV, 1.5), TypeError, "rank to be an int, got 1.5"),
        (lambda: low_rank_attention(*QKV, 2, scale=math.nan), ValueError, "scale to be finite"),
        (lambda: low_rank_attention(*QKV, 2, is_causal=True), TypeError, "got is_causal"),
        (lambda: low_rank_attention(QKV[0], *QKV[:2], 2), ValueError, "expected value of shape"),
        (lambda: tucker_attention(*QKV, 3), TypeError, r"ranks to be \(heads, keys, features\)"),
        (lambda: tucker_attention(*QKV, (3, 4)), ValueError, "3 of them, got 2"),
        (lambda: tucker_attention(*QKV, (3, 4, 0)), ValueError, "ranks to be at least 1, got 0"),
        (lambda: tucker_attention(*QKV, (3, 4, 5), iterations=-1), ValueError, "iterations"),
        (lambda: linformer_attention(*QKV, None), TypeError, "proj_k to be a Tensor"),
        (lambda: linformer_attention(*QKV, NUMBERS[torch.float64]), TypeError, "proj_k of dtype"),
        (
            lambda: linformer_attention(*QKV, NUMBERS[torch.float32][:11]),
            ValueError,
            r"proj_k of shape \(12, k\) or \(4, 12, k\)",
        ),
        (
            lambda: linformer_attention(
                *QKV, NUMBERS[torch.float32], NUMBERS[torch.float32][:, :3]
            ),
            ValueError,
            "proj_v with 4 mixtures",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
