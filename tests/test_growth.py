"""The benchmarks of growth: fits, lengths, the search for the longest sequence, what they run."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show their progress with it")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import longest_sequence
from growth.child import Worker
from growth.fit import exponent, n_log_n
from growth.methods import METHODS, inputs, task
from tqdm import tqdm


def test_exponents_of_powers():
    lengths = [1000, 2500, 6000, 16000]
    for power in (0.5, 1.0, 1.5, 2.0):
        assert exponent(lengths, [3 * n**power for n in lengths]) == pytest.approx(power)
    # A fixed cost bends the line.
    assert exponent(lengths, [5000 + n for n in lengths]) < 0.8
    assert n_log_n(lengths) == pytest.approx(1 + 1 / math.log(4000), abs=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_the_gradients_of_their_leaves(name):
    method = METHODS[name]
    n = method.length(512)
    leaves, grad = inputs(method.leaves, 1, n, seed=0)
    (output,) = task(method, n, (leaves, grad), False)()
    again, *gradients = task(method, n, (leaves, grad), True)()
    assert output.shape == again.shape == grad.shape
    torch.testing.assert_close(output, again)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert all(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].pairs])
def test_pairs_grow_as_expected(name):
    method = METHODS[name]
    lengths = [method.length(n) for n in (2**13, 2**14)]
    pairs = [method.pairs(n) for n in lengths]
    assert exponent(lengths, pairs) == pytest.approx(method.time, abs=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_lengths_are_near(name):
    # The squares of 64, 80 and 96 are 4096, 6400 and 9216.
    for near in (5000, 6000, 16384):
        assert METHODS[name].length(near) == pytest.approx(near, rel=0.2)


@pytest.mark.parametrize("bound", [1100, 5000, 100_000])
def test_the_search_finds_the_longest(bound):
    class Measured:
        def at(self, index: int) -> dict:
            return {"peak": longest_sequence.tokens(index)}

    found = longest_sequence.longest(Measured(), lambda m: m["peak"] <= bound, tqdm(disable=True))
    n, longer = (longest_sequence.tokens(index) for index in (found, found + 1))
    assert n <= bound < longer
    assert longer <= 1.07 * n


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_memory_in_a_process_of_its_own():
    tensor = 4096 * 64 * 4
    with Worker("dense, materialized", heads=1, threads=1, seed=0) as worker:
        wide = worker.measure(4096, backward=True)
        # The peak of one step does not hide that of the next.
        narrow = worker.measure(1024, backward=True)
    pairs = 4096 * 4096 * 4
    assert wide["inputs"] == 4 * tensor
    assert 2 * pairs < wide["peak"] < 5 * pairs
    assert narrow["peak"] < wide["peak"] / 4
    assert wide["seconds"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory, reads /proc")
def test_a_step_without_room_is_broken_off():
    with Worker("dense, materialized", 1, 1, 0, ceiling=2**28) as worker:
        assert worker.measure(16384, backward=True) == {"error": "out of memory"}
        assert worker.measure(512, backward=True)["peak"] > 0


def test_a_step_without_end_is_broken_off():
    with Worker("dense, materialized", heads=1, threads=1, seed=0) as worker:
        assert worker.measure(8192, backward=True, limit=0.01) == {"error": "out of time"}
        assert worker.measure(512, backward=True, limit=60.0)["peak"] > 0
