"""Calls over ranks that go wrong, or that stand in something larger: the group stays of use, and
the numbers are those of the single process.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import cases
import pytest
import torch
import torch.distributed as dist
from ranks import JobError, Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_attn
from sparse_attn import (
    Global,
    GlobalQueries,
    LongformerSelfAttention,
    Mask,
    MultiheadAttention,
    PerHead,
    RandomTokens,
    SlotBias,
    Window,
)
from sparse_attn.distributed import context_parallel_attention, count_traffic, gather_sequence
from sparse_attn.functional import lsh_attention

pytestmark = pytest.mark.skipif(
    cases.DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="the ranks talk by gloo"
)


@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    pool.close()


def shard(x: Tensor, group: dist.ProcessGroup, dim: int = 2) -> Tensor:
    return x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]


def qkv(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [cases.normal(1, 2, n, 8, seed=seed, dtype=dtype) for seed in range(3)]


def close(ours: Tensor, exact: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, exact, rtol=0, atol=atol)


# ---- after an error -----------------------------------------------------------------------------

WRONG = {
    "scale": (ValueError, {"scale": float("nan")}),
    "softcap": (ValueError, {"softcap": -1.0}),
    "dropout_p": (ValueError, {"dropout_p": 1.5}),
    "number": (TypeError, {"scale": "1"}),
    "flag": (TypeError, {"enable_gqa": 1}),
    "bias": (ValueError, {"bias": torch.zeros(3)}),
    "columns": (ValueError, {"bias": torch.zeros(1, 1, 10, 3)}),
    "rows": (ValueError, {"bias": torch.zeros(1, 1, 11, 20)}),
    "padding": (ValueError, {"key_padding_mask": torch.zeros(1, 9, dtype=torch.bool)}),
    "padding_dtype": (TypeError, {"key_padding_mask": torch.zeros(1, 10)}),
    "global_mask": (ValueError, {"global_mask": torch.zeros(2, 10, dtype=torch.bool)}),
    "global_dtype": (TypeError, {"global_mask": torch.full((1, 10), 0.5)}),
    "sink": (ValueError, {"sink": torch.zeros(1)}),
    "sink_shape": (ValueError, {"sink": torch.zeros(2, 3)}),
    "sink_dtype": (TypeError, {"sink": torch.zeros(2, dtype=torch.int64)}),
    "heads": (ValueError, {"key_heads": 1}),
    "head_dim": (ValueError, {"key_dim": 4}),
    "value": (ValueError, {"value_length": 9}),
    "pattern": (ValueError, {"pattern": PerHead([Window(1)] * 3)}),
    "token": (ValueError, {"pattern": Window(1) | Global([20])}),
}


def on_ranks_after_an_error(group: dist.ProcessGroup, options: dict, lengths) -> list:
    """The messages of the same wrong call, twice, and whether a good one works then."""
    options = dict(options)
    pattern = options.pop("pattern", Window(3))
    heads, size = options.pop("key_heads", 2), options.pop("key_dim", 8)
    length = options.pop("value_length", 10)
    x = torch.randn(1, 2, 10, 8)
    key, value = torch.randn(1, heads, 10, size), torch.randn(1, heads, length, 8)
    found = []
    for _ in range(2):
        try:
            context_parallel_attention(x, key, value, pattern, group, lengths=lengths, **options)
            found.append(None)
        except (TypeError, ValueError) as error:
            found.append((type(error), str(error)))
    output = context_parallel_attention(x, x, x, Window(3), group, lengths=lengths)
    return [*found, output.isfinite().all().item()]


@pytest.mark.parametrize("lengths", [None, [10, 10]], ids=["told", "given"])
@pytest.mark.parametrize("name", WRONG)
def test_an_error_leaves_the_group_as_it_was(pool, name, lengths):
    error, options = WRONG[name]
    for first, second, works in pool.run(2, on_ranks_after_an_error, options, lengths):
        assert first[0] is error
        assert "expected" in first[1]
        assert second == first
        assert works


def on_ranks_one_is_wrong(group: dist.ProcessGroup, what: str) -> None:
    last = dist.get_rank(group) == 1
    x = torch.randn(1, 2, 10, 8)
    pattern, options, value = Window(3) | GlobalQueries([0]), {}, x
    if what == "global_mask":
        options["global_mask"] = torch.zeros(1 + last, 10, dtype=torch.bool)
    elif what == "global_mask_length":
        options["global_mask"] = torch.zeros(1, 10 + last, dtype=torch.bool)
    elif what == "key_padding_mask":
        options["key_padding_mask"] = torch.zeros(1, 10 - last, dtype=torch.bool)
    elif what == "value":
        value = x[:, :, : 10 - last]
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16, enabled=last):
            context_parallel_attention(x, x, x, pattern, group)
    elif what == "dropout_seed":
        options |= {"dropout_p": 0.5, "dropout_seed": torch.tensor(3 + last)}
    elif what == "sink":
        options["sink"] = torch.zeros(2 + last)
    elif what == "bias":
        options["bias"] = torch.zeros(2, 7, requires_grad=last)
    elif what == "heads of a bias":
        options["bias"] = torch.zeros(1, 1 + last, 10, 20)
    elif what == "layout":
        made = SimpleNamespace(block=5, num_heads=1)
        made.make_layout = lambda n: torch.ones(1, n // 5, n // 5).tril(-int(last))
        pattern = sparse_attn.Pattern.from_deepspeed(made)
    context_parallel_attention(x, x, value, pattern, group, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("global_mask", r"got none on rank 0 and sparse_attn: expected global_mask of shape"),
        ("global_mask_length", "got none on rank 0 and sparse_attn: expected global_mask of shape"),
        ("key_padding_mask", "sparse_attn: expected key_padding_mask of shape"),
        ("value", "sparse_attn: expected value with key's 10 tokens, got 9"),
        ("autocast", "the same autocast on all ranks, got None on rank 0 and torch.bfloat16"),
        ("dropout_seed", r"the same dropout_seed on all ranks, got \[3, 4\]"),
        ("sink", "the same sink on all ranks"),
        ("bias", "the same gradient of bias on all ranks, got False on rank 0 and True"),
        ("heads of a bias", "the same bias on all ranks"),
        ("layout", "the same layout of the pattern on all ranks"),
    ],
)
def test_one_rank_is_wrong(pool, what, message):
    with pytest.raises(JobError, match=message) as raised:
        pool.run(2, on_ranks_one_is_wrong, what)
    assert [error[0] for error in raised.value.errors] == ["ValueError"] * 2


def on_ranks_short_shard(group: dist.ProcessGroup) -> None:
    x, lengths = torch.randn(1, 2, 10, 8), [10, 10]
    context_parallel_attention(x, x, x, Window(3), group, lengths=lengths)
    x = x[:, :, 1:]
    context_parallel_attention(x, x, x, Window(3), group, lengths=lengths)


def test_shards_of_other_lengths_than_given(pool):
    with pytest.raises(JobError, match=r"that lengths says, \(10, 10\), got \(9, 9\)") as raised:
        pool.run(2, on_ranks_short_shard)
    assert [error[0] for error in raised.value.errors] == ["ValueError"] * 2


# ---- within something larger --------------------------------------------------------------------


def on_ranks_checkpoint(group: dist.ProcessGroup, pattern, reentrant: bool) -> list[Tensor]:
    leaves = [shard(x, group).clone().requires_grad_() for x in qkv(24)]
    attend = functools.partial(context_parallel_attention, group=group)
    output = checkpoint(attend, *leaves, pattern, use_reentrant=reentrant)
    output.sin().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pattern", [Window(3, 0), Window(3, 0) | Global([0])], ids=repr)
def test_checkpoint_of_attention_alone(pool, pattern, reentrant):
    """The first rank receives nothing, and must go as far as the others in the second pass."""
    leaves = [x.requires_grad_() for x in qkv(24)]
    output = sparse_attn.attention(*leaves, pattern)
    exact = [output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)]
    for world in (2, 3):
        parts = pool.run(world, on_ranks_checkpoint, pattern, reentrant)
        for ours, wanted in zip(zip(*parts, strict=True), exact, strict=True):
            close(torch.cat(ours, 2), wanted)


def on_ranks_causal_block(group: dist.ProcessGroup) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    layer = LongformerSelfAttention(16, 2, 8, causal=True, context_parallel_group=group).double()
    norm = nn.LayerNorm(16).double()
    x = shard(cases.normal(2, 40, 16), group, 1)
    output = x + checkpoint(lambda y: layer(norm(y))[0], x, use_reentrant=False)
    (output**2).sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    return output.detach(), gradients


def test_checkpoint_of_a_causal_layer(pool):
    torch.manual_seed(0)
    layer, norm = LongformerSelfAttention(16, 2, 8, causal=True).double(), nn.LayerNorm(16).double()
    x = cases.normal(2, 40, 16)
    output = x + layer(norm(x))[0]
    (output**2).sum().backward()
    parts = pool.run(3, on_ranks_causal_block)
    close(torch.cat([part[0] for part in parts], 1), output.detach(), 1e-11)
    for ours, parameter in zip(parts[0][1], layer.parameters(), strict=True):
        close(ours, parameter.grad, 1e-10)


def on_ranks_compiled(group: dist.ProcessGroup) -> Tensor:
    attend = functools.partial(context_parallel_attention, pattern=Window(5) | Global([0]))
    compiled = torch.compile(lambda *x: attend(*x, group=group) + 1, backend="eager")
    return compiled(*(shard(x, group) for x in qkv(30)))


def test_compiled_around(pool):
    ours = torch.cat(pool.run(2, on_ranks_compiled), 2)
    close(ours, sparse_attn.attention(*qkv(30), Window(5) | Global([0])) + 1)


def on_ranks_autocast(group: dist.ProcessGroup) -> tuple[Tensor, int]:
    tensors = [shard(x, group) for x in qkv(40, torch.float32)]
    tensors[1] = tensors[1].bfloat16()  # as autocast leaves what comes from a projection
    with torch.autocast("cpu", torch.bfloat16), count_traffic() as traffic:
        return context_parallel_attention(*tensors, Window(6), group), traffic.forward


def test_autocast_sends_what_it_computes_with(pool):
    parts = pool.run(2, on_ranks_autocast)
    counted = Window(6).communication(40, 2, heads=2, head_dim=8, dtype=torch.bfloat16)
    assert tuple(sent for _, sent in parts) == counted.sent
    with torch.autocast("cpu", torch.bfloat16):
        exact = sparse_attn.attention(*qkv(40, torch.float32), Window(6))
    assert parts[0][0].dtype == torch.bfloat16
    close(torch.cat([output for output, _ in parts], 2), exact, 1e-2)


# ---- tables, sinks, dropout ---------------------------------------------------------------------


def on_ranks_slots(group: dist.ProcessGroup, lengths: list[int], given: bool) -> list[Tensor]:
    edges = [0, *itertools.accumulate(lengths)]
    part = slice(*edges[dist.get_rank(group) :][:2])
    table = cases.normal(1, 2, edges[-1], 5, seed=9)[:, :, part].clone().requires_grad_()
    tensors = [x[:, :, part] for x in qkv(edges[-1])]
    pattern = Window(2) | GlobalQueries([0])
    output = context_parallel_attention(
        *tensors, pattern, group, bias=SlotBias(table), lengths=lengths if given else None
    )
    return [output.detach(), torch.autograd.grad(output.sin().sum(), table)[0]]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [4, 4, 4, 1], [1, 0, 6, 1]], ids=str)
def test_rows_of_slots_with_shards_of_one_token(pool, lengths, given):
    n = sum(lengths)
    table = cases.normal(1, 2, n, 5, seed=9).requires_grad_()
    output = sparse_attn.attention(*qkv(n), Window(2) | GlobalQueries([0]), bias=SlotBias(table))
    exact = [output.detach(), torch.autograd.grad(output.sin().sum(), table)[0]]
    parts = pool.run(4, on_ranks_slots, lengths, given)
    for ours, wanted in zip(zip(*parts, strict=True), exact, strict=True):
        close(torch.cat(ours, 2), wanted)


def on_ranks_only_a_table(group: dist.ProcessGroup) -> list[Tensor]:
    table = cases.normal(2, 5, seed=9).requires_grad_()
    tensors = [shard(x, group) for x in qkv(20)]
    output = context_parallel_attention(*tensors, Window(2) | GlobalQueries([0]), group, bias=table)
    return [output.detach(), torch.autograd.grad(output.sin().sum(), table)[0]]


def test_gradients_of_a_table_alone(pool):
    table = cases.normal(2, 5, seed=9).requires_grad_()
    output = sparse_attn.attention(*qkv(20), Window(2) | GlobalQueries([0]), bias=table)
    exact = torch.autograd.grad(output.sin().sum(), table)[0]
    parts = pool.run(3, on_ranks_only_a_table)
    close(torch.cat([part[0] for part in parts], 2), output.detach())
    close(sum(part[1] for part in parts), exact)


def on_ranks_outside(group: dist.ProcessGroup) -> str:
    x = torch.randn(1, 2, 10, 8)
    try:
        context_parallel_attention(x, x, x, Window(3), dist.GroupMember.NON_GROUP_MEMBER)
    except ValueError as error:
        return str(error)
    return ""


def test_outside_the_group(pool):
    for message in pool.run(2, on_ranks_outside):
        assert message.startswith("sparse_attn: expected group to be one that this process is in")


def on_ranks_sink(group: dist.ProcessGroup) -> Tensor:
    sink = torch.tensor([-torch.inf, 0.5], dtype=torch.float64)
    tensors = [shard(x, group) for x in qkv(60)]
    return context_parallel_attention(*tensors, RandomTokens(0.02), group, sink=sink)


def test_a_sink_of_nothing(pool):
    sink = torch.tensor([-torch.inf, 0.5], dtype=torch.float64)
    exact = sparse_attn.attention(*qkv(60), RandomTokens(0.02), sink=sink)
    close(torch.cat(pool.run(2, on_ranks_sink), 2), exact)


def attention_module(group: dist.ProcessGroup | None, **options) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(
        16, 2, batch_first=True, pattern=Window(5), context_parallel_group=group, **options
    ).double()


def on_ranks_added_keys(group: dist.ProcessGroup) -> Tensor:
    layer = attention_module(group, add_bias_kv=True, dropout=0.4)
    torch.manual_seed(7 + dist.get_rank(group))  # only the first rank's generator counts
    x = shard(cases.normal(2, 30, 16), group, 1)
    return layer(x, x, x, need_weights=False)[0].detach()


def test_dropout_of_added_keys(pool):
    layer, x = attention_module(None, add_bias_kv=True, dropout=0.4), cases.normal(2, 30, 16)
    torch.manual_seed(7)
    exact = layer(x, x, x, need_weights=False)[0].detach()
    close(torch.cat(pool.run(3, on_ranks_added_keys), 1), exact)


def on_ranks_masks(group: dist.ProcessGroup, floating: bool) -> Tensor:
    layer, x = attention_module(group), shard(cases.normal(2, 30, 16), group, 1)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 20:] = True
    padding = shard(padding, group, 1)
    if floating:
        padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    call = {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True}
    return layer(x, x, x, need_weights=False, **call)[0].detach()


@pytest.mark.parametrize("floating", [True, False])
def test_causal_hint_and_padding(pool, floating):
    layer, x = attention_module(None), cases.normal(2, 30, 16)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[1, 20:] = True
    causal = torch.ones(30, 30, dtype=torch.bool).triu(1)
    exact = layer(x, x, x, padding, need_weights=False, attn_mask=causal)[0].detach()
    close(torch.cat(pool.run(2, on_ranks_masks, floating), 1), exact)


def on_ranks_bfloat16(group: dist.ProcessGroup) -> Tensor:
    leaves = [shard(x, group).clone().requires_grad_() for x in qkv(64, torch.bfloat16)]
    pattern = Window(8) | Global([0])
    output = context_parallel_attention(*leaves, pattern, group)
    return torch.autograd.grad(output.float().square().sum(), leaves)[1]


def test_gradients_of_half_types_are_summed_in_float32(pool):
    """The global key's comes from all ranks."""
    pattern = Window(8) | Global([0])

    def gradient(dtype: torch.dtype) -> Tensor:
        leaves = [x.to(dtype).requires_grad_() for x in qkv(64, torch.bfloat16)]
        output = sparse_attn.attention(*leaves, pattern)
        return torch.autograd.grad(output.to(torch.float64).square().sum(), leaves)[1].double()

    exact = gradient(torch.float64)
    own = (gradient(torch.bfloat16) - exact).abs().max()
    ours = torch.cat(pool.run(4, on_ranks_bfloat16), 2).double()
    assert (ours - exact).abs().max() <= 2 * own


