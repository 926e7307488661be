"""Attention over parts of the keys, joined, against attention over all of them."""

import math

import cases
import pytest
import torch
from cases import normal
from torch.autograd import gradcheck, gradgradcheck

import sparse_attn
from sparse_attn import Full, KeyLists, Mask, Window, attention, merge

# Each gives a pattern, and two that share its pairs between them.


def split_window(n_q, n_k):
    left, right = Window(9, 0), Window(0, 7)
    distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q)
    return Window(9, 7), left, right & Mask((distance > 0).to(cases.DEVICE))


def split_masks(n_q, n_k):
    whole = Window(20, dilation=3) | sparse_attn.Global([0])
    allowed = whole.mask(n_q, n_k).to(cases.DEVICE)
    early = torch.arange(n_k, device=cases.DEVICE) < n_k // 3
    return whole, Mask(allowed & early), Mask(allowed & ~early)


def split_lists(n_q, n_k):
    shuffled = cases.random(n_q, n_k).argsort(-1)
    return KeyLists(shuffled[:, :9]), KeyLists(shuffled[:, :4]), KeyLists(shuffled[:, 4:9])


SPLITS = [split_window, split_masks, split_lists]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("n_q", "n_k"), [(67, 67), (40, 67), (67, 40), (1, 67)])
def test_parts_make_the_whole(split, n_q, n_k):
    shape = cases.Shape(n_q=n_q, n_k=n_k, heads=2, head_dim=12, value_dim=5)
    query, key, value = (x.requires_grad_() for x in cases.inputs(shape, torch.float64))
    whole, *parts = split(n_q, n_k)
    expected = attention(query, key, value, whole, return_lse=True)
    found = [attention(query, key, value, part, return_lse=True) for part in parts]
    merged = merge(*found[0], *found[1])
    for ours, exact in zip(merged, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)

    def gradients(output, lse):
        loss = output.square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
        return torch.autograd.grad(loss, (query, key, value))

    for ours, exact in zip(gradients(*merged), gradients(*expected), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shift", [4.0, 12.0, 16.0, -16.0])
def test_gradient_through_a_small_share_is_precise(shift):
    """In float32, of a part with e^-shift of the weight; torch's softmax is the measure."""
    logits = cases.normal(2, 64, dtype=torch.float32)
    logits[0] += shift
    values = cases.normal(2, 64, 3, dtype=torch.float32)

    def exact(logits):
        return (torch.softmax(logits, 0)[..., None] * values.to(logits.dtype)).sum(0)

    def merged(logits):
        return merge(values[0], logits[0], values[1], logits[1])[0]

    def gradient(function, logits):
        logits = logits.clone().requires_grad_()
        return torch.autograd.grad(function(logits).square().sum(), logits)[0]

    expected = gradient(exact, logits.double())
    found = gradient(merged, logits)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_three_parts_in_any_order():
    query, key, value = cases.inputs(cases.Shape(n_q=30), torch.float64)
    cuts = zip(key.tensor_split(3, 2), value.tensor_split(3, 2), strict=True)
    a, b, c = [attention(query, k, v, Full(), return_lse=True) for k, v in cuts]
    expected = attention(query, key, value, Full(), return_lse=True)
    for joined in (merge(*merge(*a, *b), *c), merge(*b, *merge(*c, *a))):
        for ours, exact in zip(joined, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def states(seed):
    """Output and log-sum-exp of 5 queries, of which the second and third saw no key."""
    empty = torch.zeros(5, dtype=torch.bool, device=cases.DEVICE)
    empty[1 + seed : 3 + seed] = True
    output = normal(2, 5, 3, seed=seed).masked_fill(empty[:, None], 0)
    lse = normal(2, 5, seed=seed + 10).masked_fill(empty, -math.inf)
    return output, lse


def loose(out1, lse1, out2, lse2):
    """`merge` of finite leaves: empty rows are made inside, so that gradcheck can move all else."""
    (_, empty1), (_, empty2) = states(0), states(1)
    lse1 = lse1.masked_fill(empty1.isinf(), -math.inf)
    lse2 = lse2.masked_fill(empty2.isinf(), -math.inf)
    out, lse = merge(out1, lse1, out2, lse2)
    return out, lse.masked_fill(lse.isinf(), 0)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(check):
    leaves = [normal(2, 5, 3), normal(2, 5, seed=1), normal(2, 5, 3, seed=2), normal(2, 5, seed=3)]
    forward = {"check_forward_ad": True} if check is gradcheck else {"check_fwd_over_rev": True}
    assert check(loose, [x.requires_grad_() for x in leaves], **forward)


def test_rows_without_keys():
    """Row 1: first part empty; row 2: both; row 3: second part. No NaN, also two derivatives on."""
    (out1, lse1), (out2, lse2) = states(0), states(1)
    leaves = [x.requires_grad_() for x in (out1, lse1, out2, lse2)]
    out, lse = merge(*leaves)
    assert torch.equal(out[:, 1], out2[:, 1])
    assert torch.equal(lse[:, 1], lse2[:, 1])
    assert torch.equal(out[:, 3], out1[:, 3])
    assert torch.equal(lse[:, 3], lse1[:, 3])
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert (lse[:, 2] == -math.inf).all()
    loss = out.sin().sum() + lse[:, [0, 1, 3, 4]].sin().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert all((g[:, 2] == 0).all() for g in first)


def test_garbage_where_no_key_was_seen_is_not_read():
    (out1, lse1), (out2, lse2) = states(0), states(1)
    spoiled = torch.where(lse1.isinf()[..., None], math.nan, out1)
    for ours, exact in zip(
        merge(spoiled, lse1, out2, lse2), merge(out1, lse1, out2, lse2), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    (out1, lse1), (out2, lse2) = states(0), states(1)
    out, lse = merge(out1.to(dtype), lse1.float(), out2.to(dtype), lse2.float())
    exact = merge(out1.to(dtype).double(), lse1, out2.to(dtype).double(), lse2)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), exact[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_far_apart():
    out1, out2 = normal(1, 1, 2), normal(1, 1, 2, seed=1)
    lse1, lse2 = out1.new_tensor([[1e4]]), out1.new_tensor([[-1e4]])
    out, lse = merge(out1, lse1, out2, lse2)
    assert torch.equal(out, out1)
    assert torch.equal(lse, lse1)


def test_compiles():
    parts = (*states(0), *states(1))
    for ours, exact in zip(
        torch.compile(merge, fullgraph=True, backend="aot_eager")(*parts),
        merge(*parts),
        strict=True,
    ):
        assert torch.equal(ours, exact)


def test_errors():
    out, lse = states(0)
    for arguments, error, words in [
        ((out, lse, out, lse[:, :4]), ValueError, "lse2 of shape"),
        ((out, lse, out[:1], lse), ValueError, "out2 of shape"),
        ((out, lse[..., None], out, lse), ValueError, "lse1 of shape"),
        ((out[0, 0], lse, out, lse), ValueError, "out1 of shape"),
        ((out, lse, out.float(), lse), TypeError, "out2 of dtype"),
        ((out, lse, out, lse.float()), TypeError, "lse2 of dtype"),
        ((out, None, out, lse), TypeError, "lse1 to be a floating Tensor, got NoneType"),
        ((out.long(), lse, out, lse), TypeError, "out1 to be a floating Tensor"),
        ((out, lse, out.to("meta"), lse), ValueError, "out2 on"),
    ]:
        with pytest.raises(error, match=words):
            merge(*arguments)
