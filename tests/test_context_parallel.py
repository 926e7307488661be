"""A sequence over several ranks against the single process: every pattern, option and error.

The ranks are processes of a pool (`ranks.py`); functions whose names begin with `on_ranks` run
there.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
from typing import Any, NamedTuple

import cases
import pytest
import reference
import torch
import torch.distributed as dist
from ranks import JobError, Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparse_attn
from sparse_attn import BlockBias, Global, LongformerSelfAttention, MultiheadAttention, Window
from sparse_attn.distributed import context_parallel_attention, count_traffic
from sparse_attn.distributed.exchange import Exchange
from sparse_attn.distributed.routes import key_route
from sparse_attn.distributed.shards import Shards, find_needs, part_words

pytestmark = pytest.mark.skipif(
    cases.DEVICE.type != "cpu" or not dist.is_gloo_available(), reason="the ranks talk by gloo"
)

WORLDS = (1, 2, 3, 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    pool.close()


class Case(NamedTuple):
    """One call. Tables are expressions of cases.py, or (expression, block); `rows` names those that
    have a row for each query, which are sharded; `shares` says how long the shards are.
    """

    pattern: str
    shape: cases.Shape = cases.Shape(n_q=67, head_dim=8)
    dtype: torch.dtype = torch.float64
    padded: bool = False
    global_mask: bool = False
    dropout: bool = False
    tables: dict[str, Any] | None = None
    rows: tuple[str, ...] = ()
    shares: tuple[int, ...] = (1, 1, 1, 1)
    give_lengths: bool = False
    options: dict[str, Any] | None = None


def edges(n: int, shares: tuple[int, ...], world: int) -> list[int]:
    shares = shares[:world]
    return [n * sum(shares[:r]) // sum(shares) for r in range(world + 1)]


def whole_inputs(case: Case) -> tuple[list[Tensor], dict[str, Any], dict[str, Tensor]]:
    """Query, key and value; options; tables."""
    shape = case.shape
    query, key, value = cases.inputs(shape, case.dtype)
    batch, n_k = key.shape[0], key.shape[2]
    options = dict(case.options or {})
    if case.padded:
        options["key_padding_mask"] = cases.padding(batch, n_k)
    if case.global_mask:
        options["global_mask"] = cases.global_tokens(batch, n_k)
    if case.dropout:
        options |= {"dropout_p": 0.3, "dropout_seed": torch.tensor(1234)}
    names = cases.sizes(shape) | {"normal": cases.normal}
    tables = {
        name: eval(table[0] if isinstance(table, tuple) else table, names).to(case.dtype)
        for name, table in (case.tables or {}).items()
    }
    return [query, key, value], options, tables


def gradients_in(case: Case) -> tuple[Tensor, Tensor]:
    """Of the output and of the log-sum-exp."""
    shape = case.shape
    value_dim = shape.head_dim if shape.value_dim is None else shape.value_dim
    rows = (shape.batch, shape.heads, shape.n_q)
    wide = torch.promote_types(case.dtype, torch.float32)
    return (
        cases.normal(*rows, value_dim, seed=5, dtype=case.dtype),
        cases.normal(*rows, seed=6, dtype=wide),
    )


def results(case: Case, attend: Any, tensors, options, tables, gradients) -> list[Tensor]:
    """Output, log-sum-exp, and gradients of query, key, value and of the tables."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, *tables.values())]
    given = dict(zip(tables, leaves[3:], strict=True))
    for name, table in (case.tables or {}).items():
        if isinstance(table, tuple):
            given[name] = BlockBias(given[name], table[1])
    pattern = cases.library(case.pattern, case.shape)
    output, lse = attend(
        *leaves[:3],
        pattern,
        return_lse=True,
        enable_gqa=case.shape.kv_heads is not None,
        **options,
        **given,
    )
    finite = lse.masked_fill(lse.isinf(), 0)
    loss = (output * gradients[0]).sum() + (finite * gradients[1]).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@functools.cache
