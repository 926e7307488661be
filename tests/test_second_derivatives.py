"""Derivatives of derivatives, forward mode and vmap: against finite differences and each other."""

import cases
import pytest
import torch
from cases import DEVICE, Shape
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sparse_attn import (
    BigBird,
    BlockBias,
    BlockLayout,
    Global,
    KeyLists,
    LocalBlocks,
    PerHead,
    RandomTokens,
    SlotBias,
    Window,
    attention,
)

SMALL = Shape(n_q=9, head_dim=3, value_dim=2, batch=2, heads=2)
PATTERNS = {
    "window": Window(2),
    "dilated": Window(2, dilation=2),
    "global": Window(1) | Global([0]),
    "blocks": LocalBlocks(4),
    "bigbird": BigBird(2, seed=1),
    "lists": RandomTokens(0.3),
    "per_head": PerHead([Window(2), Window(2, dilation=2)]),
    "empty_rows": Window(3, 0, dilation=2) & LocalBlocks(1),
    "two_passes": Window(2) | Window(1, dilation=4),
}
TABLES = {
    "none": ((1,), lambda x: None),
    "slopes": ((2,), lambda x: x),
    "toeplitz": ((2, 5), lambda x: x),
    "slots": ((2, 9, 5), lambda x: x),
    "dense": ((1, 2, 9, 9), lambda x: x),
    "blocks": ((2, 1, 3, 3), lambda x: BlockBias(x, 3)),
}
SLOTTED = ("window", "dilated", "per_head")


def leaf(*size: int, seed: int) -> Tensor:
    return cases.normal(*size, seed=seed).requires_grad_()


def function(pattern, wrap, **options):
    """Attention of five tensors, the last two the tables of bias and gate."""

    def call(query, key, value, bias, gate):
        given = {"bias": wrap(bias), "gate": None if bias.dim() == 1 else wrap(gate)}
        output, lse = attention(query, key, value, pattern, return_lse=True, **given, **options)
        return output, torch.where(lse.isinf(), 0, lse)

    return call


CASES = [(p, t) for p in PATTERNS for t in TABLES if t not in ("toeplitz", "slots") or p in SLOTTED]


@pytest.mark.parametrize(("pattern", "table"), CASES, ids=str)
@pytest.mark.sample
def test_against_finite_differences(pattern, table):
    size, wrap = TABLES[table]
    leaves = [x.requires_grad_() for x in cases.inputs(SMALL, torch.float64)]
    leaves += [leaf(*size, seed=1), leaf(*size, seed=2)]
    call = function(
        PATTERNS[pattern],
        wrap,
        softcap=1.5 if table == "dense" else None,
        dropout_p=0.3 if table == "toeplitz" else 0.0,
        dropout_seed=torch.tensor(5, device=DEVICE),
    )
    assert gradcheck(call, leaves, check_forward_ad=True)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL._replace(n_q=5, n_k=9),
        SMALL._replace(n_q=9, n_k=5),
        SMALL._replace(kv_heads=1),
        SMALL._replace(heads=1, n_q=70, head_dim=1, value_dim=1, batch=1),
    ],
    ids=str,
)
def test_shapes(shape):
    leaves = [x.requires_grad_() for x in cases.inputs(shape, torch.float64)]
    if shape.n_q > 64:  # longer than a tile: the whole Jacobian would take minutes
        leaves = [x[:, :, :].detach().requires_grad_() for x in leaves]
    padding = cases.padding(shape.batch, leaves[1].shape[2])
    globals_ = cases.global_tokens(shape.batch, leaves[1].shape[2], seed=1)

    def call(query, key, value, sink):
        output, lse = attention(
            query,
            key,
            value,
            Window(2),
            key_padding_mask=padding,
            global_mask=globals_,
            enable_gqa=shape.kv_heads is not None,
            sink=sink,
            return_lse=True,
        )
        return output, torch.where(lse.isinf(), 0, lse)

    assert gradgradcheck(call, [*leaves, leaf(shape.heads, seed=3)], check_fwd_over_rev=True)


def test_patterns_with_tensors():
    lists = KeyLists(cases.numbers(9, 3, below=9))
    layout = BlockLayout(cases.bits(3, 3), 3)
    leaves = [x.requires_grad_() for x in cases.inputs(SMALL, torch.float64)]
    for pattern in (lists, layout, lists | Window(1)):
        assert gradgradcheck(
            lambda *x, p=pattern: attention(*x, p), leaves, check_fwd_over_rev=True
        )


