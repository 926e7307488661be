"""`MultiheadAttention` inside torch's transformers, and `replace_multihead_attention`."""

import copy
import functools
import math
import pickle

import cases
import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from sparse_attn import (
    Causal,
    Full,
    Global,
    MultiheadAttention,
    PerHead,
    Window,
    replace_multihead_attention,
)

EMBED, HEADS, N = 32, 4, 12
PATTERN = Window(2) | Global([0])

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def padding(lengths: list[int], n: int = N) -> Tensor:
    return torch.arange(n, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]


def stream(batch: int = 3, n: int = N, seed: int = 0) -> Tensor:
    return cases.normal(batch, n, EMBED, seed=seed, dtype=torch.float32)


def make_layer(seed: int = 0, **options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(seed)
    options = {"batch_first": True, "dropout": 0.0, "dim_feedforward": 64} | options
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, device=DEVICE, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def make_encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(make_layer(**options), layers)


def built_from_it(pattern, **options) -> nn.TransformerEncoder:
    """An encoder around a layer that had the module before it was cloned."""
    layer = make_layer(**options)
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, device=DEVICE, pattern=pattern)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    return nn.TransformerEncoder(layer, 2)


def patched(pattern, **options) -> nn.TransformerEncoder:
    return replace_multihead_attention(make_encoder(**options), pattern)


def disallowed(pattern, n: int = N) -> Tensor:
    return ~pattern.mask(n).to(DEVICE)


def assert_close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


# Encoders, where torch's fast paths lie in wait


@pytest.mark.parametrize("make", [built_from_it, patched])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_pattern_survives_the_fast_path(make, options):
    torchs, ours = make_encoder(**options).eval(), make(PATTERN, **options).eval()
    x, keys = stream(), padding([N, 5, 1])
    for call in ({}, {"src_key_padding_mask": keys}):
        expected = torchs(x, mask=disallowed(PATTERN), **call)
        with torch.no_grad():
            results = [ours(x, **call)]
        results.append(ours.train()(x, **call))
        ours.eval()
        for result in results:
            assert_close(result[~keys], expected[~keys])
    with torch.no_grad():
        # The layer alone is called on its parameters too, if nothing keeps torch from it.
        layer = ours.layers[0]
        expected = torchs.layers[0](x, disallowed(PATTERN))
        assert_close(layer(x), expected)


@pytest.mark.parametrize("make", [built_from_it, patched])
@pytest.mark.parametrize("lengths", [[N, 5, 1], [7, 3, 4], [N, N, N]])
def test_nested_tensors_of_the_encoder(make, lengths):
    x, keys = stream(), padding(lengths)
    torchs, full, ours = make_encoder().eval(), make(None).eval(), make(PATTERN).eval()
    assert torchs.use_nested_tensor
    assert full.use_nested_tensor
    seen = []
    ours.layers[1].self_attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        assert_close(full(x, src_key_padding_mask=keys), torchs(x, src_key_padding_mask=keys))
        result = ours(x, src_key_padding_mask=keys)
        expected = torchs(x, mask=disallowed(PATTERN), src_key_padding_mask=keys)
    assert seen[0].is_nested
    assert_close(result[~keys], expected[~keys])
    assert (result[keys] == 0).all()


def test_padding_on_the_left_and_in_between():
    """Of which the encoder makes no nested tensors."""
    keys = padding([N, 5, 1]).flip(1) | cases.bits(3, N, share=0.2)
    keys[:, 0] = False  # a global token: every query sees it
    x = stream()
    torchs, ours = make_encoder().eval(), patched(PATTERN).eval()
    with torch.no_grad():
        expected = torchs(x, mask=disallowed(PATTERN), src_key_padding_mask=keys)
        assert_close(ours(x, src_key_padding_mask=keys), expected)


def test_a_row_without_keys_in_an_encoder():
    """Torch gives NaN for the whole example, in training and in evaluation."""
    x, keys = stream(), padding([N, 0, 5])
    for pattern in (None, PATTERN):
        ours = patched(pattern)
        output = ours(x, src_key_padding_mask=keys)
        output.square().sum().backward()
        assert output.isfinite().all()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        with torch.no_grad():
            evaluated = ours.eval()(x, src_key_padding_mask=keys)
        assert_close(evaluated[~keys], output[~keys])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pattern", [None, Window(3)])
