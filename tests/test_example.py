"""The long-text example: causal, resumable, and its baseline a proper code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from long_text.baseline import two_byte_bits  # noqa: E402
from long_text.data import load_corpus  # noqa: E402
from long_text.model import Config, build_model  # noqa: E402
from long_text.training import Settings, Trainer, load_checkpoint  # noqa: E402


@pytest.mark.parametrize("attention", ["sparse", "full"])
@pytest.mark.parametrize("t", [0, 1, 150, 299])
def test_no_logit_before_a_changed_byte_moves(t, attention):
    torch.manual_seed(0)
    model = build_model(Config(layers=3, width=32, heads=2, window=16, attention=attention))
    tokens = torch.randint(256, (1, 300))
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % 256
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_both_attentions_have_the_same_parameters():
    models = [build_model(Config(attention=kind)) for kind in ("sparse", "full")]
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]


def test_baseline_codes_uniform_bytes_in_eight_bits_and_learns_an_order():
    random = np.random.default_rng(0).integers(0, 256, 40000).astype(np.uint8)
    assert two_byte_bits(random[:30000], random[30000:]) == pytest.approx(8, abs=0.1)
    cycle = np.arange(40000).astype(np.uint8)
    assert two_byte_bits(cycle[:30000], cycle[30000:]) < 0.2


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path):
    corpus = load_corpus(None, 256)
    config = Config(layers=2, width=32, heads=2, window=16, buckets=64)
    settings = Settings(length=256, steps=6)
    whole, first, second = (Trainer(config, settings, corpus) for _ in range(3))
    expected = [whole.train_step() for _ in range(6)]
    losses = [first.train_step() for _ in range(3)]
    first.save(tmp_path / "checkpoint.pt")
    second.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    losses += [second.train_step() for _ in range(3)]
    assert losses == expected


def run(*arguments: str) -> str:
    command = [sys.executable, EXAMPLES / "train_long_text.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def test_whole_run(tmp_path):
    text = run("--length", "256", "--layers", "2", "--width", "32", "--heads", "2", "--window",
               "16", "--steps", "3", "--out", str(tmp_path), "--sample-bytes", "10")  # fmt: skip
    assert "two bytes of context" in text
    assert (tmp_path / "training.png").stat().st_size > 10000
    assert (tmp_path / "checkpoint.pt").exists()


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--attention", "--compare", "--resume", "--text"))