# ---- bytes of masks, whole tensors --------------------------------------------------------------


def on_ranks_mask_bytes(group: dist.ProcessGroup, n: int) -> int:
    tensors = [shard(x, group) for x in qkv(n, torch.float32)]
    mask = torch.zeros(1, tensors[0].shape[2], dtype=torch.bool)
    with count_traffic() as traffic:
        context_parallel_attention(
            *tensors, Window(4), group, key_padding_mask=mask, global_mask=mask
        )
    return traffic.forward


def test_masks_are_counted(pool):
    masks = {"key_padding_mask": True, "global_mask": True}
    for world, n in ((2, 31), (4, 50)):
        counted = Window(4).communication(n, world, heads=2, head_dim=8, **masks)
        assert tuple(pool.run(world, on_ranks_mask_bytes, n)) == counted.sent
        assert counted.sent_backward == Window(4).communication(n, world, heads=2, head_dim=8).sent


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((), 2), ValueError, "n to list"),
        ((100.0, 2), TypeError, "n to be an int"),
        ((100, 2, {"heads": 4, "heads_kv": 3}), ValueError, "heads_kv"),
        ((100, 2, {"dtype": "float32"}), TypeError, "dtype"),
        ((100, 2, {"dtype": torch.int64}), TypeError, "dtype"),
        ((100, 2, {"global_mask": torch.zeros(1)}), TypeError, "global_mask"),
    ],
)
def test_wrong_arguments_of_a_dry_run(arguments, error, words):
    n, ranks, *options = arguments
    with pytest.raises(error, match=f"expected {words}"):
        Window(3).communication(n, ranks, **(options[0] if options else {}))
    with pytest.raises(ValueError, match="expected heads to be a multiple of the pattern's 3"):
        PerHead([Window(1)] * 3).communication(100, 2, heads=2)