def test_causal_masks(batch_first, pattern):
    options = {"batch_first": batch_first}
    torchs, ours = make_encoder(**options), patched(pattern, **options)
    mask = nn.Transformer.generate_square_subsequent_mask(N, device=DEVICE)
    x = stream() if batch_first else stream().transpose(0, 1)
    merged = mask if pattern is None else mask.masked_fill(disallowed(pattern), -math.inf)
    expected = torchs(x, mask=merged)
    for call in ({}, {"is_causal": True}):
        assert_close(ours(x, mask=mask, **call), expected)
        with torch.no_grad():
            assert_close(ours.eval()(x, mask=mask, **call), expected)
        ours.train()


def test_gradients_in_an_encoder():
    torchs, ours = make_encoder(), patched(PATTERN)
    x, keys = stream(), padding([N, 5, 1])
    for model, mask in ((torchs, disallowed(PATTERN)), (ours, None)):
        model(x, mask=mask, src_key_padding_mask=keys).square().sum().backward()
    for (name, p), q in zip(torchs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_encoders_of_other_dtypes(dtype):
    torchs, ours = make_encoder().to(dtype).eval(), patched(PATTERN).to(dtype).eval()
    x = stream().to(dtype)
    with torch.no_grad():
        expected = torchs(x, mask=disallowed(PATTERN))
        tolerance = 1e-10 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)


def test_compiled_encoder():
    torch._dynamo.reset()
    ours = patched(PATTERN)
    x, keys = stream(), padding([N, 5, 1])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        ours.train(mode)
        with torch.set_grad_enabled(mode):
            expected = ours(x, src_key_padding_mask=keys)
            result = compiled(x, src_key_padding_mask=keys)
        assert_close(result[~keys], expected[~keys])


# Nested tensors given to the module


def nested(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([stream(1, n, seed=n)[0] for n in lengths])


def module(pattern=None, **options) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(EMBED, HEADS, device=DEVICE, pattern=pattern, **options)


@pytest.mark.parametrize("average", [True, False])
def test_nested_input(average):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, device=DEVICE).eval()
    x = nested(3, 7, 1)
    call = {"average_attn_weights": average}
    with torch.no_grad():
        expected, expected_weights = theirs(x, x, x, **call)
        output, weights = module(batch_first=True).eval()(x, x, x, **call)
    assert output.is_nested
    torch.testing.assert_close(weights, expected_weights)
    assert_close(output.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    ours = module(Window(1), batch_first=True)
    for example, row in zip(x.unbind(), ours(x, x, x, need_weights=False)[0].unbind(), strict=True):
        assert_close(row, ours(example, example, example)[0])


def test_nested_input_has_gradients():
    ours = module(Window(2), batch_first=True)
    x = nested(3, 5).requires_grad_()
    ours(x, x, x, need_weights=False)[0].to_padded_tensor(0.0).square().sum().backward()
    given = x.grad.unbind()
    for i, example in enumerate(x.detach().unbind()):
        leaf = example.clone().requires_grad_()
        ours(leaf, leaf, leaf)[0].square().sum().backward()
        assert_close(given[i], leaf.grad)


def test_nested_errors():
    x, other = nested(3, 5), nested(3, 5)
    ours = module(batch_first=True)
    for arguments, options, message in (
        ((x, other, other), {}, "not the same Tensor"),
        ((x, x, x), {"key_padding_mask": padding([3, 5], 5)}, "a mask is given"),
        ((x, x, x), {"attn_mask": torch.zeros(5, 5)}, "a mask is given"),
    ):
        with pytest.raises(AssertionError, match=f"does not support NestedTensor.*{message}"):
            ours(*arguments, **options)
    with pytest.raises(AssertionError, match="batch_first"):
        module()(x, x, x)
    jagged = torch.nested.nested_tensor([stream(1, 3)[0], stream(1, 5)[0]], layout=torch.jagged)
    with pytest.raises(AssertionError, match="layout"):
        ours(jagged, jagged, jagged)


# Decoders and whole transformers


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first):
    torch.manual_seed(0)
    torchs = nn.Transformer(
        EMBED, HEADS, 1, 1, 64, dropout=0.0, batch_first=batch_first, device=DEVICE
    )
    ours = replace_multihead_attention(copy.deepcopy(torchs), Window(2))
    source, target = stream(n=N), stream(n=7, seed=1)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(7, device=DEVICE)
    expected = torchs(
        source,
        target,
        src_mask=torch.zeros(N, N, device=DEVICE).masked_fill(disallowed(Window(2)), -math.inf),
        tgt_mask=causal.masked_fill(disallowed(Window(2), 7), -math.inf),
        # Cross-attention: the ends are aligned.
        memory_mask=~Window(2).mask(7, N).to(DEVICE),
    )
    for mode in (True, False):
        assert_close(ours.train(mode)(source, target, tgt_mask=causal), expected)
    with torch.no_grad():
        assert_close(ours(source, target, tgt_mask=causal), expected)


