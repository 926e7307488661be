"""The genome example: its reading of FASTA, its strands, its baseline, and whole runs."""

import gzip
import importlib.util
import sys
from functools import partial
from pathlib import Path

import example_scripts
import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, train_whole_and_resumed

sys.path.insert(0, str(EXAMPLES))

from dna.baseline import markov_bits, words
from dna.data import complement, load_genome, read_fasta, strand_batch
from dna.model import Config, DnaModel
from dna.plots import context_curve
from dna.training import Settings, Trainer
from long_text.data import Corpus, DataError
from long_text.training import load_checkpoint

LENGTH = 256
TINY = Config(length=LENGTH, layers=2, width=16, heads=2, window=8, landmark=64)


def random_bases(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, size).astype(np.uint8)


def genome() -> Corpus:
    bases = random_bases(2560 + LENGTH)
    return Corpus("random", bases[:-LENGTH], bases[-LENGTH:])


def fasta(path: Path, size: int = 4000) -> Path:
    letters = np.frombuffer(b"ACGT", np.uint8)[random_bases(size)].tobytes()
    path.write_bytes(b">a\n" + letters[:1000] + b"\n>b\nnN\n" + letters[1000:].lower() + b"\n")
    return path


def test_fasta_is_read_plain_and_gzipped(tmp_path):
    plain = fasta(tmp_path / "a.fa")
    packed = tmp_path / "a.fa.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert np.array_equal(read_fasta(path), random_bases(4000))


def test_what_cannot_be_used_says_why(tmp_path):
    with pytest.raises(DataError, match="cannot read --fasta"):
        read_fasta(tmp_path / "none.fa")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(bytes(1000))[:-5])
    with pytest.raises(DataError, match="cannot read --fasta"):
        read_fasta(tmp_path / "cut.gz")
    with pytest.raises(DataError, match="4000 bases, but --length 500 needs at least 5000"):
        load_genome(fasta(tmp_path / "a.fa"), 500)


def test_whole_windows_are_held_out(tmp_path):
    loaded = load_genome(fasta(tmp_path / "a.fa"), 150)
    assert len(loaded.held_out) == 300
    whole = np.concatenate([loaded.train, loaded.held_out])
    assert np.array_equal(whole, random_bases(4000))


def test_the_shipped_genome():
    if importlib.util.find_spec("pyrodigal") is None:
        with pytest.raises(DataError, match="pip install pyrodigal"):
            load_genome(None, 16384)
    else:
        loaded = load_genome(None, 16384)
        assert len(loaded.train) + len(loaded.held_out) == 2463666


def test_the_other_strand():
    bases = np.array([0, 0, 1, 3], np.uint8)  # AACT
    assert complement(bases).tolist() == [0, 2, 3, 3]  # AGTT
    assert np.array_equal(complement(complement(bases)), bases)


def test_batches_come_from_both_strands():
    bases = np.zeros(1000, np.uint8)
    firsts = {strand_batch(bases, 10, 1, step, seed=0)[0][0, 0].item() for step in range(20)}
    assert firsts == {0, 3}
    (x, y), again = (strand_batch(random_bases(999), 50, 2, 4, seed=1) for _ in range(2))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, again[0])


def test_words_are_numbers_to_the_base_of_four():
    assert words(np.array([1, 2, 3], np.uint8), 2).tolist() == [1, 1 * 4 + 2, 2 * 4 + 3]


def test_baseline_codes_noise_in_two_bits_and_learns_a_cycle():
    order, bits = markov_bits(random_bases(40000), random_bases(4000, seed=1))
    assert bits.mean() == pytest.approx(2, abs=0.02)
    cycle = np.tile(np.array([0, 1, 0, 2, 0, 3], np.uint8), 2000)
    order, bits = markov_bits(cycle[:9000], cycle[9000:])
    assert bits.shape == (3000,)
    assert bits.mean() < 0.05
    assert order >= 2


def test_baseline_is_a_code():
    """The four bases share one unit of probability after any context."""
    train, before = random_bases(3000), random_bases(9, seed=5)
    total = sum(
        2 ** -markov_bits(train, np.append(before, base).astype(np.uint8), range(1, 2))[1][-1]
        for base in range(4)
    )
    assert 0.8 < total < 1.2  # each base picks the strength that serves it


@pytest.mark.parametrize("t", [0, 1, 63, 64, 100, LENGTH - 1])
def test_no_logit_before_a_changed_base_moves(t):
    torch.manual_seed(0)
    model = DnaModel(TINY)
    torch.nn.init.normal_(model.output.weight)
    tokens = torch.randint(4, (1, LENGTH))
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % 4
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def test_heads_have_their_dilations_and_all_see_the_landmarks():
    mask = Config(length=600, window=2, landmark=200, heads=4, width=16).pattern(0)
    rows = mask.mask(600, heads=4)[:, 550]
    near = [torch.nonzero(row).flatten().tolist() for row in rows]
    assert near == [[0, 200, 400, 550 - 2 * d, 550 - d, 550] for d in (1, 3, 12, 48)]
    assert mask.mask(600, heads=4)[:, 400, :401].all()


def test_context_curve_covers_all_bases():
    bits = np.ones((3, 1000))
    middles, means = context_curve(bits)
    assert np.all(means == 1)
    assert np.all(np.diff(middles) > 0)
    bits[:, 0] = 5
    assert context_curve(bits)[1][0] > 1


def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path):
    def make():
        return Trainer(TINY, Settings(steps=6), genome())

    *_, expected, losses = train_whole_and_resumed(make, load_checkpoint, tmp_path)
    assert losses == expected


run = partial(example_scripts.run, "train_dna.py")


def test_whole_run(tmp_path):
    own = ("--out", str(tmp_path / "out"), "--fasta", str(fasta(tmp_path / "a.fa")))
    text = run("--length", "256", "--layers", "1", "--width", "16", "--heads", "2", "--steps", "2",
               *own)  # fmt: skip
    assert "bases of context" in text
    assert (tmp_path / "out" / "training.png").stat().st_size > 10000
    assert "Resuming at step 2 of 2" in run("--resume", *own)
    assert "--width 16, not 32" in run("--resume", *own, "--width", "32", status=2)


def test_help_names_the_options():
    text = run("--help")
    assert all(option in text for option in ("--fasta", "--landmark", "--resume", "--seed"))
