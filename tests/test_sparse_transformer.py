"""`SparseSelfAttention` and `SparseTransformerBlock` against dense torch code in float64."""

import copy
import math
from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from torch import Tensor, nn

from sparse_attn import (
    Causal,
    Fixed,
    Global,
    Pattern,
    PerHead,
    SparseSelfAttention,
    SparseTransformerBlock,
    Strided,
    Window,
)

EMBED, HEADS = 32, 4
STRIDED = Strided(6)
PATTERNS = [Window(4), STRIDED, Fixed(6, 2), PerHead(STRIDED.factors), Window(3) | Global([0])]
MATRICES = ("attention.query", "attention.key", "attention.value", "attention.output", "linear1",
            "linear2")  # fmt: skip


def stream(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return cases.normal(batch, n, EMBED, seed=seed, dtype=dtype)


def padding(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]


def make(kind: type[nn.Module], *, pattern: Pattern = STRIDED, seed: int = 0, **options):
    torch.manual_seed(seed)
    return kind(EMBED, HEADS, pattern=pattern, device=DEVICE, dtype=torch.float64, **options)


def roughen(block: SparseTransformerBlock) -> SparseTransformerBlock:
    """Larger weights, biases and norms, so that no part hides behind the residual stream."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


def dense_attention(
    layer: SparseSelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The definition, for queries that each see a key."""
    allowed = layer.pattern.mask(query.shape[1], key.shape[1], heads=HEADS).to(DEVICE)
    if mask is not None:
        allowed = allowed & ~mask[:, None, None, :]
    q, k, v = (
        projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for projection, x in ((layer.query, query), (layer.key, key), (layer.value, value))
    )
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return layer.output(heads.transpose(1, 2).flatten(2))


def dense_block(block: SparseTransformerBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Section 5.2: H + a(H) + b(H)."""
    normed = block.norm1(x)
    a = dense_attention(block.attention, normed, normed, normed, mask)
    hidden = block.linear1(block.norm2(x + a))
    b = block.linear2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    return x + a + b


def assert_same(calls: list[Callable[[Tensor], Tensor]], module: nn.Module, x: Tensor) -> None:
    """The calls agree in the output and in the gradients of x and of all parameters."""
    results = []
    for call in calls:
        leaf = x.clone().requires_grad_()
        output = call(leaf)
        wanted = [leaf, *module.parameters()]
        results.append((output, *torch.autograd.grad(output, wanted, stream(*x.shape[:2], seed=1))))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_dense_definition(pattern, masked, causal):
    layer = make(SparseSelfAttention, pattern=pattern, causal=causal)
    mask = padding([23, 19, 17], 23) if masked else None
    calls = [
        lambda x: layer(x, key_padding_mask=mask),
        lambda x: dense_attention(layer, x, x, x, mask),
    ]
    # Rows of padding may see no key, where the dense definition gives NaN.
    visible = 17 if masked else 23
    calls = [
        lambda x, call=call: F.pad(call(x)[:, :visible], (0, 0, 0, 23 - visible)) for call in calls
    ]
    assert_same(calls, layer, stream(3, 23))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_block_equals_the_dense_definition(pattern, masked):
    block = roughen(make(SparseTransformerBlock, pattern=pattern, num_layers=3, mlp_ratio=2.5))
    mask = padding([23, 22, 20], 23) if masked else None
    assert_same(
        [lambda x: block(x, mask), lambda x: dense_block(block, x, mask)], block, stream(3, 23)
    )


def test_attention_from_one_sequence_to_another():
    layer = make(SparseSelfAttention, pattern=Window(6))
    query, key, value = stream(2, 9), stream(2, 14, seed=1), stream(2, 14, seed=2)
    mask = padding([14, 12], 14)
    expected = dense_attention(layer, query, key, value, mask)
    torch.testing.assert_close(layer(query, key, value, key_padding_mask=mask), expected)
    torch.testing.assert_close(layer(query, key, value, mask), expected)
    assert torch.equal(layer(query), layer(query, query, query))


def test_padded_keys_are_not_seen():
    block, mask = make(SparseTransformerBlock, pattern=Window(4)), padding([20, 11], 20)
    x = stream(2, 20)
    changed = x.masked_fill(mask[..., None], 7.0)
    before, after = block(x, mask), block(changed, mask)
    assert torch.equal(before[~mask], after[~mask])


def test_query_without_keys_gets_the_bias():
    layer = make(SparseSelfAttention)
    output = layer(stream(1, 8), key_padding_mask=torch.ones(1, 8, dtype=torch.bool, device=DEVICE))
    torch.testing.assert_close(output, layer.output.bias.expand_as(output))


@pytest.mark.parametrize("kind", [SparseSelfAttention, SparseTransformerBlock])
@pytest.mark.parametrize("pattern", [Window(4), PerHead([Window(4), Global([0])])], ids=repr)
def test_causal(kind, pattern):
    module = make(kind, pattern=pattern, causal=True)
    x = stream(1, 30)
    changed = x.clone()
    changed[:, 20:] += 1
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_causal_leaves_a_causal_pattern_as_it_is():
    assert make(SparseSelfAttention, causal=True).pattern == STRIDED
    assert make(SparseSelfAttention, pattern=Window(4), causal=True).pattern == Window(4) & Causal()


@pytest.mark.parametrize("num_layers", [1, 8])
def test_initialization(num_layers):
    torch.manual_seed(0)
    block = SparseTransformerBlock(256, 4, pattern=STRIDED, num_layers=num_layers)
    for name in MATRICES:
        matrix = block.get_submodule(name)
        std = 0.125 / math.sqrt(matrix.in_features)
        if name in ("attention.output", "linear2"):
            std /= math.sqrt(2 * num_layers)
        assert matrix.weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(matrix.weight.mean().item()) < 0.02 * std
        assert not matrix.bias.any()
    for norm in (block.norm1, block.norm2):
        assert torch.equal(norm.weight, torch.ones(256))
        assert not norm.bias.any()


def test_parameters_are_named_plainly():
    names = [
        f"{name}.{kind}" for name in (*MATRICES, "norm1", "norm2") for kind in ("weight", "bias")
    ]
    assert set(make(SparseTransformerBlock).state_dict()) == set(names)
    without = set(make(SparseTransformerBlock, bias=False).state_dict())
    assert without == {name for name in names if name.endswith("weight")}


def outcome(block: SparseTransformerBlock, mask: Tensor | None) -> tuple[list[Tensor], int]:
    """Output and all gradients, from one state of the generator; bytes kept for backward."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    x = stream(2, 40).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x, mask)
    grads = torch.autograd.grad(output, [x, *block.parameters()], stream(2, 40, seed=1))
    return [output, *grads], sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_recompute_gives_the_same_bits_from_fewer_bytes(dropout, masked):
    blocks = [make(SparseTransformerBlock, dropout=dropout, recompute=r) for r in (False, True)]
    mask = padding([40, 33], 40) if masked else None
    (expected, many), (results, few) = (outcome(block, mask) for block in blocks)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert few < many / 4


def test_recompute_is_for_training():
    block = make(SparseTransformerBlock, recompute=True, dropout=0.3)
    plain = make(SparseTransformerBlock)
    x = stream(2, 40)
    assert torch.equal(block.eval()(x), plain(x))
    assert outcome(block, None)[1] == outcome(plain, None)[1]
    with torch.no_grad():
        assert block.train()(x).grad_fn is None


@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropout_ends_the_branches(dropout):
    block = make(SparseTransformerBlock, dropout=dropout)
    block.linear2.weight.data.zero_()  # leaves the stream and one branch
    x = stream(2, 50)
    branch = (block(x) - x).detach()
    whole = (block.eval()(x) - x).detach()
    kept = branch != 0
    assert kept.double().mean().item() == pytest.approx(1 - dropout, abs=0.05)
    torch.testing.assert_close(branch[kept], whole[kept] / max(1 - dropout, 1e-9))


def test_dropout_of_probabilities():
    layer, x = make(SparseSelfAttention, dropout=0.5), stream(2, 20)
    torch.manual_seed(1)
    first, other = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, other)
    assert torch.equal(layer.eval()(x), make(SparseSelfAttention)(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    torch.manual_seed(0)
    block = SparseTransformerBlock(
        4,
        2,
        pattern=Window(2, 0),
        mlp_ratio=1,
        recompute=recompute,
        device=DEVICE,
        dtype=torch.float64,
    )
    roughen(block)
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), x)

    x = cases.normal(1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("n", [1, 2, 67])
@pytest.mark.parametrize("kind", [SparseSelfAttention, SparseTransformerBlock])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_and_dtypes(kind, n, dtype):
    module = kind(EMBED, HEADS, pattern=STRIDED, device=DEVICE, dtype=dtype)
    output = module(stream(2, n, dtype=dtype))
    assert output.shape == (2, n, EMBED)
    assert output.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", [SparseSelfAttention, SparseTransformerBlock])
def test_copies_and_state_dicts(kind):
    module, other, x = make(kind), make(kind, seed=1), stream(2, 20)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles(recompute):
    torch._dynamo.reset()
    block = make(SparseTransformerBlock, recompute=recompute, causal=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for n in (20, 33):
        mask = padding([n, 11], n)
        assert_same(
            [lambda x, m=mask: compiled(x, m), lambda x, m=mask: block(x, m)], block, stream(2, n)
        )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda kind: kind(30, 4, pattern=STRIDED), ValueError, ["embed_dim", "30", "4"]),
        (lambda kind: kind(32, 0, pattern=STRIDED), ValueError, ["num_heads", "0"]),
        (lambda kind: kind(32, 4, pattern=STRIDED, dropout=1.5), ValueError, ["dropout", "1.5"]),
        (lambda kind: kind(32, 4, pattern=STRIDED, dropout=-1), ValueError, ["dropout", "-1"]),
        (lambda kind: kind(32, 4, pattern=256), TypeError, ["pattern", "int"]),
        (lambda kind: make(kind)(stream(1, 20)[0]), ValueError, ["batch", "(20, 32)"]),
        (lambda kind: make(kind)(stream(2, 20)[..., 1:]), ValueError, ["32", "(2, 20, 31)"]),
        (
            lambda kind: make(kind)(stream(2, 9), key_padding_mask=padding([9, 9], 9).float()),
            TypeError,
            ["key_padding_mask", "bool"],
        ),
        (
            lambda kind: make(kind)(stream(2, 9), key_padding_mask=padding([9], 9)),
            ValueError,
            ["key_padding_mask"],
        ),
    ],
)
@pytest.mark.parametrize("kind", [SparseSelfAttention, SparseTransformerBlock])
def test_wrong_input(kind, call, exception, words):
    with pytest.raises(exception, match="sparse_attn: expected") as caught:
        call(kind)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"mlp_ratio": 0}, {"mlp_ratio": math.nan}])
def test_wrong_sizes_of_a_block(options):
    with pytest.raises(ValueError, match=f"sparse_attn: expected {next(iter(options))}"):
        make(SparseTransformerBlock, **options)


@pytest.mark.parametrize("name", ["key", "value"])
def test_key_and_value_come_together(name):
    with pytest.raises(ValueError, match=f"got only {name}"):
        make(SparseSelfAttention)(stream(2, 9), **{name: stream(2, 9)})
