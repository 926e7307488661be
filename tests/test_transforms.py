"""What people wrap around attention: compilation, export, autocast, threads, copies."""

import concurrent.futures
import copy
import pickle

import cases
import pytest
import torch
from cases import DEVICE, Shape
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import (
    BlockBias,
    ETCSelfAttention,
    Global,
    LongformerSelfAttention,
    SlotBias,
    SparseSelfAttention,
    Window,
    alibi_slopes,
    attention,
)

SHAPE = Shape(n_q=67, head_dim=16)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Two layers with everything that attention takes, and what stands around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.longformer = LongformerSelfAttention(32, 4, attention_window=8, dropout=0.1)
        self.sparse = SparseSelfAttention(32, 4, pattern=Window(4, dilation=2))
        self.relative = nn.Parameter(torch.randn(4, 9))
        self.gate = nn.Parameter(torch.randn(4, 9))
        self.sink = nn.Parameter(torch.zeros(4))
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        is_global = torch.arange(x.shape[1], device=x.device).eq(0).expand(x.shape[:2])
        x = x + self.longformer(x, mask, is_global)[0]
        x = x + self.sparse(x)
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        pattern = Window(4) | Global([0])
        heads = attention(
            heads,
            heads,
            heads,
            pattern,
            bias=self.relative,
            gate=torch.sigmoid(self.gate),
            softcap=20.0,
            sink=self.sink,
        )
        return self.out(x + heads.transpose(1, 2).flatten(2))


