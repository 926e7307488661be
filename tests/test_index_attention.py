"""Attention of each query over its own list of keys: as a function, as an op, compiled."""

import cases
import pytest
import reference
import torch
from cases import DEVICE, DTYPES, Shape, inputs

from sparse_attn import Causal, Global, KeyLists, RandomTokens, Window, attention
from sparse_attn.functional import index_attention

ops = torch.ops.sparse_attn


def lists(shape, width=7, seed=0):
    """Random keys with repetitions, and counts, for each example and head."""
    generator = torch.Generator().manual_seed(seed)
    n_k = shape.n_q if shape.n_k is None else shape.n_k
    rows = (shape.batch, shape.heads, shape.n_q)
    indices = torch.randint(n_k, (*rows, width), generator=generator)
    counts = torch.randint(width + 1, rows, generator=generator)
    return indices.to(DEVICE), counts.to(DEVICE)


def allowed(indices, counts, n_k):
    """The dense mask."""
    listed = torch.arange(indices.shape[-1], device=DEVICE) < counts[..., None]
    mask = torch.zeros(*indices.shape[:-1], n_k, dtype=torch.int32, device=DEVICE)
    return mask.scatter_add(-1, indices, listed.int()) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(70, 131, 40, 24), Shape(131, 70, 16), Shape(1, 200), Shape(kv_heads=2)],
    ids=str,
)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32], ids=str)
def test_against_dense(shape, dtype, index_type):
    indices, counts = lists(shape)
    tensors = inputs(shape, dtype)
    n_k = tensors[1].shape[2]

    def ours(query, key, value):
        return index_attention(
            query,
            key,
            value,
            indices.to(index_type),
            counts.to(index_type),
            return_lse=True,
            enable_gqa=True,
        )

    reference.check(ours, tensors, allowed(indices, counts, n_k))


def test_order_and_repetition_do_not_count():
    tensors = inputs(Shape(n_q=60, head_dim=8))
    indices, _ = lists(Shape(n_q=60))
    shuffled = indices.flip(-1).repeat_interleave(2, -1)
    assert torch.equal(index_attention(*tensors, indices), index_attention(*tensors, shuffled))


def test_long_lists_are_sorted_another_way():
    """Few keys of many go through a sort, many of few through a set of bits."""
    tensors = inputs(Shape(n_q=3, n_k=5000, head_dim=8, batch=1, heads=1))
    few = cases.numbers(3, 4, below=5000)
    many = cases.numbers(3, 900, below=5000)
    for indices in (few, many):
        counts = torch.full((3,), indices.shape[1], device=DEVICE)
        exact = reference.dense_attention(*tensors, allowed(indices, counts, 5000))[0]
        torch.testing.assert_close(index_attention(*tensors, indices), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_of_several_parts(dtype):
    """The kernels take lists 64 keys at a time, those of 256 rows side by side: here up to 150 keys
    of 300 queries, so many heads that one share holds them all, and padding."""
    shape = Shape(300, 280, 8, batch=16, heads=4)
    indices, counts = lists(shape, width=150)
    counts[:, :, ::7] = 0
    padding = cases.bits(16, 280)

    def ours(query, key, value):
        options = {"key_padding_mask": padding, "return_lse": True}
        return index_attention(query, key, value, indices.int(), counts.int(), **options)

    mask = allowed(indices, counts, 280) & ~padding[:, None, None]
    reference.check(ours, inputs(shape, dtype), mask)


def test_gradcheck():
    indices, counts = lists(Shape(n_q=9, batch=1, heads=2), width=4)
    tensors = inputs(Shape(n_q=9, head_dim=3, batch=1, heads=2), torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: index_attention(*x, indices, counts), leaves)


@pytest.mark.parametrize("pattern", [None, RandomTokens(0.1) | Window(3) | Global([0])])
def test_threads_do_not_matter(pattern):
    shape = Shape(n_q=700, head_dim=32, batch=1, kv_heads=2)
    pattern = pattern or KeyLists(*lists(shape, width=60))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaves = [x.requires_grad_() for x in inputs(shape)]
            output = attention(*leaves, pattern, enable_gqa=True)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_op_and_backward():
    shape = Shape(n_q=40, head_dim=8)
    indices, counts = lists(shape)
    leaves = [x.requires_grad_() for x in inputs(shape)]
    output, lse = ops.index_attention(*leaves, indices, counts)
    grad = torch.randn_like(output)
    made = ops.index_attention_backward(grad, None, *leaves, output, lse, indices, counts)
    expected = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_opcheck():
    shape = Shape(n_q=20, head_dim=8)
    indices, counts = lists(shape)
    leaves = [x.requires_grad_() for x in inputs(shape)]
    layout = cases.bits(4, 2, 2)
    for words, tensors in (
        (KeyLists(indices, counts).encode(), [indices, counts]),
        ((15, 10), [layout]),
    ):
        torch.library.opcheck(ops.attention.default, (*leaves, words, tensors))


def test_compiled_with_lists_made_inside():
    def nearest(query, key, value):
        return index_attention(query, key, value, (query @ key.mT).topk(5).indices)

    tensors = inputs(Shape(n_q=50, head_dim=8))
    compiled = torch.compile(nearest, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), nearest(*tensors))


def test_an_edit_before_the_backward_pass_is_an_error():
    indices, _ = lists(Shape(n_q=20))
    leaves = [x.requires_grad_() for x in inputs(Shape(n_q=20, head_dim=8))]
    output = index_attention(*leaves, indices)
    indices[0, 0, 0, 0] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_with_other_patterns():
    shape = Shape(n_q=80, head_dim=8)
    indices, counts = lists(shape)
    tensors = inputs(shape)
    dense = allowed(indices, counts, 80)
    window = (Window(3) | Global([0])).mask(80).to(DEVICE)
    causal = Causal().mask(80).to(DEVICE)
    of_lists = KeyLists(indices, counts)
    for pattern, mask in (
        (of_lists | Window(3) | Global([0]), dense | window),
        (of_lists & Causal(), dense & causal),
        ((of_lists | Window(3) | Global([0])) & Causal(), (dense | window) & causal),
    ):
        exact = reference.dense_attention(*tensors, mask)[0]
        torch.testing.assert_close(attention(*tensors, pattern), exact)