def on_ranks_gather(group: dist.ProcessGroup, dim: int, lengths: list[int]) -> list[Tensor]:
    rank = dist.get_rank(group)
    x = cases.normal(*(sum(lengths) if i == dim else 3 for i in range(3)))
    own = x.split(lengths, dim)[rank].clone().requires_grad_()
    whole = gather_sequence(own, group, dim=dim, lengths=lengths if dim else None)
    weights = cases.normal(*whole.shape, seed=5) * (rank + 1)
    return [whole.detach(), torch.autograd.grad((whole * weights).sum(), own)[0]]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather(pool, dim):
    lengths = [2, 0, 3, 1]
    x = cases.normal(*(6 if i == dim else 3 for i in range(3)))
    parts = pool.run(4, on_ranks_gather, dim, lengths)
    for whole, _ in parts:
        assert torch.equal(whole, x)
    gradient = torch.cat([part[1] for part in parts], dim)
    close(gradient, cases.normal(*x.shape, seed=5) * (1 + 2 + 3 + 4))


def on_ranks_lsh(group: dist.ProcessGroup) -> list[Tensor]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    leaves = [shard(x, group).clone().requires_grad_() for x in qkv(50)]
    whole = [gather_sequence(x, group) for x in leaves]
    output = lsh_attention(*whole, num_buckets=4, seed=3).tensor_split(world, 2)[rank]
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)]


def test_attention_by_content(pool):
    """LSH needs all keys: gathered, the numbers are those of the single process."""
    leaves = [x.requires_grad_() for x in qkv(50)]
    output = lsh_attention(*leaves, num_buckets=4, seed=3)
    exact = [output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)]
    parts = pool.run(3, on_ranks_lsh)
    for ours, wanted in zip(zip(*parts, strict=True), exact, strict=True):
        close(torch.cat(ours, 2), wanted)


def test_masks_of_all_sizes_are_described():
    """Two masks of one shape are two calls."""
    from sparse_attn.distributed.agreement import in_words

    ones = Mask(torch.ones(4, 4, dtype=torch.bool))
    assert in_words(ones) != in_words(Mask(torch.eye(4, dtype=torch.bool)))
    assert in_words(ones | Window(1)) == in_words(ones | Window(1))
