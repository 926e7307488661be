"""Patterns fitted to samples: against dense weights, dense autograd, and every other choice."""

import itertools
import math

import cases
import pytest
import torch
from cases import DEVICE, Shape
from torch.nn.functional import pad

from sparse_attn import (
    BlockLayout,
    Full,
    KeyLists,
    approximation_report,
    attention,
    fit_pattern,
    gradient_pattern,
)


def weights_of(query, key, causal=False, padding=None, scale=None):
    """Dense weights in float64; 0 for rows without a key."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    n_q, n_k = query.shape[2], key.shape[2]
    hidden = torch.zeros(n_q, n_k, dtype=torch.bool, device=DEVICE)
    if causal:
        hidden = torch.ones_like(hidden).triu(n_k - n_q + 1)
    if padding is not None:
        hidden = hidden | padding[:, None, None]
        key = key.masked_fill(padding[:, None, :, None], 0)
    logits = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    return logits.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)


def block_sums(scores, block):
    """(batch, heads, n_q, n_k) to the sums of blocks, over examples: (heads, nq, nk)."""
    n_q, n_k = scores.shape[2:]
    padded = pad(scores, (0, -n_k % block, 0, -n_q % block)).sum(0)
    return padded.unflatten(2, (-1, block)).sum(3).unflatten(1, (-1, block)).sum(2)


def best_layout(sums, number, needed):
    """The needed blocks, then the largest, one after the other."""
    layout = needed.clone()
    order = sorted(
        itertools.product(*map(range, sums.shape)), key=lambda place: (-sums[place].item(), place)
    )
    for place in order:
        if layout[place[0]].sum() < number:
            layout[place] = True
    return layout


def best_of_rows(sums):
    return torch.zeros_like(sums, dtype=torch.bool).scatter(2, sums.argmax(2, keepdim=True), True)


def inputs(n_q, n_k=None, *, seed=0, heads=2, kv_heads=None, sharpness=4.0, dtype=torch.float64):
    shape = Shape(n_q=n_q, n_k=n_k, head_dim=8, heads=heads, kv_heads=kv_heads)
    query, key, value = cases.inputs(shape, dtype, seed)
    return query * sharpness, key, value


@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (61, 61), (30, 67), (67, 30), (5, 5)])
@pytest.mark.parametrize("block", [1, 7, 16, 100])
def test_layout_is_that_of_dense_weights(n_q, n_k, block):
    samples = [inputs(n_q, n_k, seed=seed)[:2] for seed in range(3)]
    sums = sum(block_sums(weights_of(*sample), block) for sample in samples)
    for density in (0.01, 0.3, 0.77, 1.0):
        pattern = fit_pattern(iter(samples), block, density)
        assert isinstance(pattern, BlockLayout)
        assert pattern.block == block
        number = int(density * sums[0].numel() + 1e-9)
        expected = best_layout(sums, number, best_of_rows(sums))
        assert torch.equal(pattern.layout, expected)


@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (61, 61), (30, 67), (67, 30)])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_causal(n_q, n_k, block):
    samples = [inputs(n_q, n_k, seed=seed)[:2] for seed in range(2)]
    sums = sum(block_sums(weights_of(*sample, causal=True), block) for sample in samples)
    visible = block_sums(torch.ones(1, 2, n_q, n_k, device=DEVICE).tril(n_k - n_q), block)[0] > 0
    own = torch.eye(n_k, device=DEVICE)[n_k - n_q :] if n_q <= n_k else None
    if own is None:
        own = pad(torch.eye(n_k, device=DEVICE), (0, 0, n_q - n_k, 0))
    needed = block_sums(own.expand(1, 2, n_q, n_k), block) > 0
    for density in (0.2, 0.6, 1.0):
        pattern = fit_pattern(samples, block, density, is_causal=True)
        assert pattern.causal
        layout = pattern.parts[0].layout
        number = max(int(density * visible.sum() + 1e-9), int(needed[0].sum()))
        expected = best_layout(sums.masked_fill(~visible, -1), number, needed)
        assert torch.equal(layout, expected)
        assert not layout[:, ~visible].any()
        seen = pattern.mask(n_q, n_k, heads=2).any(-1)
        assert seen[:, max(0, n_q - n_k) :].all()


def test_no_layout_keeps_more():
    """Every choice of so many blocks with one in each row, tried."""
    samples = [inputs(12, 12, heads=1, seed=seed)[:2] for seed in range(2)]
    sums = sum(block_sums(weights_of(*sample), 4) for sample in samples)[0].flatten()
    pattern = fit_pattern(samples, 4, 5 / 9)
    kept = sums[pattern.layout.flatten()].sum()
    others = [
        sums[list(choice)].sum()
        for choice in itertools.combinations(range(9), 5)
        if {place // 3 for place in choice} == {0, 1, 2}
    ]
    assert len(others) == 108
    assert kept == max(others)


def test_planted_structure_is_found():
    """Each query attends to the tokens of its topic; topics are scattered, other ones per head."""
    n, block = 128, 8
    topics = cases.numbers(2, n // block, below=4)
    directions = torch.eye(8, dtype=torch.float64, device=DEVICE)
    of_tokens = directions[topics].repeat_interleave(block, 1)[None]
    planted = topics[:, :, None] == topics[:, None]
    samples = [
        tuple(20 * of_tokens + cases.normal(1, 2, n, 8, seed=seed + 10 * part) for part in (0, 1))
        for seed in range(2)
    ]
    for head in range(2):
        density = planted[head].double().mean().item()
        pattern = fit_pattern(samples, block, density)
        assert torch.equal(pattern.layout[head], planted[head])


def test_keeps_more_than_a_window_of_the_same_density():
    query, key, value = inputs(96, sharpness=2.0)
    window = torch.ones(12, 12, device=DEVICE).tril(1).triu(-1).bool()
    fitted = fit_pattern([(query, key)], 8, window.double().mean().item())
    assert fitted.layout[0].sum() == window.sum()
    reports = [
        approximation_report(query, key, value, pattern)
        for pattern in (fitted, BlockLayout(window, 8))
    ]
    for ours, others in zip(*(report.mass_per_head for report in reports), strict=True):
        assert ours > others


def test_padding_scale_and_grouped_queries():
    query, key, _ = inputs(50, heads=4, kv_heads=2)
    padding = cases.padding(2, 50)
    sums = block_sums(weights_of(query, key, padding=padding, scale=0.9), 8)
    expected = best_layout(sums, int(0.4 * 49), best_of_rows(sums))
    key = key.masked_fill(padding[:, None, :, None], math.nan)
    sample = {"query": query, "key": key, "key_padding_mask": padding}
    for given, options in (
        (sample, {"scale": 0.9, "enable_gqa": True}),
        ({**sample, "scale": 0.9, "enable_gqa": True}, {}),
    ):
        assert torch.equal(fit_pattern([given], 8, 0.4, **options).layout, expected)


def test_queries_left_out():
    query, key, _ = inputs(50)
    left_out = cases.padding(2, 50)
    weights = weights_of(query, key).masked_fill(left_out[:, None, :, None], 0)
    sums = block_sums(weights, 8)
    query = query.masked_fill(left_out[:, None, :, None], math.nan)
    sample = {"query": query, "key": key, "query_padding_mask": left_out}
    expected = best_layout(sums, int(0.4 * 49), best_of_rows(sums))
    assert torch.equal(fit_pattern([sample], 8, 0.4).layout, expected)


def test_samples_of_other_lengths():
    long, short, empty = inputs(40)[:2], inputs(23, seed=1)[:2], inputs(0)[:2]
    sums = block_sums(weights_of(*long), 8)
    sums[:, :3, :3] += block_sums(weights_of(*short), 8)
    expected = best_layout(sums, 10, best_of_rows(sums))
    for samples in itertools.permutations([long, short, empty]):
        assert torch.equal(fit_pattern(samples, 8, 0.4).layout, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_autocast_and_gradients(dtype):
    query, key, _ = inputs(50, dtype=dtype)
    expected = fit_pattern([(query.float(), key.float())], 8, 0.4)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pattern = fit_pattern([(query.requires_grad_(), key)], 8, 0.4)
    assert torch.equal(pattern.layout, expected.layout)


def with_gradient(n_q, n_k=None, *, causal=False, padding=None, seed=0, **options):
    """query, key, value, grad_output of some loss, and |w · ∂loss/∂w| by dense autograd."""
    query, key, value = inputs(n_q, n_k, seed=seed, **options)
    weights = weights_of(query, key, causal, padding).requires_grad_()
    groups = query.shape[1] // key.shape[1]
    known = value if padding is None else value.masked_fill(padding[:, None, :, None], 0)
    output = weights @ known.repeat_interleave(groups, 1)
    loss = output.pow(3).mean() + output.logsumexp(-1).mean()
    slopes, grad_output = torch.autograd.grad(loss, (weights, output))
    return (query, key, value, grad_output), (weights * slopes).abs().detach()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_gradients(causal, block):
    samples, importance = zip(
        *(with_gradient(45, causal=causal, seed=seed) for seed in range(2)), strict=True
    )
    sums = sum(block_sums(x, block) for x in importance)
    pattern = gradient_pattern(samples, block, 0.3, is_causal=causal)
    ones = torch.ones(1, 2, 45, 45, device=DEVICE)
    visible = block_sums(ones.tril() if causal else ones, block)[0] > 0
    diagonal = torch.eye(visible.shape[0], device=DEVICE).bool().expand(2, -1, -1)
    needed = diagonal if causal else best_of_rows(sums)
    number = max(int(0.3 * visible.sum() + 1e-9), int(needed[0].sum()))
    layout = pattern.parts[0].layout if causal else pattern.layout
    assert torch.equal(layout, best_layout(sums.masked_fill(~visible, -1), number, needed))


def test_gradients_keys_padding_and_grouped_queries():
    padding = cases.padding(2, 41)
    sample, importance = with_gradient(33, 41, padding=padding, heads=4, kv_heads=2)
    query, key, value, grad_output = sample
    sample = {
        "query": query,
        "key": key.masked_fill(padding[:, None, :, None], math.inf),
        "value": value.masked_fill(padding[:, None, :, None], math.nan),
        "grad_output": grad_output,
        "key_padding_mask": padding,
        "enable_gqa": True,
    }
    pattern = gradient_pattern([sample], keys=5)
    assert isinstance(pattern, KeyLists)
    assert pattern.indices.shape == (4, 33, 5)
    order = importance.sum(0).sort(descending=True, stable=True).indices[..., :5]
    assert torch.equal(pattern.indices, order)
    assert gradient_pattern([sample], keys=99).indices.shape == (4, 33, 41)


def test_gradients_of_queries_left_out():
    (query, key, value, grad_output), importance = with_gradient(33)
    left_out = cases.padding(2, 33)
    rows = left_out[:, None, :, None]
    sample = {
        "query": query.masked_fill(rows, math.nan),
        "key": key,
        "value": value,
        "grad_output": grad_output.masked_fill(rows, math.inf),
        "query_padding_mask": left_out,
    }
    sums = block_sums(importance.masked_fill(rows, 0), 8)
    expected = best_layout(sums, int(0.4 * 25), best_of_rows(sums))
    assert torch.equal(gradient_pattern([sample], 8, 0.4).layout, expected)


def test_causal_keys():
    sample, importance = with_gradient(20, causal=True)
    pattern = gradient_pattern([sample], keys=4, is_causal=True)
    allowed = pattern.mask(20, heads=2)
    assert pattern.causal
    counts = torch.arange(1, 21).clamp(max=4)
    assert torch.equal(allowed.sum(-1), counts.expand(2, -1))
    best = importance.sum(0)[:, 3:].topk(4).indices.sort(-1).values
    assert torch.equal(allowed[:, 3:].nonzero()[:, 2].view(2, 17, 4), best.cpu())
    output = attention(*sample[:3], pattern)
    assert output.isfinite().all()


def test_important_is_not_the_same_as_attended():
    """A key that takes all attention but whose value changes nothing is not important."""
    query, key, value = inputs(30, sharpness=1.0)
    query[..., 0], key[..., 0, 0] = 8, 8  # everyone looks at key 0
    value[..., 0, :] = 0
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, Full())
    (grad_output,) = torch.autograd.grad(output.square().sum(), output)
    sample = (query, key, value, grad_output)
    assert (fit_pattern([sample], 1, 1 / 30).layout.nonzero()[:, 2] == 0).all()
    assert (gradient_pattern([sample], keys=3).indices != 0).all()


@pytest.mark.parametrize(
    ("samples", "options", "error", "words"),
    [
        ([], {}, ValueError, "samples with a query and a key, got none"),
        (torch.zeros(2, 2, 9, 8), {}, TypeError, "iterable"),
        ({"query": 1}, {}, TypeError, "iterable"),
        ([torch.zeros(2, 2, 9, 8)], {}, TypeError, "a sample to be"),
        ([(torch.zeros(2, 2, 9, 8), None)], {}, TypeError, "key of a sample"),
        ([{"query": torch.zeros(2, 2, 9, 8)}], {}, TypeError, "key of a sample"),
        ([{"query": 1, "keys": 2}], {}, ValueError, "got keys"),
        ([(torch.zeros(2, 2, 9, 8), torch.zeros(2, 1, 9, 8))], {}, ValueError, "key of shape"),
        ("alike", {}, ValueError, "alike"),
        ("shifted", {"is_causal": True}, ValueError, "n_k - n_q = 0, got 2"),
        ("told", {"is_causal": True}, ValueError, "is_causal=True, got one with False"),
        ("one", {"density": 0.0}, ValueError, r"density in \(0, 1\], got 0.0"),
        ("one", {"density": 1.01}, ValueError, "density"),
        ("one", {"density": math.nan}, ValueError, "density"),
        ("one", {"density": "all"}, TypeError, "density"),
        ("one", {"block": 0}, ValueError, "block"),
        ("one", {"block": 1.5}, TypeError, "block"),
        ("one", {"is_causal": "yes"}, TypeError, "is_causal"),
    ],
)
def test_errors(samples, options, error, words):
    if isinstance(samples, str):
        one = inputs(9)[:2]
        other = {
            "alike": inputs(9, heads=4)[:2],
            "shifted": inputs(7, 9)[:2],
            "told": {"query": one[0], "key": one[1], "is_causal": False},
            "one": one,
        }
        samples = [one, other[samples]]
    with pytest.raises(error, match=words):
        fit_pattern(samples, **{"block": 4, "density": 0.5, **options})


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {}, "exactly one of density and keys"),
        ({}, {"density": 0.5, "keys": 3}, "exactly one of density and keys"),
        ({}, {"block": 4, "keys": 3}, "block to be 1"),
        ({}, {"keys": 0}, "keys to be at least 1"),
        ({"grad_output": None}, {"density": 0.5}, "samples with grad_output"),
        ({"value": None}, {"density": 0.5}, "samples with value"),
        ({"grad_output": torch.zeros(2, 2, 9, 7)}, {"density": 0.5}, "grad_output of shape"),
    ],
)
def test_errors_of_gradients(change, options, words):
    names = ("query", "key", "value", "grad_output")
    sample = dict(zip(names, with_gradient(9)[0], strict=True)) | change
    with pytest.raises(ValueError, match=words):
        gradient_pattern([sample], **options)


def test_threads_do_not_matter():
    samples = [inputs(300, seed=seed)[:2] for seed in range(2)]
    layouts = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layouts.append(fit_pattern(samples, 8, 0.3).layout)
    torch.set_num_threads(1)
    assert torch.equal(*layouts)


def test_fitted_patterns_run():
    query, key, value = inputs(50)
    for pattern in (
        fit_pattern([(query, key)], 8, 0.4),
        fit_pattern([(query, key)], 8, 0.4, is_causal=True),
    ):
        allowed = pattern.mask(50, heads=2)
        output = attention(query, key, value, pattern)
        weights = weights_of(query, key).masked_fill(~allowed.to(DEVICE), 0)
        expected = weights / weights.sum(-1, keepdim=True) @ value
        assert torch.allclose(output, expected)
