"""The image example: causal, its coding one to one, its baseline a proper code, resumable."""

import sys
from functools import partial

import example_scripts
import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, train_whole_and_resumed

sys.path.insert(0, str(EXAMPLES))

from images.baseline import histogram_bits
from images.coding import residuals
from images.data import Photos, load_photos, training_crops
from images.model import Config, build_model
from images.training import Settings, Trainer
from long_text.training import load_checkpoint

SIDE = 12
TINY = Config(side=SIDE, layers=2, width=16, heads=2)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def photos() -> Photos:
    train = [noise(30, 20), noise(20, 40, seed=1)]
    return Photos("noise", train, list(noise(2, SIDE, SIDE, seed=2)))


@pytest.mark.parametrize("attention", ["split", "union", "full"])
@pytest.mark.parametrize("t", [0, 1, SIDE - 1, SIDE, 5 * SIDE + 7, SIDE**2 - 1])
def test_no_logit_up_to_a_changed_pixel_moves(t, attention):
    torch.manual_seed(0)
    model = build_model(Config(side=SIDE, layers=2, width=16, heads=2, attention=attention))
    torch.nn.init.normal_(model.output.weight)
    pixels = torch.from_numpy(noise(1, SIDE, SIDE).astype(np.int64))
    changed = pixels.clone()
    changed.view(-1)[t] = (changed.view(-1)[t] + 1) % 256
    with torch.inference_mode():
        before, after = model(pixels), model(changed)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert t == SIDE**2 - 1 or not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


def test_a_residual_tells_the_pixel():
    pixels = torch.from_numpy(noise(SIDE, SIDE).astype(np.int64))
    for row, column in ((0, 0), (0, 5), (3, 0), (7, 11)):
        found = set()
        for value in range(256):
            pixels[row, column] = value
            found.add(residuals(pixels)[row, column].item())
        assert found == set(range(256))


def test_baseline_codes_noise_in_eight_bits_and_a_ramp_in_few():
    held_out = list(noise(3, 32, 32, seed=3))
    bits = histogram_bits([noise(200, 200)], held_out)
    assert bits.shape == (3, 32, 32)
    assert bits.mean() == pytest.approx(8, abs=0.1)
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    assert histogram_bits([ramp], [ramp]).mean() < 0.5


def test_baseline_counts_on_while_it_codes():
    crop = np.zeros((8, 8), np.uint8)
    found = histogram_bits([noise(1, 1)], [crop]).ravel()
    assert np.all(np.diff(found[1:]) < 0)
    # The i-th zero after the first, each counted as it came: (i + 1/2) / (i + 128).
    assert found.sum() == pytest.approx(
        -sum(np.log2((i + 0.5) / (i + 128)) for i in range(64)), abs=2
    )


def test_training_crops_stay_out_of_the_held_out_part():
    loaded = load_photos(None, 96)
    whole = sum(image.shape[1] for image in loaded.train) + 102
    assert whole == 512
    assert len(loaded.held_out) == 6
    crops = training_crops(loaded.train, 96, 4, step=3, seed=5)
    assert crops.shape == (4, 96, 96)
    assert torch.equal(crops, training_crops(loaded.train, 96, 4, step=3, seed=5))
    assert not torch.equal(crops, training_crops(loaded.train, 96, 4, step=4, seed=5))


def test_recomputation_changes_no_number():
    kinds = (TINY, Config(**{**vars(TINY), "recompute": True}))
    losses = []
    for config in kinds:
        trainer = Trainer(config, Settings(batch=2, steps=4), photos())
        losses.append([trainer.train_step() for _ in range(4)])
    assert losses[0] == losses[1]


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path):
    def make():
        return Trainer(TINY, Settings(steps=6), photos())

    *_, expected, losses = train_whole_and_resumed(make, load_checkpoint, tmp_path)
    assert losses == expected


run = partial(example_scripts.run, "train_images.py")


def test_whole_run(tmp_path):
    out = ("--out", str(tmp_path))
    text = run("--side", "24", "--layers", "1", "--width", "16", "--heads", "2", "--steps", "2",
               "--check", *out, status=1)  # fmt: skip
    assert "adaptive histogram" in text
    assert (tmp_path / "training.png").stat().st_size > 10000
    assert "Resuming at step 2 of 2" in run("--resume", *out)
    assert "--width 16, not 32" in run("--resume", *out, "--width", "32", status=2)


def test_own_images(tmp_path):
    from matplotlib.image import imsave

    for i in range(3):
        imsave(tmp_path / f"{i}.png", noise(30, 40 + i, 3, seed=i))
    imsave(tmp_path / "small.png", noise(5, 40, 3))
    (tmp_path / "notes.txt").write_text("no image")
    loaded = load_photos(tmp_path, 16)
    assert [image.shape for image in loaded.train] == [(30, 41), (30, 42)]
    assert len(loaded.held_out) == 2
    text = run("--images", str(tmp_path), "--side", "31", status=2)
    assert "holds 0 images of at least 31 x 31" in text


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--attention", "--images", "--resume", "--recompute"))
