"""`replace_attention` on transformers' Longformer and LED: the same numbers before and after."""

import copy
import functools
import pickle

import cases
import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from sparse_attn.huggingface import replace_attention

transformers = pytest.importorskip("transformers", reason="compares with transformers")

PROJECTIONS = ["query", "key", "value", "query_global", "key_global", "value_global"]


def longformer(kind: type = transformers.LongformerModel, **options) -> nn.Module:
    config = transformers.LongformerConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "attention_window": [4, 8, 4],
            "max_position_embeddings": 130,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 1,
            "sep_token_id": 2,
            **options,
        }
    )
    torch.manual_seed(0)
    return kind(config).to(DEVICE).eval()


def led(kind: type = transformers.LEDModel, **options) -> nn.Module:
    config = transformers.LEDConfig(
        **{
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "attention_window": [4, 8],
            "max_encoder_position_embeddings": 128,
            "max_decoder_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            **options,
        }
    )
    torch.manual_seed(0)
    return kind(config).to(DEVICE).eval()


def token_ids(batch: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (batch, n), generator=generator).to(DEVICE)


def marks(tokens: list[list[int]], n: int) -> Tensor:
    mask = torch.zeros(len(tokens), n, dtype=torch.long)
    for row, chosen in zip(mask, tokens, strict=True):
        row[chosen] = 1
    return mask.to(DEVICE)


def attention_mask(lengths: list[int], n: int) -> Tensor:
    return (torch.arange(n, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]).long()


def numbers(model: nn.Module, loss_of, **inputs) -> dict[str, Tensor | tuple]:
    """All that a call returns, and the gradients of a number made from it."""
    model.zero_grad()
    results = model(**inputs)
    loss_of(results).backward()
    found = {name: value for name, value in results.items() if value is not None}
    for name, parameter in model.named_parameters():
        # A projection of global tokens gets no gradient from the original without any, here 0.
        found[f"d {name}"] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        )
    return found


def assert_alike(ours: object, theirs: object, name: str) -> None:
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs), name
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(a, b, f"{name}[{i}]")
    elif isinstance(theirs, Tensor):
        limit = 1e-5 * max(1.0, theirs.detach().abs().max().item() if theirs.numel() else 0)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=limit, msg=lambda m: f"{name}: {m}"
        )


def check_replacement(model: nn.Module, loss_of, **inputs) -> None:
    theirs = numbers(model, loss_of, **inputs)
    before = dict(model.named_parameters())
    assert replace_attention(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    ours = numbers(model, loss_of, **inputs)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_alike(ours[name], value, name)


def weighted(results) -> Tensor:
    """Depends on every number of the hidden states and, if there are some, of the attentions."""
    parts = [results[0]]
    for name in ("attentions", "global_attentions", "encoder_attentions"):
        parts += results.get(name) or []
    return sum(
        (part * cases.normal(*part.shape, seed=i, dtype=part.dtype)).sum()
        for i, part in enumerate(parts)
    )


MASKS = [
    (32, [32, 32], [[], []]),
    (32, [32, 11], [[], []]),
    (32, [32, 32], [[0], [0]]),
    (21, [21, 13], [[0], [0]]),  # the model pads to 24
    (40, [40, 17], [[0, 3, 30], [5]]),
    (40, [29, 40], [[], [1, 2, 39]]),
    (40, [40, 20], [[0, 35], [0, 35]]),  # one is padding
    (3, [3, 1], [[0], [0]]),
]


@pytest.mark.parametrize(("n", "lengths", "tokens"), MASKS)
@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "attentions"])
def test_longformer(n, lengths, tokens, wanted):
    check_replacement(
        longformer(),
        weighted,
        input_ids=token_ids(2, n),
        attention_mask=attention_mask(lengths, n),
        global_attention_mask=marks(tokens, n),
        output_attentions=wanted,
        output_hidden_states=True,
        return_dict=True,
    )


@pytest.mark.parametrize(("n", "lengths", "tokens"), MASKS)
def test_led(n, lengths, tokens):
    check_replacement(
        led(),
        weighted,
        input_ids=token_ids(2, n),
        attention_mask=attention_mask(lengths, n),
        global_attention_mask=marks(tokens, n),
        decoder_input_ids=token_ids(2, 5, seed=1),
        output_attentions=True,
        output_hidden_states=True,
        return_dict=True,
        use_cache=False,
    )


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (transformers.LongformerForMaskedLM, {"labels": token_ids(2, 30, seed=1)}),
        (transformers.LongformerForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (transformers.LongformerForTokenClassification, {"labels": token_ids(2, 30) % 2}),
    ],
)
def test_heads_of_longformer(kind, labels):
    labels = {name: value.to(DEVICE) for name, value in labels.items()}
    check_replacement(longformer(kind), lambda r: r.loss, input_ids=token_ids(2, 30), **labels)