def test_decoder_layer_built_from_it():
    torch.manual_seed(0)
    torchs = nn.TransformerDecoderLayer(EMBED, HEADS, 64, 0.0, batch_first=True, device=DEVICE)
    ours = copy.deepcopy(torchs)
    for name, pattern in (("self_attn", Window(3, 0)), ("multihead_attn", None)):
        new = MultiheadAttention(EMBED, HEADS, batch_first=True, device=DEVICE, pattern=pattern)
        new.load_state_dict(getattr(torchs, name).state_dict())
        setattr(ours, name, new)
    target, memory = stream(n=7), stream(seed=1)
    keys = padding([N, 4, 9])
    call = {"memory_key_padding_mask": keys}
    expected = torchs(target, memory, tgt_mask=disallowed(Window(3, 0), 7), **call)
    assert_close(nn.TransformerDecoder(ours, 1)(target, memory, **call), expected)


# The replacement


def test_replacement_keeps_all_but_the_class():
    model = make_encoder(dropout=0.1)
    model.layers[1].self_attn.eval()
    model.layers[0].self_attn.note = "kept"
    model.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    before = dict(model.named_parameters())
    old, theirs = [layer.self_attn for layer in model.layers], copy.deepcopy(model)
    state = torch.get_rng_state()
    assert replace_multihead_attention(model, PATTERN) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert list(dict(model.named_parameters())) == list(before)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
    for layer, original, was in zip(model.layers, theirs.layers, old, strict=True):
        assert layer.self_attn is was
        assert type(was) is MultiheadAttention
        assert was.pattern == PATTERN
        assert was.training == original.self_attn.training
        assert was.dropout == 0.1
        assert was.batch_first
    assert model.layers[0].self_attn.note == "kept"
    x = stream()
    expected = theirs.layers[1].self_attn(x, x, x, attn_mask=disallowed(PATTERN))[0]
    assert_close(expected, model.layers[1].self_attn(x, x, x)[0])


def test_replacement_keeps_hooks():
    model, calls = make_encoder(), []
    handle = model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    replace_multihead_attention(model, PATTERN)(stream())
    assert calls == [1]
    handle.remove()
    model(stream())
    assert calls == [1]


def test_replacement_of_a_module_itself_and_of_a_shared_one():
    theirs = nn.MultiheadAttention(EMBED, HEADS, device=DEVICE)
    ours = replace_multihead_attention(theirs, PATTERN)
    assert type(ours) is MultiheadAttention
    assert ours.in_proj_weight is theirs.in_proj_weight
    shared = nn.ModuleDict({"a": theirs, "b": theirs, "c": nn.ModuleList([theirs])})
    replace_multihead_attention(shared, PATTERN)
    assert shared["a"] is shared["b"] is shared["c"][0]
    assert type(shared["a"]) is MultiheadAttention


def test_replacement_of_a_compiled_module():
    torch._dynamo.reset()
    model = nn.ModuleDict({"a": nn.MultiheadAttention(EMBED, HEADS, batch_first=True)}).to(DEVICE)
    model["a"].compile(backend="eager")
    x = stream()
    model["a"](x, x, x)
    replace_multihead_attention(model, Causal())
    weights = model["a"](x, x, x)[1]
    assert torch.equal(weights, weights.tril())
    torch._dynamo.reset()