def tensors() -> list[Tensor]:
    """Query, key and value with a fourth dimension in front to map over."""
    return [cases.normal(4, *x.shape, seed=i) for i, x in enumerate(cases.inputs(SMALL))]


def assert_same(ours: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_vmap():
    q, k, v = tensors()
    call = lambda q, k, v: attention(q, k, v, PATTERNS["global"])  # noqa: E731
    assert_same(vmap(call)(q, k, v), [call(q[i], k[i], v[i]) for i in range(4)])
    one_key = vmap(call, in_dims=(1, None, None))(q.transpose(0, 1), k[0], v[0])
    assert_same(one_key, [call(q[i], k[0], v[0]) for i in range(4)])
    assert_same(
        vmap(call, in_dims=(None, 0, 0))(q[0], k, v),
        [call(q[0], *x) for x in zip(k, v, strict=True)],
    )


def test_vmap_over_masks():
    q, k, v = (x[0] for x in tensors())
    padding = cases.bits(4, 2, 9, share=0.3)
    call = lambda mask: attention(  # noqa: E731
        q, k, v, Window(2), key_padding_mask=mask, global_mask=~mask
    )
    assert_same(vmap(call)(padding), [call(mask) for mask in padding])


@pytest.mark.parametrize(
    ("size", "wrap"),
    [
        ((2,), lambda x: x),
        ((2, 5), lambda x: x),
        ((2, 9, 5), lambda x: x),
        ((1, 1, 9, 9), lambda x: x),
        ((2, 2, 9, 9), lambda x: x),
        ((2, 2, 1, 5), SlotBias),
        ((1, 2, 3, 3), lambda x: BlockBias(x, 3)),
    ],
    # Not of functions, whose names have addresses: processes that share the tests compare them.
    ids=lambda given: str(given) if isinstance(given, tuple) else None,
)
def test_vmap_over_tables(size, wrap):
    q, k, v = tensors()
    table = cases.normal(4, *size, seed=7)

    def call(q, table):
        gate = None if table.dim() == 1 else wrap(table)
        return attention(q, k[0], v[0], Window(2), bias=wrap(table), gate=gate)

    def loss(q, table):
        return call(q, table).square().sum()

    for dims in ((0, 0), (None, 0), (0, None)):
        pick = lambda i, dims=dims: (  # noqa: E731
            q[i] if dims[0] == 0 else q[0],
            table[i] if dims[1] == 0 else table[0],
        )
        mapped = (q if dims[0] == 0 else q[0], table if dims[1] == 0 else table[0])
        assert_same(vmap(call, in_dims=dims)(*mapped), [call(*pick(i)) for i in range(4)])
        ours = vmap(grad(loss, argnums=(0, 1)), in_dims=dims)(*mapped)
        expected = [grad(loss, argnums=(0, 1))(*pick(i)) for i in range(4)]
        for j in (0, 1):
            assert_same(ours[j], [x[j] for x in expected])


def test_vmap_over_what_does_not_fold():
    q, k, v = (x[0] for x in tensors())
    layouts, mapped = cases.bits(4, 2, 3, 3), tensors()[0]
    call = lambda q, layout: attention(q, k, v, BlockLayout(layout, 3))  # noqa: E731
    pairs = list(zip(mapped, layouts, strict=True))
    assert_same(vmap(call)(mapped, layouts), [call(*x) for x in pairs])
    by_example = cases.bits(2, 1, 3, 3)
    other = lambda q: attention(q, k, v, BlockLayout(by_example, 3))  # noqa: E731
    queries = tensors()[0]
    assert_same(vmap(other)(queries), [other(x) for x in queries])
    seeds = torch.arange(4, device=DEVICE)
    drop = lambda seed: attention(q, k, v, Window(2), dropout_p=0.5, dropout_seed=seed)  # noqa: E731
    assert_same(vmap(drop)(seeds), [drop(seed) for seed in seeds])


def test_randomness_of_vmap():
    q, k, v = tensors()
    q = q[:1].expand(4, -1, -1, -1, -1)
    call = lambda q: attention(q, k[0], v[0], Window(2), dropout_p=0.5)  # noqa: E731
    different = vmap(call, randomness="different")(q)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(q)


def test_vmap_of_dropout_with_one_seed():
    """Every slice drops the same pairs, and so do its derivatives."""
    q, k, v = (x[0] for x in tensors())
    seed = torch.tensor(7, device=DEVICE)
    call = lambda q: attention(q, k, v, Window(2), dropout_p=0.5, dropout_seed=seed)  # noqa: E731
    assert_same(vmap(call)(torch.stack([q, 2 * q])), [call(q), call(2 * q)])
    torch.testing.assert_close(jacrev(call)(q), jacfwd(call)(q))
    leaf = q.clone().requires_grad_()
    made = call(leaf)[0, 0].flatten()
    rows = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in made]
    torch.testing.assert_close(jacrev(call)(q)[0, 0].flatten(0, 1), torch.stack(rows))