def test_question_answering():
    ids = token_ids(2, 30)
    ids[:, [4, 9, 29]] = 2  # separators, from which the model takes its global tokens
    at = torch.tensor([12, 20], device=DEVICE)
    check_replacement(
        longformer(transformers.LongformerForQuestionAnswering),
        lambda r: r.loss,
        input_ids=ids,
        start_positions=at,
        end_positions=at + 3,
        output_attentions=True,
    )


def test_led_generates_the_same():
    model = led(transformers.LEDForConditionalGeneration)
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "min_new_tokens": 8}
    given = {"input_ids": token_ids(2, 25), "global_attention_mask": marks([[0], [0]], 25)}
    expected = model.generate(**given, **options)
    assert torch.equal(replace_attention(model).generate(**given, **options), expected)


@pytest.mark.parametrize("n", [4096, 10])
def test_calls_of_tutorials(n):
    """4096 tokens with the first one global, and ten ids without masks."""
    model = longformer(max_position_embeddings=4100, num_hidden_layers=1, attention_window=[64])
    given = {"input_ids": token_ids(1, n)}
    if n == 4096:
        given["attention_mask"] = torch.ones(1, n, dtype=torch.long, device=DEVICE)
        given["global_attention_mask"] = torch.zeros(1, n, dtype=torch.long, device=DEVICE)
        given["global_attention_mask"][:, 0] = 1
    with torch.no_grad():
        expected = model(**given)
        results = replace_attention(model)(**given)
    assert results.last_hidden_state.shape == (1, n, 32)
    assert results.pooler_output.shape == (1, 32)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [longformer, led])
def test_saved_and_loaded(make, tmp_path):
    model = replace_attention(make())
    ids = token_ids(2, 20)
    expected = model(input_ids=ids)[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(DEVICE).eval()
    assert list(loaded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(loaded(input_ids=ids)[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(replace_attention(loaded)(input_ids=ids)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids)[0], expected)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids)[0], expected)


def test_head_mask():
    """Of transformers 4.57; the attention modules alone, as 5 has no such argument."""
    model = longformer()
    theirs = copy.deepcopy(model)
    replace_attention(model)
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0], device=DEVICE)
    x, numeric = cases.normal(2, 16, 32, dtype=torch.float32), torch.zeros(2, 16, device=DEVICE)
    numeric[0, 3], numeric[1, 12:] = 1e4, -1e4
    given = {
        "attention_mask": numeric,
        "is_index_masked": numeric < 0,
        "is_index_global_attn": numeric > 0,
        "is_global_attn": True,
        "output_attentions": True,
    }
    ours = model.encoder.layer[1].attention.self(x, **given, layer_head_mask=mask)
    original = theirs.encoder.layer[1].attention.self
    if int(transformers.__version__.split(".")[0]) < 5:
        expected = original(x, **given, layer_head_mask=mask)
    else:
        output, local, of_global = original(x, **given)
        output = (output.unflatten(-1, (4, -1)) * mask[:, None]).flatten(-2)
        expected = output, local * mask[:, None], of_global * mask[:, None, None]
    assert_alike(ours, expected, "layer")
    with pytest.raises(ValueError, match=r"layer_head_mask of shape \(4,\), got \(3,\)"):
        model.encoder.layer[1].attention.self(x, **given, layer_head_mask=mask[:3])


def test_masks_from_the_numbers_alone():
    """As code that was written for the original calls it, without the masks derived from it."""
    layer = replace_attention(longformer()).encoder.layer[1].attention.self
    x, numeric = cases.normal(2, 16, 32, dtype=torch.float32), torch.zeros(2, 16, device=DEVICE)
    numeric[0, 3], numeric[1, 12:] = 1e4, -1e4
    expected = layer(
        x,
        attention_mask=numeric,
        is_index_masked=numeric < 0,
        is_index_global_attn=numeric > 0,
        is_global_attn=True,
    )
    assert torch.equal(layer(x, numeric)[0], expected[0])
    assert layer(x)[0].isfinite().all()


