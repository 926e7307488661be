"""Random patterns: the published generator, the law they promise, and the same draw everywhere."""

import hashlib
import random
import subprocess
import sys

import cases
import numpy as np
import pytest
import torch
from cases import Shape
from philox import philox

from sparse_attn import BigBird, PerHead, RandomBlocks, RandomTokens, Window, attention

# philox4x32 with 10 rounds, of the file kat_vectors of Random123: counter, key, words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_reference_generator_is_the_published_one(counter, key, words):
    assert tuple(philox(counter, key).tolist()) == words


SEEDS = [0, 1, 7, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "kind", ["RandomTokens(0.37, seed={})", "RandomBlocks(3, 7, seed={})", "BigBird(5, seed={})"]
)
def test_all_bits_of_a_seed_count(kind, seed):
    expression = kind.format(seed)
    assert torch.equal(
        cases.library(expression).mask(90, 83, heads=4), cases.mask(expression, 90, 83)
    )
    other = cases.library(kind.format(seed - 1 if seed > 0 else seed + 1))
    assert not torch.equal(cases.library(expression).mask(90), other.mask(90))


def pairs(keep_prob: float, seed: int = 0, n: int = 1000) -> np.ndarray:
    return RandomTokens(keep_prob, seed).mask(n).numpy()


@pytest.mark.parametrize("keep_prob", [0.001, 0.1, 0.5, 0.93])
def test_share_of_tokens(keep_prob):
    """Within five standard deviations: all pairs, every row, every column, every diagonal."""
    kept, n = pairs(keep_prob), 1000
    deviation = np.sqrt(keep_prob * (1 - keep_prob))
    assert abs(kept.mean() - keep_prob) < 5 * deviation / n
    for counts in (kept.sum(0), kept.sum(1)):
        assert np.abs(counts - n * keep_prob).max() < 5 * deviation * np.sqrt(n) + 1
        # They spread as independent draws do: a binomial's variance, itself known to 5 √(2 / n).
        assert counts.var() == pytest.approx(n * deviation**2, rel=5 * np.sqrt(2 / n))
    shares = [np.diagonal(kept, offset).mean() for offset in range(-500, 501)]
    assert np.abs(np.array(shares) - keep_prob).max() < 6 * deviation / np.sqrt(500) + 1 / 500


def test_no_and_all_tokens():
    assert not pairs(0).any()
    assert pairs(1).all()
    assert pairs(1 - 2**-32, n=300).all()


@pytest.mark.parametrize(
    "step", [(0, 1), (0, 2), (0, 4), (1, 0), (1, 1), (64, 0), (4, 64)], ids=str
)
def test_tokens_are_independent_of_their_neighbors(step):
    kept = pairs(0.3).astype(float)
    down, right = step
    a, b = kept[: kept.shape[0] - down, : kept.shape[1] - right], kept[down:, right:]
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**33, -1])
def test_tokens_of_two_seeds_are_independent(other):
    both = pairs(0.3, 0) & pairs(0.3, other)
    assert abs(both.mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91) / 1000


def test_more_tokens_hold_the_fewer():
    """One draw decides for every probability: a lower one takes from it, and adds nothing."""
    few, many = pairs(0.2), pairs(0.6)
    assert (many | ~few).all()


def drawn(seed: int, blocks_per_row: int, blocks: int) -> np.ndarray:
    """The (blocks, blocks) table of one draw."""
    return RandomBlocks(blocks_per_row, 1, seed).mask(blocks).numpy()


@pytest.mark.parametrize("blocks", [1, 2, 5, 64, 257])
@pytest.mark.parametrize("blocks_per_row", [0, 1, 3, 5, 64, 1000])
def test_blocks_are_distinct(blocks_per_row, blocks):
    expected = np.full(blocks, min(blocks_per_row, blocks))
    assert (drawn(0, blocks_per_row, blocks).sum(1) == expected).all()


