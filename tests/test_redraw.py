"""Random patterns drawn anew for each call, example and head."""

import cases
import pytest
import torch
from torch import Tensor

import sparse_attn
from sparse_attn import (
    BigBird,
    Causal,
    Mask,
    Pattern,
    PerHead,
    RandomBlocks,
    RandomTokens,
    SparseSelfAttention,
    Union,
    Window,
)

HEADS, N = 4, 48


def one_hot(batch: int, length: int = N) -> Tensor:
    """Tokens whose value tells which one it is, in every head."""
    return torch.eye(N, device=cases.DEVICE)[:length].repeat(batch, 1, HEADS)


def showing(pattern: Pattern, **options) -> SparseSelfAttention:
    """A layer that weighs all allowed keys alike, and shows them."""
    layer = SparseSelfAttention(HEADS * N, HEADS, pattern=pattern, device=cases.DEVICE, **options)
    with torch.no_grad():
        for projection in (layer.query, layer.key, layer.value, layer.output):
            projection.bias.zero_()
            projection.weight.copy_(torch.eye(HEADS * N))
        layer.query.weight.zero_()
    return layer


@torch.no_grad()
def seen(layer: SparseSelfAttention, batch: int = 3, **masks) -> Tensor:
    """The pairs of one call, (batch, heads, n_q, n_k)."""
    return layer(one_hot(batch), **masks).unflatten(-1, (HEADS, N)).transpose(1, 2) > 0


RANDOM = {
    "tokens": RandomTokens(0.2),
    "blocks": RandomBlocks(2, 4),
    "bigbird": BigBird(4, random_blocks=2),
    "union": Window(2) | RandomTokens(0.1),
    "causal": (Window(2) | RandomBlocks(2, 4, seed=5)) & Causal(),
}


@pytest.mark.parametrize("pattern", RANDOM.values(), ids=RANDOM)
def test_every_call_example_and_head_differ(pattern):
    layer = showing(pattern, redraw=True)
    masks = torch.cat([seen(layer), seen(layer.eval())]).flatten(0, 1)
    assert len({mask.cpu().numpy().tobytes() for mask in masks}) == 6 * HEADS


def test_what_is_not_random_stays():
    masks = seen(showing(RANDOM["causal"], redraw=True))
    ours = (Window(2) & Causal()).mask(N).to(masks.device)
    assert (masks | ~ours).all()
    assert not masks.triu(1).any()
    assert (masks.sum(-1) <= 3 + 8).all()


def test_the_share_is_kept():
    masks = seen(showing(RandomTokens(0.3), redraw=True), batch=20)
    deviation = (0.3 * 0.7 / masks.numel()) ** 0.5
    assert abs(masks.double().mean() - 0.3) < 5 * deviation
    rows = masks.double().mean((0, 1))
    assert (rows - 0.3).abs().max() < 5.5 * (0.3 * 0.7 / (20 * HEADS)) ** 0.5


@pytest.mark.parametrize("pattern", RANDOM.values(), ids=RANDOM)
def test_a_draw_is_one_of_the_patterns_own(pattern):
    """The pairs are those of the pattern with the seeds that torch's generator gives."""
    layer = showing(pattern, redraw=True)
    torch.manual_seed(3)
    masks = seen(layer)
    torch.manual_seed(3)
    seeds = torch.randint(2**63 - 1, (3, HEADS))
    for mask, seed in zip(masks.flatten(0, 1), seeds.flatten().tolist(), strict=True):
        assert torch.equal(mask.cpu(), pattern.reseeded(seed).mask(N))


def test_manual_seed_repeats_it():
    layer = showing(RandomTokens(0.2), redraw=True)
    calls = []
    for _ in range(2):
        torch.manual_seed(1)
        calls.append(seen(layer))
    assert torch.equal(*calls)


def test_without_redraw_all_are_alike():
    masks = seen(showing(RandomTokens(0.2)))
    assert (masks == masks[0, 0]).all()


def test_heads_with_patterns_of_their_own_keep_them():
    pattern = PerHead([RandomTokens(0.2), Window(1)])
    masks = seen(showing(pattern, redraw=True))
    assert (masks[:, 2:].cpu() == Window(1).mask(N)).all()
    assert len({mask.cpu().numpy().tobytes() for mask in masks[:, :2].flatten(0, 1)}) == 6


def test_padded_keys_are_seen_by_none_and_padding_draws_as_much():
    padding = torch.zeros(3, N, dtype=torch.bool, device=cases.DEVICE)
    padding[1, 30:] = True
    padding[2] = True
    masks = seen(showing(RandomTokens(0.5), redraw=True), key_padding_mask=padding)
    assert not masks[1, ..., 30:].any()
    assert not masks[2].any()
    assert 0.4 < masks[0].double().mean() < 0.6
    assert 0.4 < masks[1, ..., :30].double().mean() < 0.6


@pytest.mark.parametrize("padded", [False, True])
def test_queries_without_keys_give_no_nan(padded):
    """At 1 % of 48 keys most queries have none."""
    layer = SparseSelfAttention(16, 4, pattern=RandomTokens(0.01), redraw=True, device=cases.DEVICE)
    x = cases.normal(3, N, 16, dtype=torch.float32).requires_grad_()
    padding = torch.arange(N, device=cases.DEVICE).expand(3, N) > 20 if padded else None
    output = layer(x, key_padding_mask=padding)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *layer.parameters()))
    rows = (output - layer.output.bias).abs().amax(-1)
    assert 0.02 < (rows > 1e-6).double().mean() < 0.9


