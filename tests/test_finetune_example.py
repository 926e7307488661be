"""The fine-tuning example: its documents, and equal losses before and after the swap."""

import json
import sys
from functools import partial

import example_scripts
import pytest
import torch
from example_scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

from finetune.data import (
    CLS,
    EACH,
    FIRST_BYTE,
    HELD_OUT,
    KINDS,
    PAD,
    encode,
    load_documents,
)
from finetune.measure import Settings, accuracy, build_model, losses

import sparse_attn

TINY = Settings(length=300, window=32, layers=2, width=32, heads=2, steps=5)
OPTIONS = [word for name in ("length", "window", "layers", "width", "heads", "steps")
           for word in (f"--{name}", str(getattr(TINY, name)))]  # fmt: skip


@pytest.fixture(scope="module")
def documents():
    return load_documents(TINY.length, TINY.seed)


def test_a_document_is_the_end_of_a_file_behind_a_global_token():
    tokens = encode(b"abcdef", 4)
    assert tokens.tolist() == [CLS, *(FIRST_BYTE + byte for byte in b"def")]
    assert encode(b"ab", 5).tolist() == [CLS, FIRST_BYTE + 97, FIRST_BYTE + 98, PAD, PAD]


def test_every_kind_has_as_many_documents(documents):
    train, held_out = documents
    for part, each in ((train, EACH - HELD_OUT), (held_out, HELD_OUT)):
        assert torch.equal(part.labels.bincount(), torch.full((len(KINDS),), each))
        assert part.tokens.shape == (len(KINDS) * each, TINY.length)
    seen = {row.numpy().tobytes() for row in train.tokens}
    assert not seen & {row.numpy().tobytes() for row in held_out.tokens}
    again = load_documents(TINY.length, TINY.seed)
    assert torch.equal(again[0].tokens, train.tokens)


def test_the_swap_changes_no_loss(documents):
    runs = []
    for swap in (False, True):
        model = build_model(TINY).train()
        if swap:
            sparse_attn.huggingface.replace_attention(model)
            ours = [m for m in model.modules() if type(m).__module__.startswith("sparse_attn")]
            assert len(ours) == TINY.layers
        runs.append([loss for loss, _ in losses(model, documents[0], TINY)])
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-4, atol=1e-4)
    assert len(set(runs[0])) == TINY.steps


def test_accuracy_counts(documents):
    model = build_model(TINY)
    assert 0 <= accuracy(model, documents[1]) <= 1
    with torch.no_grad():
        model.classifier.out_proj.weight.zero_()
        model.classifier.out_proj.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert accuracy(model, documents[1]) == 1 / len(KINDS)


run = partial(example_scripts.run, "finetune_longformer.py")


def test_whole_run(tmp_path):
    text = run(*OPTIONS, "--out", str(tmp_path))
    assert "The losses differ by at most" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"original", "replaced"}
    assert all(len(result["losses"]) == TINY.steps for result in results.values())
    assert (tmp_path / "finetune.png").stat().st_size > 10000


def test_wrong_options_say_why(tmp_path):
    text = run(*OPTIONS, "--width", "33", "--out", str(tmp_path), status=2)
    assert "error" in text
    assert not list(tmp_path.iterdir())


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--steps", "--seed", "--window", "transformers"))