def _expected(name: str) -> list[Tensor]:
    return expected(CASES[name] if name in CASES else pattern_case(name))


def expected(case: Case) -> list[Tensor]:
    """Of the single process."""
    return results(case, sparse_attn.attention, *whole_inputs(case), gradients_in(case))


def on_ranks(group: dist.ProcessGroup, case: Case) -> list[Tensor]:
    """The rank's share of a case."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    tensors, options, tables = whole_inputs(case)
    at_q, at_k = (edges(x.shape[2], case.shares, world) for x in tensors[:2])
    queries, keys = (slice(*at[rank : rank + 2]) for at in (at_q, at_k))
    shards = [x[:, :, part] for x, part in zip(tensors, (queries, keys, keys), strict=True)]
    for mask in ("key_padding_mask", "global_mask"):
        if mask in options:
            options[mask] = options[mask][:, keys]
    for name in case.rows:
        tables[name] = tables[name][..., queries, :]
    if case.give_lengths:
        lengths = [[b - a for a, b in itertools.pairwise(at)] for at in (at_q, at_k)]
        options["lengths"] = list(zip(*lengths, strict=True))
    attend = functools.partial(context_parallel_attention, group=group)
    rows = [gradient[:, :, queries] for gradient in gradients_in(case)]
    return results(case, attend, shards, options, tables, rows)


def joined(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    """What the ranks have, together: rows side by side, shares of gradients added up."""
    whole = [torch.cat(same, 2) for same in list(zip(*parts, strict=True))[:5]]
    for name, same in zip(case.tables or (), list(zip(*parts, strict=True))[5:], strict=True):
        whole.append(torch.cat(same, -2) if name in case.rows else sum(same))
    return whole


def assert_equal(case: Case, parts: list[list[Tensor]], wanted: list[Tensor]) -> None:
    for ours, exact in zip(joined(case, parts), wanted, strict=True):
        assert torch.equal(ours.isinf(), exact.isinf())
        finite = ~exact.isinf()
        size = max(1.0, exact[finite].abs().max().item()) if finite.any() else 1.0
        error = (ours - exact)[finite].abs().max().item() if finite.any() else 0.0
        assert error <= TOLERANCE[case.dtype] * size


def pattern_case(name: str) -> Case:
    return Case(cases.PATTERNS.get(name) or cases.SIZED[name])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*cases.PATTERNS, *cases.SIZED])
def test_every_pattern(pool, world, name):
    case = pattern_case(name)
    assert_equal(case, pool.run(world, on_ranks, case), _expected(name))


def test_definition(pool):
    """Not only what the single process gives: the dense softmax over the pairs."""
    for name in ("window_global", "dilated_5", "bigbird", "random_tokens_window", "fixed_64"):
        case = pattern_case(name)._replace(padded=True, global_mask=True)
        (query, key, value), options, _ = whole_inputs(case)
        rule = cases.definition(case.pattern, case.shape)
        allowed = reference.allowed_pairs(rule, query, key, **options)
        output, lse = reference.dense_attention(query, key, value, allowed)
        ours = joined(case, pool.run(3, on_ranks, case))
        torch.testing.assert_close(ours[0], output, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours[1], lse, rtol=0, atol=1e-12)


def _shape(n_q: int, n_k: int | None = None, **sizes: int) -> cases.Shape:
    return cases.Shape(n_q=n_q, n_k=n_k, head_dim=8, **sizes)


_WIDE = cases.Shape(n_q=203, head_dim=64)
_GLOBAL = "Window(9) | Global([3, -1])"
_DILATED = "Window(9, dilation=3) | Global([3])"
CASES = {
    "gqa": Case(_GLOBAL, _shape(67, kv_heads=2)),
    "mqa_narrow_value": Case(_GLOBAL, _shape(67, kv_heads=1, value_dim=5)),
    "padding": Case(_GLOBAL, padded=True),
    "padding_causal": Case("Window(9, 0)", padded=True),
    "global_mask": Case("Window(4)", global_mask=True),
    "global_mask_causal": Case("Window(4, 0)", global_mask=True, padded=True),
    "global_mask_heads": Case("PerHead([Window(4, 0), Window(3)])", global_mask=True),
    "global_mask_more_keys": Case("Window(4)", _shape(40, 67), global_mask=True),
    "dropout": Case(_DILATED, dropout=True),
    "dropout_random": Case("RandomTokens(0.05)", dropout=True),
    "dropout_all": Case(_GLOBAL, dropout=True, global_mask=True, padded=True),
    "alibi": Case(_DILATED, tables={"bias": "normal(heads)"}),
    "toeplitz": Case(
        _DILATED, tables={"bias": "normal(heads, 19)", "gate": "normal(heads, 19, seed=1)"}
    ),
    "slots_of_queries": Case(
        _DILATED, tables={"bias": "normal(heads, n_q, 19)"}, rows=("bias",), shares=(3, 1, 0, 2)
    ),
    "dense_bias": Case(
        _GLOBAL, tables={"bias": "normal(1, heads, n_q, n_k)"}, rows=("bias",), dropout=True
    ),
    "dense_gate_listed": Case(
        "RandomTokens(0.02)", tables={"gate": "normal(batch, 1, n_q, n_k)"}, rows=("gate",)
    ),
    "block_tables": Case(
        _GLOBAL,
        tables={"bias": ("normal(1, heads, 10, 10)", 7), "gate": ("normal(batch, 1, 10, 10)", 7)},
    ),
    "sink_softcap": Case(_GLOBAL, tables={"sink": "normal(heads)"}, options={"softcap": 2.0}),
    "scale": Case(_GLOBAL, options={"scale": 0.3}),
    "uneven": Case(_GLOBAL, shares=(5, 1, 0, 9), padded=True),
    "uneven_lengths": Case(_DILATED, shares=(1, 0, 4, 7), give_lengths=True),
    "uneven_blocks": Case("BigBird(5)", shares=(1, 7, 0, 2), global_mask=True),
    "more_keys": Case(_GLOBAL, _shape(40, 67)),
    "more_queries": Case("Window(9, dilation=2) | Global([3])", _shape(67, 40)),
    "more_queries_causal": Case("Causal()", _shape(67, 40), give_lengths=True),
    "mask_more_queries": Case("Mask(bits(n_q, n_k))", _shape(67, 40)),
    "lists_more_keys": Case("KeyLists(numbers(n_q, 5, below=n_k))", _shape(40, 67)),
    "wide_halo": Case("Window(200) | Global([3])", _shape(399, heads=1)),
    "wide_dilated": Case("Window(40, dilation=7)", _shape(999, heads=1)),
    "dilation_of_a_shard": Case("Window(8, dilation=64)", _shape(1025, heads=1)),
    "narrow": Case("Window(3)", _shape(203), padded=True),
    "narrow_dilated": Case("Window(3, 2, dilation=3)", _shape(203), dropout=True),
    "narrow_tables": Case(
        "Window(3, dilation=2)",
        _shape(203),
        tables={"bias": "normal(heads, 7)", "gate": "normal(heads, n_q, 7)"},
        rows=("gate",),
        dropout=True,
    ),
    "narrow_global_queries": Case("Window(3, dilation=2) | GlobalQueries([0, 99])", _shape(203)),
    "three_tokens": Case("Window(1)", _shape(3)),
    "one_token": Case("Window(1) | Global([0])", _shape(1)),
    "many_global_queries": Case("GlobalQueries(list(range(0, 67, 2)))"),
    "mostly_global": Case("Global(list(range(60)))"),
    "float32": Case(_GLOBAL, dtype=torch.float32),
    "bfloat16": Case(_GLOBAL, dtype=torch.bfloat16),
    "bfloat16_dropout": Case(_GLOBAL, dtype=torch.bfloat16, global_mask=True, dropout=True),
    "bfloat16_slots": Case(
        _DILATED, _WIDE, torch.bfloat16, tables={"bias": "normal(heads, n_q, 19)"}, rows=("bias",)
    ),
    "bfloat16_blocks": Case(
        _GLOBAL, _WIDE, torch.bfloat16, tables={"gate": ("normal(1, heads, 29, 29)", 7)}
    ),
    "bfloat16_layout": Case(
        "BlockLayout(bits(blocks(n_q, 16), blocks(n_k, 16)), 16)", _WIDE, torch.bfloat16
    ),
    "bfloat16_lists": Case(
        "KeyLists(numbers(n_q, 5, below=n_k)) | Window(3, dilation=2)", _WIDE, torch.bfloat16
    ),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_options(pool, world, name):
    case = CASES[name]
    if sum(case.shares[:world]) == 0:
        case = case._replace(shares=(1, 1, 1, 1))
    assert_equal(case, pool.run(world, on_ranks, case), _expected(name))


def on_ranks_twice(group: dist.ProcessGroup, case: Case) -> bool:
    first, second = on_ranks(group, case), on_ranks(group, case)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_deterministic(pool):
    assert all(pool.run(4, on_ranks_twice, CASES["dropout_all"]))


def on_ranks_drawn_seed(group: dist.ProcessGroup, n: int) -> Tensor:
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    x = cases.normal(1, 2, n, 8).chunk(dist.get_world_size(group), 2)[rank]
    return context_parallel_attention(x, x, x, Window(5), group, dropout_p=0.5)


def test_first_rank_draws_the_seed(pool):
    x = cases.normal(1, 2, 40, 8)
    torch.manual_seed(0)
    exact = sparse_attn.attention(x, x, x, Window(5), dropout_p=0.5)
    ours = torch.cat(pool.run(2, on_ranks_drawn_seed, 40), 2)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


# ---- what is sent -------------------------------------------------------------------------------


def on_ranks_traffic(group: dist.ProcessGroup, pattern: Any, n: int) -> tuple[int, int]:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = [n // world + (r < n % world) for r in range(world)]
    x = torch.randn(2, 4, lengths[rank], 8, requires_grad=True)
    keys = torch.randn(2, 2, lengths[rank], 8, requires_grad=True)
    with count_traffic() as traffic:
        output = context_parallel_attention(x, keys, keys, pattern, group, enable_gqa=True)
        output.sum().backward()
    return traffic.forward, traffic.backward


@pytest.mark.parametrize(
    "pattern",
    [
        Window(20),
        Window(5, 0, dilation=3),
        Window(4) | Global([0, 50]),
        sparse_attn.BigBird(8),
        sparse_attn.Full(),
    ],
    ids=repr,
)
def test_traffic_is_as_foreseen(pool, pattern):
    for world in (2, 4):
        sent = pool.run(world, on_ranks_traffic, pattern, 101)
        sizes = {"batch": 2, "heads": 4, "heads_kv": 2, "head_dim": 8}
        counted = pattern.communication(101, world, **sizes)
        assert tuple(forward for forward, _ in sent) == counted.sent
        assert tuple(backward for _, backward in sent) == counted.sent_backward


def test_windows_send_their_halos():
    window = Window(256, 128, dilation=4)
    for n, ranks in ((1 << 16, 2), (1 << 16, 8), (1 << 20, 8), (1 << 20, 64)):
        counted = window.communication(n, ranks, heads=8, head_dim=64)
        assert max(counted.keys) == (256 if ranks == 2 else 384) * 4
        assert max(counted.received) == max(counted.keys) * 8 * 2 * 64 * 4
        assert not counted.all_keys
    assert Window(3).communication([2, 5, 1, 9]).keys == (3, 5, 6, 3)
    full = sparse_attn.Full().communication(1000, 3)
    assert full.all_keys
    assert max(full.received) == full.all_gather
    with pytest.raises(ValueError, match="expected ranks to be 2"):
        Window(3).communication([2, 5], 3)


class Recorder(TorchDispatchMode):
    """Notes calls of the op and of its backward by the length of their keys; not those that only
    check arguments, on meta tensors.
    """

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        noted = name.startswith(("sparse_attn.attention.", "sparse_attn.attention_backward."))
        if noted and not arguments[0].is_meta:
            at_key = 3 if "backward" in name else 1
            self.events.append(f"{name.split('.')[1]} of {arguments[at_key].shape[2]} keys")
        return function(*arguments, **(options or {}))


def on_ranks_order(group: dist.ProcessGroup) -> list[str]:
    events: list[str] = []
    names = ("send", "receive", "send_back", "receive_back")
    steps = {name: getattr(Exchange, name) for name in names}

    def noted(name):
        return lambda *arguments: (events.append(name), steps[name](*arguments))[1]

    for name in steps:
        setattr(Exchange, name, noted(name))
    try:
        x = torch.randn(1, 2, 20, 8, requires_grad=True)
        with Recorder(events):
            context_parallel_attention(x, x, x, Window(5), group).sum().backward()
    finally:
        for name, step in steps.items():
            setattr(Exchange, name, step)
    return events


def test_messages_travel_while_own_keys_are_attended(pool):
    for events in pool.run(2, on_ranks_order):
        assert events == [
            "send",
            "attention of 20 keys",
            "receive",
            "attention of 5 keys",
            "attention_backward of 5 keys",
            "send_back",
            "attention_backward of 20 keys",
            "receive_back",
        ]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_dilated_halos_keep_their_order(ranks):
    """A far call of a dilated window runs by residue classes, as the whole one does."""
    pattern, n = Window(20, 10, dilation=7), 1009
    shards = Shards(*[tuple(n // ranks + (r < n % ranks) for r in range(ranks))] * 2)
    for rank in range(ranks):
        needs = find_needs(pattern, shards, 0.5, rank)
        _, buffer = key_route(needs, rank, needs.far)
        words = part_words(pattern, shards.sizes, needs.far, buffer.runs)
        rows = sum(stop - start for start, stop in needs.far)
        plan = torch.ops.sparse_attn._pattern_plan(words, [], rows, buffer.length)
        assert "pass in steps of 7" in plan


# ---- models -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__()
        self.first = MultiheadAttention(
            16, 2, batch_first=True, pattern=Window(6) | Global([0]), context_parallel_group=group
        )
        self.second = LongformerSelfAttention(16, 2, 8, context_parallel_group=group)
        self.options = options

    def forward(self, x: Tensor, tokens: Tensor, is_global: Tensor) -> Tensor:
        if "reentrant" in self.options:
            x = checkpoint(self._first, x, tokens, use_reentrant=self.options["reentrant"])
        else:
            x = self._first(x, tokens)
        return self.second(x, tokens, is_global)[0]

    def _first(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.first(x, x, x, tokens == 0, need_weights=False)[0]


def model_inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.ones(2, n, dtype=torch.long)
    tokens[1, 40:] = 0
    is_global = torch.zeros(2, n, dtype=torch.long)
    is_global[0, 3] = is_global[1, 20] = 1
    return cases.normal(2, n, 16), tokens, is_global


def on_ranks_model(group: dist.ProcessGroup, n: int, wrapper: str) -> dict[str, Tensor]:
    """Gradients of parameters, summed over the ranks, and the rank's output."""
    torch.manual_seed(0)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    options = {"reentrant": wrapper == "reentrant"} if "reentrant" in wrapper else {}
    model = Model(group, **options).double()
    parallel: nn.Module = model
    if wrapper == "ddp":
        parallel = DistributedDataParallel(model, process_group=group)
    elif wrapper == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.first, mesh=mesh)
        fully_shard(model.second, mesh=mesh)
        fully_shard(model, mesh=mesh)
    x, tokens, is_global = (part.chunk(world, 1)[rank] for part in model_inputs(n))
    x = x.clone().requires_grad_()
    output = parallel(x, tokens, is_global)
    (output**2).sum().backward()
    gradients = {"output": output.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if wrapper == "fsdp":
            gradient = gradient.full_tensor() * world  # a mean over the ranks
        elif wrapper == "ddp":
            gradient = gradient * world
        else:
            dist.all_reduce(gradient, group=group)
        gradients[name] = gradient
    return gradients


@pytest.mark.parametrize("wrapper", ["bare", "ddp", "fsdp", "nonreentrant", "reentrant"])
def test_modules(pool, wrapper):
    torch.manual_seed(0)
    model = Model().double()
    x, tokens, is_global = model_inputs(68)
    x.requires_grad_()
    output = model(x, tokens, is_global)
    (output**2).sum().backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    parts = pool.run(2, on_ranks_model, 68, wrapper)
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    close(torch.cat([part["output"] for part in parts], 1), output.detach())
    close(torch.cat([part["x"] for part in parts], 1), x.grad)
    for part in parts:
        for name, gradient in exact.items():
            close(part[name], gradient)


def on_ranks_mesh(group: dist.ProcessGroup) -> Tensor:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    x = cases.normal(1, 2, 41, 8).tensor_split(2, 2)[mesh.get_local_rank()]
    return context_parallel_attention(x, x, x, Window(30), mesh["cp"])


def test_mesh(pool):
    x = cases.normal(1, 2, 41, 8)
    ours = torch.cat(pool.run(2, on_ranks_mesh), 2)
    torch.testing.assert_close(ours, sparse_attn.attention(x, x, x, Window(30)), rtol=0, atol=1e-12)


# ---- errors -------------------------------------------------------------------------------------


def on_ranks_that_differ(group: dist.ProcessGroup, what: str) -> None:
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    x = torch.randn(1, 2, 10, 8)
    pattern, options = Window(3), {}
    if what == "pattern" and last:
        pattern = Window(4)
    elif what == "data":
        pattern = sparse_attn.Mask(torch.ones(30, 30).tril(-last) > 0)
    elif what == "dtype" and last:
        x = x.double()
    elif what == "heads" and last:
        x = torch.randn(1, 1, 10, 8)
    elif what == "option" and last:
        options["softcap"] = 3.0
    elif what == "mask" and last:
        options["key_padding_mask"] = torch.zeros(1, 10, dtype=torch.bool)
    elif what == "gradient" and last:
        x.requires_grad_()
    elif what == "lengths":
        options["lengths"] = [10, 10, 11 if last else 10]
    elif what == "wrong lengths":
        options["lengths"] = [10, 10, 12]
    context_parallel_attention(x, x, x, pattern, group, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pattern", r"the same pattern on all ranks, got Window\(3\) on rank 0 and Window\(4\) on"),
        ("data", "the same pattern on all ranks.* on rank 2"),
        ("dtype", "the same key .*float32.* on rank 0 and .*float64.* on rank 2"),
        ("heads", "the same key .*batch, heads, size"),
        ("option", "the same softcap on all ranks, got None on rank 0 and 3.0 on rank 2"),
        ("mask", "the same key_padding_mask on all ranks, got None on rank 0 and a tensor"),
        ("gradient", "the same gradient of key on all ranks, got False on rank 0 and True"),
        ("lengths", "the same lengths on all ranks"),
        ("wrong lengths", "expected lengths to be those of the ranks' shards"),
    ],
)
def test_ranks_that_differ(pool, what, message):
    with pytest.raises(JobError, match=message) as raised:
        pool.run(3, on_ranks_that_differ, what)
    assert [error[0] for error in raised.value.errors] == ["ValueError"] * 3