def test_nested_vmap():
    q, k, v = tensors()
    inner = lambda q, k, v: attention(q[None], k[None], v[None], Window(2))[0]  # noqa: E731
    nested = vmap(vmap(inner))(q, k, v)
    torch.testing.assert_close(
        nested, torch.stack([attention(*x, Window(2)) for x in zip(q, k, v, strict=True)])
    )


def test_jacobians_and_hessians():
    q, k, v = (x[0] for x in tensors())
    bias, sink = cases.normal(2, 5, seed=1), cases.normal(2, seed=2)

    def call(q, bias, sink):
        return attention(q, k, v, Window(2), bias=bias, sink=sink, softcap=2.0)

    def loss(*x):
        return call(*x).square().sum()

    everything = (0, 1, 2)
    for ours, other in zip(
        jacrev(call, everything)(q, bias, sink),
        jacfwd(call, everything)(q, bias, sink),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    for i in everything:
        expected = hessian(loss, argnums=i)(q, bias, sink)
        twice = jacrev(jacrev(loss, i), i)(q, bias, sink)
        torch.testing.assert_close(twice, expected, rtol=1e-10, atol=1e-12)
        mixed = jacrev(jacfwd(loss, i), i)(q, bias, sink)
        torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-12)


def test_hessian_vector_product():
    q, k, v = tensors()
    loss = lambda q: attention(q, k[0], v[0], PATTERNS["global"]).square().sum()  # noqa: E731
    _, forward_over_reverse = jvp(grad(loss), (q[0],), (q[1],))
    matrix = hessian(loss)(q[0]).reshape(q[0].numel(), -1)
    torch.testing.assert_close(forward_over_reverse.flatten(), matrix @ q[1].flatten())
    leaves = q[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(first, leaves, q[1])
    torch.testing.assert_close(reverse_over_reverse, forward_over_reverse)


def test_dual_numbers():
    q, k, v = (x[0] for x in tensors())
    tangent = torch.randn_like(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        output = attention(dual, k, v, Window(2))
        found = torch.autograd.forward_ad.unpack_dual(output).tangent
    expected = jvp(lambda q: attention(q, k, v, Window(2)), (q,), (tangent,))[1]
    torch.testing.assert_close(found, expected)


def test_third_derivatives_are_refused():
    q, k, v = (x[0] for x in tensors())
    leaves = q.clone().requires_grad_()
    value = attention(leaves, k, v, Window(2)).square().sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value.sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="at most twice"):
        torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["window", "global", "lists", "two_passes"])
def test_of_other_types(pattern, dtype):
    """Tangents and second derivatives in a type are near those in float64 of the same numbers."""
    shape = Shape(n_q=131, head_dim=16, value_dim=24)

    def results(tensors, table, tangents):
        leaves = [x.detach().requires_grad_() for x in [*tensors, table]]
        call = lambda q, k, v, b: attention(q, k, v, PATTERNS[pattern], bias=b)  # noqa: E731
        output = call(*leaves)
        first = torch.autograd.grad(
            output, leaves, tangents[0].expand_as(output), create_graph=True
        )
        second = torch.autograd.grad(first, leaves, tangents[1:5])
        return [*second, jvp(call, tuple(x.detach() for x in leaves), tuple(tangents[1:5]))[1]]

    given = cases.inputs(shape, dtype)
    table = cases.normal(4, seed=3, dtype=dtype).abs() * 0.1
    tangents = [
        cases.normal(2, 4, 131, 24, seed=4, dtype=dtype),
        *(cases.normal(*x.shape, seed=5 + i, dtype=dtype) for i, x in enumerate([*given, table])),
    ]
    ours = results(given, table, tangents)
    exact = results(
        *(
            [x.double() for x in part] if isinstance(part, list) else part.double()
            for part in (given, table, tangents)
        )
    )
    for result, truth in zip(ours, exact, strict=True):
        assert result.dtype == dtype
        scale = truth.abs().max().item()
        # Measured: at most 12 eps of the largest; half types round intermediate outputs as well.
        assert (result.double() - truth).abs().max().item() <= 40 * torch.finfo(dtype).eps * scale