def test_replacement_beneath_hooks_that_keep_the_forward():
    """As accelerate does: the module's own method is an attribute that its new forward calls."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(EMBED, HEADS, batch_first=True)}).to(DEVICE)
    module = model["a"]
    module._old_forward = module.forward
    module.forward = functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module)
    replace_multihead_attention(model, Causal())
    x = stream()
    weights = module(x, x, x)[1]
    assert torch.equal(weights, weights.tril())


def test_replacement_beneath_a_forward_that_hides_it():
    model = nn.ModuleList(
        [nn.MultiheadAttention(EMBED, HEADS), nn.MultiheadAttention(EMBED, HEADS)]
    )
    old = model[1].forward
    model[1].forward = lambda *args, **options: old(*args, **options)
    with pytest.raises(ValueError, match="MultiheadAttention whose forward was replaced"):
        replace_multihead_attention(model, PATTERN)
    assert [type(module) for module in model] == [nn.MultiheadAttention] * 2


def test_replacement_of_parametrized_modules():
    model = make_encoder()
    nn.utils.parametrizations.weight_norm(model.layers[1].self_attn, "in_proj_weight")
    with pytest.raises(ValueError, match=r"without parametrizations.*layers\.1\.self_attn"):
        replace_multihead_attention(model, PATTERN)
    chosen = replace_multihead_attention(model, lambda n, _: PATTERN if "layers.0" in n else None)
    assert type(chosen.layers[0].self_attn) is MultiheadAttention
    later = nn.utils.parametrizations.weight_norm(chosen.layers[0].self_attn, "in_proj_weight")
    x = stream()
    assert later(x, x, x, need_weights=False)[0].isfinite().all()


def test_replacement_again_takes_the_new_pattern():
    model = patched(PATTERN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    replace_multihead_attention(model, Window(1))
    assert all(layer.self_attn.pattern == Window(1) for layer in model.layers)
    assert len(model.layers[0].self_attn._forward_pre_hooks) == 1
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    torchs = make_encoder()
    assert_close(model(stream()), torchs(stream(), mask=disallowed(Window(1))))
    replace_multihead_attention(model, None)
    assert_close(model(stream()), torchs(stream()))


def test_replacement_by_choice():
    torch.manual_seed(0)
    model = nn.Transformer(EMBED, HEADS, 2, 1, 64, device=DEVICE)
    names = []

    def choose(name, module):
        names.append(name)
        if name.endswith("multihead_attn"):
            return None
        return Full() if "layers.0" in name else PerHead([Window(1), Window(2)])

    replace_multihead_attention(model, choose)
    modules = dict(model.named_modules())
    assert names == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    assert [getattr(modules[name], "pattern", None) for name in names] == [
        Full(), PerHead([Window(1), Window(2)]), Full(), None]  # fmt: skip
    assert type(modules[names[-1]]) is nn.MultiheadAttention


def test_subclasses_are_left_alone():
    class Other(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([Other(EMBED, HEADS), nn.MultiheadAttention(EMBED, HEADS)])
    replace_multihead_attention(model, PATTERN)
    assert [type(module) for module in model] == [Other, MultiheadAttention]
    with pytest.raises(ValueError, match=r"holds a torch\.nn\.MultiheadAttention, got Other"):
        replace_multihead_attention(model[0], PATTERN)


def test_replacement_errors():
    with pytest.raises(ValueError, match="got Linear"):
        replace_multihead_attention(nn.Linear(2, 2), PATTERN)
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got str"):
        replace_multihead_attention("model", PATTERN)
    model = make_encoder()
    for wrong in ("window", lambda name, module: 3):
        with pytest.raises(TypeError, match="expected pattern to be a Pattern"):
            replace_multihead_attention(model, wrong)
    # Nothing was changed.
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


def test_copies_of_a_model():
    model = patched(PATTERN).eval()
    x = stream()
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
    fresh = make_encoder(seed=3)
    fresh.load_state_dict(model.state_dict())
    assert_close(replace_multihead_attention(fresh, PATTERN)(x), expected)
