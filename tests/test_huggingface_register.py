"""`attn_implementation="sparse_attn"` against transformers' `eager`."""

import inspect
import sys

import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers")

import transformers
from hugging_face_models import BOTH, CHUNKED, DECODERS, ENCODERS, build, padded, pair, tokens

from sparse_attn.huggingface import masks, register

WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]
VERSION_4 = transformers.__version__ < "5"


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture
def no_pairs(monkeypatch):
    """Fails if a mask of pairs is made."""

    def refuse(arguments: dict) -> None:
        raise AssertionError(f"a mask of pairs was made of {arguments}")

    monkeypatch.setattr(masks, "_dense", refuse)


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def compare(models: tuple, rows: Tensor | None, *arguments, **options) -> None:
    """First outputs and all gradients, over the rows of tokens."""
    outputs = []
    for model in models:
        model.zero_grad()
        output = model(*arguments, **options)[0]
        output = output if rows is None else output[rows.bool()]
        weights = torch.linspace(-1, 1, output.numel(), device=output.device)
        (output * weights.view_as(output)).sum().backward()
        outputs.append(output)
    close(outputs[1], outputs[0])
    for expected, found in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None)
        if expected.grad is not None:
            scale = expected.grad.abs().max() + 1e-3
            assert (found.grad - expected.grad).abs().max() <= 1e-5 * scale + 1e-6


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_decoders(name, padding):
    ids = tokens()
    options = {} if padding is None else {"attention_mask": padded(ids, padding)}
    compare(pair(name), options.get("attention_mask"), ids, **options)


@pytest.mark.parametrize("name", [*CHUNKED, *ENCODERS])
@pytest.mark.parametrize("padding", [None, "right"])
def test_chunks_and_encoders(name, padding):
    ids = tokens()
    options = {} if padding is None else {"attention_mask": padded(ids, padding)}
    compare(pair(name), options.get("attention_mask"), ids, **options)


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_make_no_pairs(name):
    ids = tokens()
    build(name, "sparse_attn")(ids, attention_mask=padded(ids, "right"))


@pytest.mark.parametrize("name", BOTH)
def test_encoder_and_decoder(name):
    ids, mask = tokens(), padded(tokens(), "right")
    compare(pair(name), None, ids, attention_mask=mask, decoder_input_ids=tokens(n=9, seed=1))


@pytest.mark.parametrize("name", [*WINDOWED, "llama4", "bart"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation(name, how):
    if name == "bart" and "cache_implementation" in how:
        pytest.skip("transformers gives encoder-decoders no static cache by this name")
    ids = tokens()
    options = {"attention_mask": padded(ids, "left"), "do_sample": False, "disable_compile": True}
    options |= {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **how}
    eager, sparse = pair(name)
    assert torch.equal(sparse.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_cache_filled_in_pieces(name, kind, padding):
    ids, position = tokens(), 0
    mask = padded(ids, "left", 3)
    models = pair(name)
    room = {} if kind == "DynamicCache" else {"max_cache_len": 32}
    caches = [getattr(transformers, kind)(config=model.config, **room) for model in models]
    for piece in ids.split((4, 5, 1, 13), 1):
        end = position + piece.shape[1]
        options = {"attention_mask": mask[:, :end]} if padding else {}
        if VERSION_4:
            options["cache_position"] = torch.arange(position, end, device=DEVICE)
        expected, found = (
            model(piece, past_key_values=cache, **options).logits
            for model, cache in zip(models, caches, strict=True)
        )
        rows = mask[:, position:end].bool() if padding else slice(None)
        close(found[rows], expected[rows])
        position = end


PACKED = {
    "one": [[23], [23]],
    "the same": [[9, 4, 10], [9, 4, 10]],
    "different": [[9, 4, 10], [23]],
    "single tokens": [[1, 1, 21], [22, 1]],
}


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed_sequences(name, lengths):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    compare(pair(name), None, tokens(), position_ids=positions.to(DEVICE), use_cache=False)


@pytest.mark.parametrize("name", WINDOWED)
def test_attention_weights(name):
    ids = tokens()
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None].to(DEVICE)
    for options in ({}, {"position_ids": positions, "use_cache": False}):
        expected, found = (
            model(ids, output_attentions=True, **options).attentions for model in pair(name)
        )
        assert len(found) == len(expected) == 2
        for one, other in zip(found, expected, strict=True):
            close(one, other)


def four_dimensional(kind: str) -> Tensor:
    mask = torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(0)) < 0.6
    mask |= torch.eye(23, dtype=torch.bool)
    least = torch.finfo(torch.float32).min
    excluded = {"minimum": least, "infinity": -torch.inf, "a number": -1e9}
    if kind == "bool":
        return mask.to(DEVICE)
    return torch.zeros(mask.shape).masked_fill(~mask, excluded[kind]).to(DEVICE)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("kind", ["bool", "minimum", "infinity", "a number"])
def test_masks_of_four_dimensions(name, kind):
    eager, sparse = pair(name)
    found = sparse(tokens(), attention_mask=four_dimensional(kind)).logits
    close(found, eager(tokens(), attention_mask=four_dimensional("minimum")).logits)


@pytest.mark.parametrize("least", [1, 2])
def test_rows_without_keys_have_finite_gradients(least):
    """Sums of two minima are −inf; the sink is all that such a row has."""
    model = build("gpt_oss", "sparse_attn")
    mask = four_dimensional("minimum")
    mask[1, :, :5] = torch.finfo(torch.float32).min
    model(tokens(), attention_mask=least * mask, labels=tokens()).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(p.numel() == 4 and p.abs().max() > 0 for p in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_training_with_dropout_and_checkpointing():
    model = build("gpt_oss", "sparse_attn", attention_dropout=0.5).train()
    ids, losses = tokens(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, attention_mask=padded(ids, "left"), labels=ids).loss
        model.zero_grad()
        loss.backward()
        losses.append(torch.stack([loss, *(p.grad.norm() for p in model.parameters())]))
    close(losses[1], losses[0])
    assert losses[0][0] != model.eval()(ids, attention_mask=padded(ids, "left"), labels=ids).loss


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_changed_after_construction(name):
    eager, sparse = pair(name)
    eager.set_attn_implementation("sparse_attn")
    assert torch.equal(eager(tokens()).logits, sparse(tokens()).logits)


def test_from_pretrained(tmp_path):
    sparse = build("mistral", "sparse_attn")
    sparse.save_pretrained(tmp_path)
    options = {"attn_implementation": "sparse_attn"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).to(DEVICE)
    assert torch.equal(loaded(tokens()).logits, sparse(tokens()).logits)


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_compile(name):
    """In one graph for every length; a mask of ones or a cache keeps it free of pairs."""
    eager, sparse = pair(name)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (23, 17):
        ids, mask = tokens(n=n), padded(tokens(n=n), "left")
        rows = mask.bool()
        found = compiled(ids, attention_mask=mask, use_cache=False).logits[rows]
        close(found, eager(ids, attention_mask=mask).logits[rows])


def test_missing_and_old(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.56.2")
        with pytest.raises(ImportError, match=r"expected transformers 4\.57 .* found 4\.56\.2"):
            register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"expected transformers 4\.57 .* found none"):
        register()


def test_registered_twice():
    before = transformers.AttentionInterface._global_mapping.copy()
    assert register() is None
    assert transformers.AttentionInterface._global_mapping == before
    assert inspect.getdoc(register)
