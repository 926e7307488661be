"""Recommendations: planted structure wins, budgets hold, and what is said of each is true."""

import cases
import pytest
import torch
from cases import DEVICE, Shape

from sparse_attn import (
    BigBird,
    BlockLayout,
    Causal,
    Full,
    Global,
    GlobalKeys,
    PerHead,
    RandomTokens,
    Window,
    approximation_report,
    recommend_pattern,
)

N = 128


def planted(allowed, seed=0):
    """Query, key and value whose attention is nearly uniform over the pairs allowed, (heads, N, N),
    and nearly nothing elsewhere."""
    logits = 12.0 * allowed.to(DEVICE, torch.float64)[None]
    left, scales, right = torch.linalg.svd(logits)
    query, key = left * scales.sqrt()[..., None, :], right.mT * scales.sqrt()[..., None, :]
    value = cases.normal(1, allowed.shape[0], allowed.shape[-1], 16, seed=seed)
    return query * N**0.5, key, value


def of(expression, heads=2):
    return cases.mask(expression, N, heads=heads).expand(heads, -1, -1)


def share(pattern, dense=None):
    return pattern.cost(N).pairs / (dense or Full()).cost(N).pairs


@pytest.mark.parametrize(
    "expression",
    ["Window(6)", "Window(3, dilation=4)", "LocalBlocks(16)", "Window(3) | GlobalKeys([50])"],
)
def test_planted_pattern_wins(expression):
    inputs = planted(of(expression))
    pattern = cases.library(expression)
    others = [Window(2), Window(9, dilation=2), BigBird(4, random_blocks=1), RandomTokens(0.08)]
    best = recommend_pattern(*inputs, 0.2, [*others, pattern])[0]
    assert best.pattern == pattern
    assert best.mass > 0.98
    assert best.error < 0.05


def test_default_candidates_find_what_is_planted():
    """Window(6), and a key that everyone sees, from the data."""
    window = recommend_pattern(*planted(of("Window(6)")), share(Window(6)))
    found = next(result for result in window if result.pattern == Window(6))
    assert found.mass > 0.98
    keys = "Window(2) | GlobalKeys([50])"
    pattern = cases.library(keys)
    found = recommend_pattern(*planted(of(keys)), share(pattern))
    assert max(result.mass for result in found) > 0.98
    assert any(result.pattern == pattern for result in found)


def test_heads_get_their_own():
    """Each head has another structure: no pattern for both is as good as one for each."""
    allowed = torch.cat([of("Window(4)", 1), of("Window(4, dilation=8)", 1)])
    inputs = planted(allowed)
    budget = share(Window(4)) * 1.02
    best = recommend_pattern(*inputs, budget)
    per_head = next(result for result in best if isinstance(result.pattern, PerHead))
    assert per_head.pattern.patterns == (Window(4), Window(4, dilation=8))
    assert per_head is best[0]
    assert per_head.mass > 0.98


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("n_q", "n_k", "budget"),
    [(N, None, 0.15), (N, None, 1.0), (40, 90, 0.2), (90, 40, 0.2), (7, None, 0.5), (1, None, 1.0)],
)
def test_budget_and_numbers_hold(is_causal, n_q, n_k, budget):
    query, key, value = cases.inputs(Shape(n_q=n_q, n_k=n_k, head_dim=8, kv_heads=2))
    padding = cases.padding(2, key.shape[2])
    options = {"is_causal": is_causal, "key_padding_mask": padding, "enable_gqa": True}
    results = recommend_pattern(query, key, value, budget, **options)
    dense = (Causal() if is_causal else Full()).cost(n_q, n_k).pairs
    assert len({result.pattern for result in results}) == len(results) > 0
    assert [r.score for r in results] == sorted((r.score for r in results), reverse=True)
    for result in results:
        assert result.pattern.causal or not is_causal
        allowed = result.pattern.mask(n_q, n_k, heads=4).double()
        assert result.share == pytest.approx(allowed.sum().item() / 4 / dense)
        assert result.share <= budget * (1 + 1e-6)
        expected = (result.mass + 1 - min(result.error, 1)) / 2 - 0.05 * result.share / budget
        assert result.score == pytest.approx(expected)
        report = approximation_report(query, key, value, result.pattern, **options)
        assert report == result.report
        assert result.cost == result.report.cost