def on_ranks_second_derivative(group: dist.ProcessGroup) -> None:
    x = torch.randn(1, 2, 10, 8, requires_grad=True)
    output = context_parallel_attention(x, x, x, Window(3), group)
    torch.autograd.grad(output.sum(), x, create_graph=True)


def test_second_derivative_is_refused(pool):
    with pytest.raises(JobError, match="to be differentiated once, got create_graph=True"):
        pool.run(2, on_ranks_second_derivative)


def on_ranks_wrong_arguments(group: dist.ProcessGroup) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x, mesh = torch.randn(1, 2, 10, 8), DeviceMesh.from_group(group, "cpu")
    whole = torch.randn(1, 2, 20, 8)
    sharded = distribute_tensor(whole, mesh, [Shard(2)])
    wrong = [
        lambda: context_parallel_attention(sharded, sharded, sharded, Window(3), group),
        lambda: context_parallel_attention(x, x, x, "window", group),
        lambda: context_parallel_attention(x, x, x, Window(3), "group"),
        lambda: context_parallel_attention(x[0], x, x, Window(3), group),
        lambda: context_parallel_attention(x, x, x, Window(3), group, lengths=[10]),
        lambda: context_parallel_attention(x, x, x, Window(3) | Global([20]), group),
        lambda: MultiheadAttention(8, 2, context_parallel_group=group)(x[0], x[0], x[0]),
    ]  # fmt: skip
    messages = []
    for call in wrong:
        try:
            call()
            messages.append("")
        except (TypeError, ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_wrong_arguments(pool):
    expected = [
        "TypeError: sparse_attn: expected query to be the rank's own shard, got a DTensor",
        "TypeError: sparse_attn: expected pattern to be a Pattern",
        "TypeError: sparse_attn: expected group to be a ProcessGroup or a DeviceMesh",
        "ValueError: sparse_attn: expected query of shape (batch, heads, length, size)",
        "ValueError: sparse_attn: expected lengths to be an int or (queries, keys) for each of",
        "ValueError: sparse_attn: expected pattern to have tokens in [-20, 20)",
        "NotImplementedError: sparse_attn: expected need_weights=False",
    ]
    for messages in pool.run(2, on_ranks_wrong_arguments):
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)


