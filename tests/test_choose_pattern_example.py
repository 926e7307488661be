"""The example that chooses patterns: on a tiny model, on saved tensors, and wrong options."""

import pytest
import torch
from cases import Shape, inputs
from example_scripts import run

SCRIPT = "choose_pattern.py"
TINY = {"layers": 2, "width": 32, "heads": 2, "steps": 3, "length": 96, "samples": 2, "show": 4}


def test_model(tmp_path):
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    printed = [run(SCRIPT, *options, "--out", str(tmp_path)) for _ in range(2)]
    tables = [text[text.index("blocks.0") : text.index(str(tmp_path))] for text in printed]
    assert tables[0] == tables[1]  # the same seed
    lines = tables[0].splitlines()
    assert lines[1].split() == ["score", "mass", "error", "cost", "overhead", "pattern"]
    costs = [float(line.split()[3].rstrip("%")) for line in lines[2:6]]
    assert all(0 < cost <= 20 for cost in costs)
    bits = lines[lines.index("held-out bits per byte, without further training") + 1 :][:4]
    names = [line.split(maxsplit=1)[1] for line in bits]
    assert names[:3] == ["full", "the best above", "blocks by gradient"]
    assert all(0 < float(line.split()[0]) < 9 for line in bits)
    assert (tmp_path / "patterns.png").read_bytes().startswith(b"\x89PNG")


def test_tensors(tmp_path):
    path = tmp_path / "tensors.pt"
    query, key, value = (x.cpu() for x in inputs(Shape(n_q=90, head_dim=8, kv_heads=2)))
    torch.save({"query": query, "key": key, "value": value}, path)
    options = ["--tensors", str(path), "--causal", "--budget", "0.3", "--show", "3"]
    text = run(SCRIPT, *options, "--out", str(tmp_path))
    table = text[text.index(str(path)) :].splitlines()[2:5]
    assert all(float(line.split()[3].rstrip("%")) <= 30 for line in table)
    assert (tmp_path / "patterns.png").stat().st_size > 8000


def test_help_names_the_options():
    text = run(SCRIPT, "--help")
    assert all(word in text for word in ("--budget", "--tensors", "--seed", "--out", "--steps"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensors", "nothing.pt"], "nothing.pt"),
        (["--budget", "-1"], "--budget"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ],
)
def test_wrong_options(arguments, words, tmp_path):
    assert words in run(SCRIPT, *arguments, "--out", str(tmp_path), status=2)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "tensors.pt"
    torch.save({"query": torch.zeros(1)}, path)
    text = run(SCRIPT, "--tensors", str(path), "--out", str(tmp_path), status=2)
    assert "expected a dict of query, key and value" in text