@pytest.mark.parametrize(("n_q", "n_k"), [(48, 7), (5, 48), (1, 1), (0, 9)])
def test_other_keys_than_queries(n_q, n_k):
    layer = showing(RandomTokens(0.5) | Window(0), redraw=True)
    query, key = one_hot(2, n_q), one_hot(2, n_k)
    output = layer(query, key, key)
    assert output.shape == query.shape
    assert output.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_no_examples(padded):
    layer = showing(RandomTokens(0.5), redraw=True)
    padding = torch.zeros(0, N, dtype=torch.bool, device=cases.DEVICE) if padded else None
    assert layer(one_hot(0), key_padding_mask=padding).shape == (0, N, HEADS * N)


def test_dropout_and_half_precision():
    layer = SparseSelfAttention(
        16, 4, pattern=RandomTokens(0.5), redraw=True, dropout=0.5, device=cases.DEVICE
    ).bfloat16()
    x = cases.normal(2, N, 16, dtype=torch.bfloat16)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_gradients():
    layer = SparseSelfAttention(
        8, 2, pattern=RandomTokens(0.4), redraw=True, device=cases.DEVICE, dtype=torch.float64
    )

    def same_draw(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return layer(x)

    x = cases.normal(2, 9, 8).requires_grad_()
    assert torch.autograd.gradcheck(same_draw, (x,))


def test_recomputation_draws_the_same():
    layer = showing(RandomTokens(0.2), redraw=True)
    x = one_hot(2).requires_grad_()
    torch.manual_seed(5)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    again, x.grad = x.grad, None
    torch.manual_seed(5)
    layer(x).square().sum().backward()
    assert torch.equal(again, x.grad)


def test_compiled_calls_draw_anew():
    layer = showing(RandomTokens(0.2), redraw=True)
    compiled = torch.compile(layer, backend="aot_eager")
    counted = torch._dynamo.utils.counters["stats"]
    seen(compiled)
    graphs = counted["unique_graphs"]
    masks = torch.cat([seen(compiled) for _ in range(4)]).flatten(0, 1)
    assert len({mask.cpu().numpy().tobytes() for mask in masks}) == len(masks)
    assert counted["unique_graphs"] == graphs


def test_plans_do_not_pile_up():
    sparse_attn.clear_plan_cache()
    layer = showing(RandomTokens(0.2), redraw=True)
    for _ in range(60):
        seen(layer)
    assert torch.ops.sparse_attn._plan_cache_size() <= 512


@pytest.mark.parametrize("pattern", [Window(3), Window(3) & Causal(), PerHead([Window(1)] * 2)])
def test_a_pattern_with_nothing_random_is_refused(pattern):
    with pytest.raises(ValueError, match="expected redraw=True with a pattern that is random"):
        SparseSelfAttention(16, 4, pattern=pattern, redraw=True)


def test_errors_speak_of_the_callers_shapes():
    layer, x = showing(RandomTokens(0.2), redraw=True), one_hot(3)
    padding = torch.zeros(3, N, dtype=torch.bool, device=cases.DEVICE)
    with pytest.raises(ValueError, match="key of batch 3, as query, got 2"):
        layer(x, x[:2], x[:2])
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \[3, 48\].*got \[2, 48\]"):
        layer(x, key_padding_mask=padding[:2])
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \[3, 48\].*got \[48\]"):
        layer(x, key_padding_mask=padding[0])
    with pytest.raises(TypeError, match="key_padding_mask to be a Tensor, got list"):
        layer(x, key_padding_mask=[False])
    with pytest.raises(TypeError, match="key_padding_mask of dtype bool"):
        layer(x, key_padding_mask=padding.float())
    with pytest.raises(ValueError, match="divides the 4 heads, got 3"):
        showing(PerHead([RandomTokens(0.2)] * 3), redraw=True)(x)


def test_it_shows_in_print():
    assert "redraw=True" in repr(showing(RandomTokens(0.2), redraw=True))
    assert "redraw" not in repr(showing(RandomTokens(0.2)))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_seeds_add_modulo_two_to_the_64(seed):
    for pattern in (RandomTokens(0.1, 7), RandomBlocks(2, 4, 7), BigBird(4, seed=7)):
        moved = pattern.reseeded(seed)
        assert type(moved) is type(pattern)
        assert (moved.seed - seed - 7) % 2**64 == 0


def test_parts_that_draw_apart_go_on_to():
    both = RandomTokens(0.5, seed=1) & RandomTokens(0.5, seed=2)
    assert 0.2 < both.reseeded(9).mask(100).double().mean() < 0.3


def test_what_is_not_random_is_equal_after_a_new_seed():
    mask = Mask(torch.ones(3, 3, dtype=torch.bool))
    for pattern in (Window(2), mask, Union((mask, Window(1))), PerHead([mask, Window(1)])):
        assert pattern.reseeded(1) == pattern


@pytest.mark.parametrize(
    ("seed", "error"), [(1.5, TypeError), ("1", TypeError), (2**63, ValueError)]
)
def test_a_seed_is_an_int_of_64_bits(seed, error):
    with pytest.raises(error, match="expected seed"):
        RandomTokens(0.1).reseeded(seed)