def _fail_on_the_second_rank(rank: int, path: str, pipe: Any) -> None:
    store = dist.FileStore(path, 2)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    x = torch.randn(1, 2, 10, 8)
    context_parallel_attention(x, x, x, Window(3), lengths=[10, 10])
    if rank == 1:
        os._exit(1)
    try:
        context_parallel_attention(x, x, x, Window(3), lengths=[10, 10])
    except RuntimeError as error:
        pipe.send(str(error))


def test_failed_rank(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    pair = [
        context.Process(
            target=_fail_on_the_second_rank, args=(rank, str(tmp_path / "store"), there)
        )
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    assert here.poll(60)
    message = here.recv()
    assert "expected keys and values of tokens" in message
    assert "rank 1, got an error of torch.distributed" in message
    for process in pair:
        process.join(20)


def test_without_a_group():
    x = torch.randn(1, 2, 10, 8)
    with pytest.raises(ValueError, match="expected an initialized process group, got none"):
        context_parallel_attention(x, x, x, Window(3))


def on_ranks_that_leave(group: dist.ProcessGroup, lengths: list[int] | None) -> None:
    """The second rank is missing from the second call."""
    x = torch.randn(1, 2, 10, 8)
    context_parallel_attention(x, x, x, Window(3), group, lengths=lengths)
    if dist.get_rank(group) == 0:
        context_parallel_attention(x, x, x, Window(3), group, lengths=lengths)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "expected the checksum and the lengths of the shards of all ranks, got an error of"),
        (
            [10, 10],
            r"expected keys and values of tokens (7..9 for|10..12 from) rank 1, got an error of",
        ),
    ],
)
def test_missing_rank(pool, lengths, message):
    with pytest.raises(JobError, match=message) as raised:
        pool.run(f"brief {lengths}", on_ranks_that_leave, lengths)
    assert raised.value.errors[0][0] == "RuntimeError"
    assert raised.value.errors[1] is None