@pytest.mark.parametrize("blocks_per_row", [1, 4, 30, 60])
def test_every_block_is_as_likely(blocks_per_row):
    """Pearson's χ² over the key blocks; neighbors are drawn together as often as any two."""
    blocks = 64
    tables = np.concatenate([drawn(seed, blocks_per_row, blocks) for seed in range(100)])
    share = blocks_per_row / blocks
    expected = len(tables) * share
    chi2 = ((tables.sum(0) - expected) ** 2 / expected).sum() / (1 - share)
    assert abs(chi2 - blocks) < 5 * np.sqrt(2 * blocks)
    together = (tables[:, :-1] & tables[:, 1:]).mean()
    exact = share * (blocks_per_row - 1) / (blocks - 1)
    assert abs(together - exact) < 5 * np.sqrt(exact / tables[:, 1:].size) + 1e-9


def test_rows_draw_for_themselves():
    """Two rows share r² / n blocks on average, whatever lies between them."""
    count, blocks = 8, 64
    for distance in (1, 2, 32):
        common = [
            (table[distance:] & table[:-distance]).sum(1)
            for table in (drawn(seed, count, blocks) for seed in range(40))
        ]
        mean, rows = np.concatenate(common).mean(), sum(map(len, common))
        assert abs(mean - count**2 / blocks) < 5 / np.sqrt(rows)


def test_bigbird_draws_as_random_blocks_do():
    random_part = RandomBlocks(3, 8, seed=4).mask(400)
    rest = BigBird(8, random_blocks=0).mask(400)
    assert torch.equal(BigBird(8, seed=4).mask(400), random_part | rest)


@pytest.mark.parametrize("pattern", [RandomTokens(0.2), RandomBlocks(2, 5), BigBird(5)], ids=repr)
def test_heads_and_examples_draw_alike(pattern):
    mask = pattern.mask(100, heads=3)
    assert torch.equal(mask, mask[:1].expand_as(mask))
    query, key, value = cases.inputs(Shape(n_q=100, batch=1, heads=1, head_dim=8))
    output = attention(*(x.expand(3, 4, -1, -1) for x in (query, key, value)), pattern)
    assert torch.equal(output, output[:1, :1].expand_as(output))


def test_seeds_make_heads_differ():
    mask = PerHead([RandomBlocks(2, 5, seed=s) for s in range(4)]).mask(100, heads=4)
    assert all(not torch.equal(mask[a], mask[b]) for a in range(4) for b in range(a))


RANDOM = [
    "RandomTokens(0.1, seed=3)",
    "RandomTokens(0.01, seed=3) | Window(5)",
    "RandomBlocks(3, 16, seed=3)",
    "(BigBird(16, seed=3) | RandomTokens(0.02)) & Causal()",
]

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_random_patterns
torch.set_num_threads(3)
print(*map(test_random_patterns.digest, test_random_patterns.RANDOM))
"""


def digest(expression: str) -> str:
    """Of the mask and of the bits of output and gradients."""
    pattern = cases.library(expression)
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(n_q=300, head_dim=16))]
    output = attention(*leaves, pattern)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    tensors = (pattern.mask(300), output.detach(), *gradients)
    return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in tensors)).hexdigest()


def test_another_process_with_more_threads_draws_alike():
    command = [sys.executable, "-c", PROGRAM.format(tests=sys.path[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(map(digest, RANDOM))


@pytest.mark.parametrize("expression", RANDOM)
def test_no_global_generator_is_touched(expression):
    def states() -> tuple[bytes, bytes, tuple]:
        numbers = np.random.get_state()
        return torch.get_rng_state().numpy().tobytes(), numbers[1].tobytes(), random.getstate()

    tensors = cases.inputs(Shape(n_q=150, head_dim=8))
    before = states()
    pattern = cases.library(expression)
    leaves = [x.requires_grad_() for x in tensors]
    attention(*leaves, pattern).sum().backward()
    pattern.mask(150)
    pattern.cost(150)
    assert states() == before


def test_global_generators_decide_nothing():
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append((RandomTokens(0.2) | RandomBlocks(1, 8) | Window(0)).mask(120))
    assert torch.equal(*draws)