def test_many_kinds_are_tried():
    query, key, value = cases.inputs(Shape(n_q=300, head_dim=8, batch=1))
    for is_causal in (False, True):
        results = recommend_pattern(query, key, value, 0.2, is_causal=is_causal)
        words = str(results)
        names = ["Window(", "dilation=", "GlobalKeys(", "FirstLast(", "LocalBlocks(", "Radial("]
        names += ["BigBird(", "Checkerboard(", "BlockLayout("]
        names += ["Strided(", "Fixed("] if is_causal else []
        assert [name for name in names if name not in words] == []
        lines = words.splitlines()
        assert lines[0].split() == ["score", "mass", "error", "cost", "overhead", "pattern"]
        assert len(lines) == 1 + len(results)
        assert all(len(line) < 130 for line in lines)
        again = recommend_pattern(query, key, value, 0.2, is_causal=is_causal)
        assert str(again) == words


def test_equal_ones_by_cost():
    """Of patterns that keep the same the cheaper one comes first; order of candidates is kept."""
    inputs = planted(of("Window(2)"))
    results = recommend_pattern(*inputs, 0.9, [Window(30), Window(2), Window(8)])
    assert [result.pattern for result in results] == [Window(2), Window(8), Window(30)]


def test_causal_is_respected():
    query, key, value = cases.inputs(Shape(n_q=60, head_dim=8))
    candidates = [Window(5), Global([0]), Window(7, 0)]
    results = recommend_pattern(query, key, value, 0.5, candidates, is_causal=True)
    assert {result.pattern for result in results} == {
        Window(5) & Causal(),
        Global([0]) & Causal(),
        Window(7, 0),
    }
    assert all(result.report.reference == "Causal()" for result in results)


def test_samples_to_fit_to():
    """Layouts come from the samples, not from the inputs they are measured on."""
    near, far = of("Window(3)"), of("Window(3, dilation=16)")
    samples = [planted(near, seed=1)[:2]]
    results = recommend_pattern(*planted(far), 0.15, samples=samples)
    layouts = [r for r in results if isinstance(r.pattern, BlockLayout)]
    blocks = torch.arange(N // 4)
    beside = (blocks[:, None] - blocks).abs() <= 1
    finest = next(r for r in layouts if r.pattern.block == 4)
    assert finest.pattern.layout.cpu()[:, beside].all()
    assert finest.mass < 0.5
    with pytest.raises(ValueError, match="samples of 128 queries"):
        recommend_pattern(*planted(far), 0.15, samples=[tuple(x[:, :, :64] for x in samples[0])])


def test_sampled_queries():
    query, key, value = cases.inputs(Shape(n_q=200, head_dim=8, batch=1))
    results = recommend_pattern(query, key, value, 0.2, queries=20)
    for result in results:
        report = approximation_report(query, key, value, result.pattern, queries=20)
        assert report == result.report
        assert result.share <= 0.2
    layout = next(r.pattern for r in results if isinstance(r.pattern, BlockLayout))
    assert layout.layout[..., 1:].any()  # fitted to all queries


@pytest.mark.parametrize(
    ("budget", "candidates", "error", "words"),
    [
        (0.0, None, ValueError, r"budget in \(0, 1\]"),
        (1.5, None, ValueError, r"budget in \(0, 1\]"),
        ("half", None, TypeError, "budget"),
        (1e-9, None, ValueError, r"the cheapest, Window\(0\), takes 0.05"),
        (0.1, [Window(9), Window(5)], ValueError, r"the cheapest, Window\(5\), takes 0.475"),
        (0.1, [], ValueError, "at least one"),
        (0.1, Window(3), TypeError, "sequence of patterns"),
        (0.1, [Window(3), "window"], TypeError, "to be a Pattern"),
    ],
)
def test_errors(budget, candidates, error, words):
    with pytest.raises(error, match=words):
        recommend_pattern(*cases.inputs(Shape(n_q=20, head_dim=8)), budget, candidates)


def test_errors_of_inputs():
    query, key, value = cases.inputs(Shape(n_q=20, head_dim=8))
    with pytest.raises(ValueError, match="at least one token"):
        recommend_pattern(query[:, :, :0], key, value, 0.5)
    with pytest.raises(ValueError, match="value of shape"):
        recommend_pattern(query, key, value[:, :1], 0.5)
    with pytest.raises(TypeError, match="is_causal"):
        recommend_pattern(query, key, value, 0.5, is_causal=None)


def test_global_keys_are_those_with_most_attention():
    query, key, value = planted(of("GlobalKeys([17, 50, 51, 99])"))
    results = recommend_pattern(query, key, value, 0.1)
    assert any("GlobalKeys([17, 50, 51, 99])" in repr(r.pattern) for r in results)
    assert GlobalKeys([17, 50, 51, 99]).cost(N).pairs / N**2 < 0.1
