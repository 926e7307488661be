"""The long-text example: causal, resumable, and its baseline a proper code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, train_whole_and_resumed

SCRIPT = EXAMPLES / "train_long_text.py"
sys.path.insert(0, str(EXAMPLES))

from long_text import compare  # noqa: E402
from long_text.baseline import two_byte_bits  # noqa: E402
from long_text.data import load_corpus  # noqa: E402
from long_text.model import ATTENTIONS, Config, Memory, build_model  # noqa: E402
from long_text.sample import generate  # noqa: E402
from long_text.training import Settings, Trainer, load_checkpoint  # noqa: E402

from sparse_attn import Causal, Global, Window  # noqa: E402

TOY = {"layers": 2, "width": 32, "heads": 2, "window": 16}


@pytest.mark.parametrize("attention", ATTENTIONS)
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


def test_all_attentions_have_the_same_parameters():
    models = [build_model(Config(attention=kind)) for kind in ATTENTIONS]
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in models]
    assert all(other == shapes[0] for other in shapes)


def test_the_default_model_is_longformers():
    patterns = [Config().pattern(layer) for layer in range(4)]
    windows = [Window(128, 0, dilation=dilation) for dilation in (1, 1, 2, 4)]
    assert patterns == [(window | Global([0])) & Causal() for window in windows]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_pattern_is_causal_at_a_like_cost(attention):
    config = Config(attention=attention)
    assert all(config.pattern(layer).causal for layer in range(config.layers))
    keys = config.keys_per_query(4096)
    assert keys == 2048.5 if attention == "full" else 120 < keys < 200


REMEMBERED = [kind for kind in ATTENTIONS if kind != "bigbird"]


@pytest.mark.parametrize("attention", REMEMBERED)
def test_a_memory_gives_the_logits_of_the_whole_text(attention):
    torch.manual_seed(0)
    model = build_model(Config(layers=3, width=32, heads=2, window=16, attention=attention))
    model, tokens = model.double(), torch.randint(256, (2, 200))
    memory = Memory(model, batch=2)
    with torch.no_grad():
        cuts = tokens.split([50, 1, 1, 1, 40, 1, 106], 1)
        steps = torch.cat([model(cut, memory) for cut in cuts], 1)
        torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-12)
    assert memory.length == 200


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sample_is_the_one_of_the_whole_text(attention):
    """The same bytes as when the whole text is read again for each."""
    torch.manual_seed(0)
    model = build_model(Config(layers=2, width=32, heads=2, window=8, attention=attention))
    model = model.double()
    for parameter in model.parameters():  # of a size at which attention tells in the bytes
        torch.nn.init.normal_(parameter, std=0.2)
    ours = generate(model, b"The ", 100, seed=3)
    text, random = list(b"The "), torch.Generator().manual_seed(3)
    for _ in range(100):
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0, -1] / 0.8
        likely, order = logits.softmax(-1).sort(descending=True)
        likely = likely.masked_fill(likely.cumsum(-1) - likely >= 0.95, 0)
        text.append(int(order[torch.multinomial(likely, 1, generator=random)]))
    assert ours == bytes(text[4:])
    assert len(set(ours)) > 30


@pytest.mark.parametrize("attention", ["window", "longformer"])
def test_a_memory_does_not_grow(attention):
    model = build_model(Config(layers=2, width=32, heads=2, window=16, attention=attention))
    memory = Memory(model, batch=1)
    sizes = []
    with torch.no_grad():
        for _ in range(4):
            model(torch.randint(256, (1, 500)), memory)
            sizes.append([cache.nbytes for cache in memory.caches])
    assert sizes[1:] == sizes[:-1]


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="'sparse'"):
        Config(attention="sparse")


def test_baseline_codes_uniform_bytes_in_eight_bits_and_learns_an_order():
    random = np.random.default_rng(0).integers(0, 256, 40000).astype(np.uint8)
    assert two_byte_bits(random[:30000], random[30000:]) == pytest.approx(8, abs=0.1)
    cycle = np.arange(40000).astype(np.uint8)
    assert two_byte_bits(cycle[:30000], cycle[30000:]) < 0.2


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path):
    corpus = load_corpus(None, 256)
    config, settings = Config(**TOY, buckets=64), Settings(length=256, steps=6)

    def make() -> Trainer:
        return Trainer(config, settings, corpus)

    whole, second, expected, losses = train_whole_and_resumed(make, load_checkpoint, tmp_path)
    assert losses == expected
    assert second.history.train == whole.history.train == expected
    assert second.history.gradient_norms == whole.history.gradient_norms
    assert all(norm > 0 for norm in whole.history.gradient_norms)


def test_training_without_a_checkpoint_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = load_corpus(None, 256)
    trainer = Trainer(Config(**TOY, buckets=64), Settings(length=256, steps=9), corpus)
    result = compare.measure(trainer)
    assert len(result["train"]) == len(result["gradient_norms"]) == 9
    assert not trainer.history.held_out
    assert 0 < result["bits"] < 9
    assert result["peak"] >= result["training"] >= 0
    assert not list(tmp_path.iterdir())


OPTIONS = [word for name, value in TOY.items() for word in (f"--{name}", str(value))]
OPTIONS += ["--length", "256", "--steps", "3"]


def test_comparison(tmp_path, capsys):
    """Each attention in a process of its own, with the user's options, on one table."""
    kinds = ("full", "bigbird")
    assert compare.compare(SCRIPT, OPTIONS, tmp_path, 2.5, kinds) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert all(word in head for word in ("bits/byte", "s/step", "seconds", "peak MiB"))
    assert [row.split()[0] for row in rows[:2]] == list(kinds)
    assert rows[0].split()[3] == "+0.000"
    results = json.loads((tmp_path / "compare.json").read_text())["attention"]
    assert all(len(results[kind]["train"]) == 3 for kind in kinds)
    assert (tmp_path / "compare.png").stat().st_size > 10000


def test_comparison_stops_where_a_run_fails(tmp_path):
    wrong = [*OPTIONS, "--width", "33"]
    assert compare.compare(SCRIPT, wrong, tmp_path, 2.5) == 2
    assert not list(tmp_path.iterdir())


def run(*arguments: str) -> str:
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def test_whole_run(tmp_path):
    text = run(*OPTIONS, "--out", str(tmp_path), "--sample-bytes", "10")
    assert "two bytes of context" in text
    assert (tmp_path / "training.png").stat().st_size > 10000
    assert (tmp_path / "checkpoint.pt").exists()


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--attention", "--compare", "--resume", "--text"))
