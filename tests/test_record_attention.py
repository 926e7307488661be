"""Recording calls of attention: what was computed with, under whose name, and its gradient."""

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from sparse_attn import (
    BigBirdSelfAttention,
    Full,
    MultiheadAttention,
    SparseSelfAttention,
    Window,
    alibi_slopes,
    attention,
    fit_pattern,
    gradient_pattern,
    record_attention,
)

N = 24


def check(sample, causal=False, padding=None, scale=None):
    """The sample's gradient is that of the attention that it describes; returns its output."""
    assert sample["is_causal"] == causal
    if padding is None:
        assert not sample.get("key_padding_mask", torch.zeros(1)).any()
    else:
        assert torch.equal(sample["key_padding_mask"], padding)
    assert not any(sample[name].requires_grad for name in ("query", "key", "value", "grad_output"))
    n_q, n_k = sample["query"].shape[2], sample["key"].shape[2]
    hidden = torch.ones(n_q, n_k, device=DEVICE).triu(1 + n_k - n_q) > 0
    hidden = hidden & torch.tensor(causal, device=DEVICE)
    if padding is not None:
        hidden = hidden | padding[:, None, None]
    groups = sample["query"].shape[1] // sample["key"].shape[1]
    key, value = (sample[name].repeat_interleave(groups, 1) for name in ("key", "value"))
    return scaled_dot_product_attention(sample["query"], key, value, ~hidden, scale=scale)


@pytest.mark.parametrize("way", ["sparse_attn", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_functions(way, causal):
    query, key, value = cases.inputs(cases.Shape(n_q=N, head_dim=8, kv_heads=2), torch.float64)
    query.requires_grad_()
    with record_attention() as samples:
        if way == "torch":
            output = scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=0.3, enable_gqa=True
            )
        else:
            pattern = sparse_attn.Causal() if causal else Full()
            output = attention(query, key, value, pattern, scale=0.3, enable_gqa=True)
        output.square().sum().backward(retain_graph=True)
    (sample,) = samples[""]
    assert sample["enable_gqa"]
    assert sample["scale"] == 0.3
    assert torch.allclose(check(sample, causal, scale=0.3), output)
    assert torch.allclose(sample["grad_output"], 2 * output)
    output.sum().backward()  # afterwards: gradients add up, nothing more is recorded
    assert torch.allclose(sample["grad_output"], 2 * output + 1)
    attention(query, key, value, Full(), enable_gqa=True)
    assert list(samples) == [""]
    assert len(samples[""]) == 1


def models():
    """Models of two layers, with the names of what attends in each."""
    options = {"batch_first": True, "dropout": 0.0}
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    swapped = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sparse_attn.replace_multihead_attention(swapped, Full())
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    of_torch = ["layers.0.self_attn", "layers.1.self_attn"]
    ours = [SparseSelfAttention(16, 2, pattern=Full()), BigBirdSelfAttention(16, 2, block=4)]
    return {
        "encoder": (encoder, of_torch),
        "swapped": (swapped, of_torch),
        "layers": (nn.Sequential(*ours), ["0", "1"]),
    }


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", models())
def test_models(name):
    torch.manual_seed(0)
    model, names = models()[name]
    model.to(DEVICE)
    hooks = count_hooks(model)
    with record_attention(model) as samples:
        for _ in range(2):
            model(torch.randn(3, N, 16, device=DEVICE)).square().mean().backward()
    assert list(samples) == names
    for calls in samples.values():
        assert len(calls) == 2
        for sample in calls:
            assert sample["grad_output"].abs().sum() > 0
            assert check(sample).shape == (3, 2, N, 8)
    assert fit_pattern(samples[names[0]], 4, 0.5).layout.shape == (2, 6, 6)
    assert gradient_pattern(samples[names[1]], keys=3).indices.shape == (2, N, 3)
    assert count_hooks(model) == hooks  # none is left behind


def test_padding_and_causality_of_torch():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).to(DEVICE)
    x = torch.randn(2, N, 16, device=DEVICE)
    padding = cases.padding(2, N)
    later = nn.Transformer.generate_square_subsequent_mask(N, device=DEVICE)
    float_padding = torch.zeros(2, N, device=DEVICE).masked_fill(padding, -torch.inf)
    for mask, ignored in ((later, None), (None, padding), (later, float_padding)):
        with record_attention(model) as samples:
            model(x, src_mask=mask, src_key_padding_mask=ignored).sum().backward()
        expected = None if ignored is None else padding
        check(samples["self_attn"][0], causal=mask is not None, padding=expected)


def test_padding_of_ours():
    layer = SparseSelfAttention(16, 2, pattern=Window(4), causal=True).to(DEVICE)
    padding = cases.padding(2, N)
    with record_attention(layer) as samples:
        x = torch.randn(2, N, 16, device=DEVICE)
        layer(x, key_padding_mask=padding).square().sum().backward()
    check(samples[""][0], causal=True, padding=padding)
    assert fit_pattern(samples[""], 4, 0.5).causal


def test_grouped_heads_of_a_language_model():
    transformers = pytest.importorskip("transformers", reason="an optional peer")
    sparse_attn.huggingface.register()
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    tokens = torch.arange(N, device=DEVICE)[None] % 50
    for way in ("sdpa", "sparse_attn"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=way)
        model.to(DEVICE)
        with record_attention(model) as samples:
            model(tokens, labels=tokens).loss.backward()
        assert list(samples) == [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
        for calls in samples.values():
            check(calls[0], causal=True)
            assert gradient_pattern(calls, block=4, density=0.5).causal


def test_without_a_gradient():
    with record_attention() as samples, torch.no_grad():
        attention(*cases.inputs(cases.Shape(n_q=N, head_dim=8)), Full())
    assert fit_pattern(samples[""], 4, 0.5).layout.shape == (4, 6, 6)
    with pytest.raises(ValueError, match="samples with grad_output"):
        gradient_pattern(samples[""], 4, 0.5)


def test_errors_leave_nothing_behind():
    layer = SparseSelfAttention(16, 2, pattern=Full()).to(DEVICE)
    with pytest.raises(ValueError, match="expected query"), record_attention(layer):
        layer(torch.zeros(2, N, 3, device=DEVICE))
    assert not layer._forward_pre_hooks
    with pytest.raises(TypeError, match=r"model to be an nn\.Module"), record_attention("layer"):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: attention(q, k, v, Full(), bias=alibi_slopes(4).to(DEVICE)),
        lambda q, k, v: attention(q, k, v, Full(), softcap=3.0),
        lambda q, k, v: attention(q, k, v, Full(), sink=torch.zeros(4, device=DEVICE)),
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, cases.bits(N, N), dropout_p=0.0, is_causal=False
        ),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, cases.random(N, N)),
        lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda q, k, v: scaled_dot_product_attention(q[:, :, 1:], k, v, is_causal=True),
    ],
)
def test_what_samples_do_not_hold(call):
    with pytest.raises(NotImplementedError, match="to record"), record_attention():
        call(*cases.inputs(cases.Shape(n_q=N, head_dim=8)))


def test_multihead_attention_by_itself():
    layer = MultiheadAttention(16, 2, batch_first=True, pattern=Window(3)).to(DEVICE)
    x = torch.randn(2, N, 16, device=DEVICE)
    with record_attention(layer) as samples:
        layer(x, x, x, need_weights=False)[0].sum().backward()
    assert samples[""][0]["grad_output"].shape == (2, 2, N, 8)
