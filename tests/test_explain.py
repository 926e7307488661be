"""The explain example: its numbers against dense weights, and a whole run on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import sparse_attn

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "explain.py"
sys.path.insert(0, str(EXAMPLES))

from long_text import insight  # noqa: E402
from long_text.model import ATTENTIONS, Config, build_model  # noqa: E402

N = 90


def layers_of(attention: str) -> tuple[list, list[torch.Tensor]]:
    """The weights of each layer of a model, sparse and dense (heads, n, n)."""
    torch.manual_seed(0)
    model = build_model(Config(3, 32, 2, 8, attention=attention))
    for block in model.blocks:
        torch.nn.init.normal_(block.qkv.weight, std=0.3)  # far from uniform weights
    layers = insight.layer_weights(model, torch.randint(256, (N,)))
    return layers, [weights.to_dense()[0] for weights in layers]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_are_those_of_the_layers(attention):
    layers, dense = layers_of(attention)
    config = Config(3, 32, 2, 8, attention=attention)
    for number, matrix in enumerate(dense):
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, N))
        assert torch.equal(matrix > 0, config.pattern(number).mask(N).expand(2, -1, -1))
    assert len(layers) == 3


def test_rollout_is_the_product_of_dense_matrices():
    layers, dense = layers_of("longformer")
    product = torch.eye(N)
    for matrix in dense:
        product = (matrix.mean(0) + torch.eye(N)) / 2 @ product
    queries = [N - 1, 40, 0]
    rows = insight.rollout(layers, queries)
    torch.testing.assert_close(rows, product[queries])
    torch.testing.assert_close(rows.sum(1), torch.ones(3))


def test_profile_share_and_stretch():
    layers, dense = layers_of("longformer")
    for weights, matrix in zip(layers, dense, strict=True):
        profile, allowed = insight.distance_profile(weights, 1), weights.pattern.mask(N)
        for distance in range(N - 1):
            seen = allowed.diagonal(-distance)[1:]  # less key 0
            expected = matrix.diagonal(-distance, 1, 2)[:, 1:][:, seen].mean(1)
            torch.testing.assert_close(profile[:, distance], expected.to(profile), equal_nan=True)
        share = insight.share_of_first(weights, 1)
        torch.testing.assert_close(share, matrix[..., 0].mean(1).to(share))
        assert torch.equal(insight.stretch(weights, 20, 55), matrix[:, 20:55, 20:55])


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The script in a folder of its own, where no earlier run left a model."""
    package = Path(sparse_attn.__file__).parent.parent
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package)},
    )


TOY = {"layers": 2, "width": 32, "heads": 2, "window": 16, "steps": 3, "train-length": 256}


def test_whole_run(tmp_path):
    """Trains the first time, finds its own checkpoint the second, and both draw the same."""
    options = [word for name, value in TOY.items() for word in (f"--{name}", str(value))]
    options += ["--length", "300", "--queries", "299", "0", "--out", "out"]
    names, pictures = ("heads", "distances", "global", "rollout"), []
    for _ in range(2):
        done = run(tmp_path, *options)
        assert done.returncode == 0, done.stderr
        assert "300 bytes" in done.stdout
        files = [tmp_path / "out" / f"{name}.png" for name in names]
        assert all(path.stat().st_size > 8000 for path in files)
        pictures.append([imread(path) for path in files])
    assert "training" not in done.stdout
    for first, second in zip(*pictures, strict=True):
        # Not the same bits: matrix products round by where in memory their matrices lie.
        assert np.abs(first - second).mean() < 1e-3


def test_help_names_the_options(tmp_path):
    text = run(tmp_path, "--help").stdout
    assert all(option in text for option in ("--checkpoint", "--queries", "--stretch", "--seed"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--start", "99999999"], "--start"),
    ],
)
def test_wrong_options(tmp_path, arguments, words):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