def test_any_length_goes():
    layer = replace_attention(longformer()).encoder.layer[1].attention.self
    assert layer(cases.normal(1, 13, 32, dtype=torch.float32))[0].shape == (1, 13, 32)


@pytest.mark.parametrize("recompute", [False, True])
def test_training(recompute):
    """Dropout off: the same losses, step by step."""
    losses = []
    for change in (lambda model: model, replace_attention):
        model = change(longformer(transformers.LongformerForSequenceClassification)).train()
        if recompute:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = []
        for step in range(4):
            labels = torch.tensor([0, 1], device=DEVICE)
            loss = model(input_ids=token_ids(2, 30, seed=step), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_dropout_in_training():
    model = replace_attention(longformer(attention_probs_dropout_prob=0.3)).train()
    ids = token_ids(1, 30)
    torch.manual_seed(1)
    first, other = (model(input_ids=ids)[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=ids)[0], first)
    assert not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    model = longformer().to(dtype)
    given = {"input_ids": token_ids(2, 40), "global_attention_mask": marks([[0], [0, 9]], 40)}
    exact = copy.deepcopy(model).float()(**given)[0]
    theirs = (model(**given)[0].float() - exact).norm()
    result = replace_attention(model)(**given, output_attentions=True)
    assert result[0].dtype == dtype
    assert {a.dtype for a in (*result.attentions, *result.global_attentions)} == {dtype}
    assert (result[0].float() - exact).norm() <= 1.2 * theirs


def test_modes_and_a_second_call():
    model = longformer().train()
    model.encoder.layer[1].eval()
    before = [module.training for module in model.modules()]
    layers = [layer.attention.self for layer in replace_attention(model).encoder.layer]
    assert [module.training for module in model.modules()] == before
    replace_attention(model)
    assert [layer.attention.self for layer in model.encoder.layer] == layers


def test_the_objects_stay():
    model = longformer()
    attention = model.encoder.layer[0].attention.self
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    original = type(attention)
    replace_attention(model)
    assert model.encoder.layer[0].attention.self is attention
    assert isinstance(attention, original)
    assert type(attention) is not original
    model(input_ids=token_ids(1, 8))
    assert calls == [1]


def test_an_attention_module_alone():
    layer = longformer().encoder.layer[0].attention.self
    assert replace_attention(layer) is layer
    assert layer(cases.normal(1, 13, 32, dtype=torch.float32))[0].shape == (1, 13, 32)


def test_subclasses_are_left_alone():
    class Changed(transformers.models.longformer.modeling_longformer.LongformerSelfAttention):
        pass

    model = longformer()
    model.encoder.layer[0].attention.self.__class__ = Changed
    replace_attention(model)
    assert type(model.encoder.layer[0].attention.self) is Changed


def test_beneath_hooks_that_keep_the_forward():
    """As accelerate does: the module's own method is an attribute that its new forward calls."""
    model = longformer()
    for module in model.modules():
        module._old_forward = module.forward
        module.forward = functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module)
    attention = replace_attention(model).encoder.layer[0].attention.self
    assert attention._old_forward.__func__ is type(attention).forward
    assert model(input_ids=token_ids(1, 8))[0].isfinite().all()


def test_beneath_a_forward_that_hides_it():
    model = longformer()
    attention = model.encoder.layer[2].attention.self
    old = attention.forward
    attention.forward = lambda *args, **options: old(*args, **options)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="LongformerSelfAttention whose forward was replaced"):
        replace_attention(model)
    assert [type(module) for module in model.modules()] == before


def test_part_of_a_model():
    holder = nn.ModuleDict({"text": longformer(), "head": nn.Linear(32, 2)})
    replace_attention(holder)
    assert "sparse_attn" in type(holder["text"].encoder.layer[0].attention.self).__module__


def test_nothing_to_replace():
    with pytest.raises(ValueError, match=r"attention of Longformer.*got Linear"):
        replace_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model to be an nn\.Module, got str"):
        replace_attention("allenai/longformer-base-4096")


def test_gradients_without_global_tokens_are_zero():
    model = replace_attention(longformer())
    model(input_ids=token_ids(1, 16))[0].sum().backward()
    for layer in model.encoder.layer:
        for name in PROJECTIONS[3:]:
            for parameter in getattr(layer.attention.self, name).parameters():
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))