def inputs(n: int) -> tuple[Tensor, Tensor]:
    x = cases.normal(2, n, 8, seed=n, dtype=torch.float32)
    mask = torch.ones(2, n, dtype=torch.long, device=DEVICE)
    mask[1, n // 2 :] = 0
    return x, mask


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().to(DEVICE).eval()


def test_compile_of_a_model(dynamo):
    plain = model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for n in (67, 20, 130):
        given = inputs(n)
        results, expected = compiled(*given), plain(*given)
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(results.square().sum(), list(plain.parameters()))
        others = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
        for a, b in zip(ours, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]  # nothing compiles again for other lengths


def test_compile_of_training(dynamo):
    layer = model().train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    first = compiled(*inputs(40))
    assert not torch.equal(first, compiled(*inputs(40)))  # other seeds of dropout
    first.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_compile_with_inductor(dynamo):
    plain = model()
    compiled = torch.compile(plain, fullgraph=True, dynamic=True)
    for n in (40, 67):
        torch.testing.assert_close(compiled(*inputs(n)), plain(*inputs(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_model(strict, dynamo):
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        model(), inputs(67), dynamic_shapes=({1: length}, {1: length}), strict=strict
    )
    for n in (2, 67, 200):
        torch.testing.assert_close(program.module()(*inputs(n)), model()(*inputs(n)))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_with_modifiers(low):
    query, key, value = cases.inputs(SHAPE)
    table = cases.normal(4, 7, dtype=torch.float32).requires_grad_()
    sink = torch.zeros(4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, low):
        output, lse = attention(
            query, key, value, Window(3), bias=table, gate=table, sink=sink, return_lse=True
        )
    assert output.dtype == low
    assert lse.dtype == torch.float32
    output.float().sum().backward()
    assert table.grad.dtype == sink.grad.dtype == torch.float32
    cast = [x.to(low) for x in (query, key, value)]
    assert torch.equal(output, attention(*cast, Window(3), bias=table, gate=table, sink=sink))


@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64], ids=str)
def test_autocast_takes_tables_of_any_type(given):
    query, key, value = cases.inputs(SHAPE)
    table, sink = cases.normal(4, 7, dtype=given), torch.ones(4, dtype=given, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = attention(query, key, value, Window(3), bias=table, gate=table, sink=sink)
    assert output.dtype == torch.bfloat16


def test_inference_mode_with_modifiers():
    query, key, value = cases.inputs(SHAPE)
    options = {"bias": alibi_slopes(4, device=DEVICE), "softcap": 2.0, "dropout_p": 0.5}
    options["dropout_seed"] = torch.tensor(1, device=DEVICE)
    expected = attention(query, key, value, Window(3), **options)
    with torch.inference_mode():
        assert torch.equal(attention(query, key, value, Window(3), **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_dropout(reentrant):
    leaves = [x.requires_grad_() for x in cases.inputs(SHAPE)]
    table = cases.normal(4, 7, dtype=torch.float32).requires_grad_()

    def call(query, key, value, table):
        return attention(query, key, value, Window(3), bias=table, dropout_p=0.5)

    torch.manual_seed(1)
    plain = torch.autograd.grad(call(*leaves, table).square().sum(), [*leaves, table])
    torch.manual_seed(1)
    output = torch.utils.checkpoint.checkpoint(call, *leaves, table, use_reentrant=reentrant)
    if reentrant:  # which knows only backward()
        output.square().sum().backward()
        again = [x.grad for x in (*leaves, table)]
    else:
        again = torch.autograd.grad(output.square().sum(), [*leaves, table])
    for result, expected in zip(again, plain, strict=True):
        assert torch.equal(result, expected)


def test_copies_and_pickles():
    for layer in (model(), ETCSelfAttention(32, 4, radius=3, max_distance=4)):
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            for ours, other in zip(twin.parameters(), layer.parameters(), strict=True):
                assert torch.equal(ours, other)
    again = pickle.loads(pickle.dumps(model()))
    assert torch.equal(again(*inputs(30)), model()(*inputs(30)))
    for table in (SlotBias(torch.ones(1, 4, 1, 7)), BlockBias(torch.ones(1, 1, 2, 2), 8)):
        twin = pickle.loads(pickle.dumps(table))
        assert torch.equal(twin.table, table.table)
        assert copy.deepcopy(table).table is not table.table


def test_threads_of_python():
    """Several Python threads, with other patterns and tables each, forward and backward."""
    plain = model()

    def work(number: int) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in cases.inputs(SHAPE, seed=number)]
        table = cases.normal(4, 2 * number + 3, dtype=torch.float32).requires_grad_()
        output = attention(*leaves, Window(number + 1), bias=table)
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, table])
        return [output, *gradients, plain(*inputs(20 + number))]

    expected = [work(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, others in zip(pool.map(work, range(8)), expected, strict=True):
                for result, other in zip(results, others, strict=True):
                    assert torch.equal(result, other)


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [x.requires_grad_() for x in cases.inputs(SHAPE)]
        table = cases.normal(4, 7, dtype=torch.float32).requires_grad_()
        output = attention(*leaves, Window(3), bias=table, gate=table, sink=table[:, 0])
        assert output.isfinite().all()
        torch.autograd.grad(output.square().sum(), [*leaves, table])
        model()(*inputs(20)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck_of_modifiers():
    leaves = [x.requires_grad_() for x in cases.inputs(Shape(n_q=9, head_dim=8))]
    table = cases.normal(1, 4, 1, 7, dtype=torch.float32).requires_grad_()
    options = {
        "bias": table,
        "bias_kind": 0,
        "gate": cases.normal(1, 1, 2, 2, dtype=torch.float32).requires_grad_(),
        "gate_kind": 5,
        "softcap": 3.0,
        "dropout_p": 0.25,
        "dropout_seed": torch.tensor(3, device=DEVICE),
    }
    ops, pattern = torch.ops.sparse_attn, list(Window(3).encode())
    sink = cases.normal(4, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(ops.attention.default, (*leaves, pattern), {**options, "sink": sink})
    given = [x.detach() for x in leaves]
    output, lse = ops.attention(*given, pattern, **options)
    backward = (torch.randn_like(output), torch.randn_like(lse), *given, output, lse)
    torch.library.opcheck(ops.attention_table_backward.default, (*backward, pattern), options)
    tangents = [torch.randn_like(x) for x in (*given, table, options["gate"])]
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    torch.library.opcheck(
        ops.attention_tangent.default, (*given, output, lse, *tangents, pattern), detached
    )
    torch.library.opcheck(
        ops.attention_backward_backward.default, (*backward, *tangents, pattern), detached
    )
