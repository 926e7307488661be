"""The op of causal linear attention: products with prefix sums, closed under differentiation."""

import subprocess
import sys

import cases
import linear_reference as reference
import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_isa import LEVELS, run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import sparse_attn

OP = torch.ops.sparse_attn.causal_products
LENGTHS = [(67, 67), (30, 67), (67, 30), (1, 131), (131, 131), (200, 70), (64, 128), (129, 1)]


def factors(n_q, n_k, size=33, value_dim=20, dtype=torch.float64, batch=2, heads=3):
    return [
        cases.normal(batch, heads, n, d, seed=i, dtype=torch.float64).to(DEVICE, dtype)
        for i, (n, d) in enumerate(((n_q, size), (n_k, size), (n_k, value_dim)))
    ]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_definition(lengths, reverse):
    tensors = factors(*lengths)
    expected = reference.causal_products(*tensors, reverse)
    torch.testing.assert_close(OP(*tensors, reverse), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(150, 150), (40, 150)], ids=str)
def test_error(lengths, dtype):
    reference.check(OP, [reference.causal_products], factors(*lengths, dtype=dtype))


@given(
    n_q=st.integers(1, 200),
    n_k=st.integers(1, 200),
    size=st.integers(1, 70),
    value_dim=st.integers(1, 70),
    heads=st.integers(1, 3),
    reverse=st.booleans(),
)
@settings(max_examples=60)
def test_any_sizes(n_q, n_k, size, value_dim, heads, reverse):
    tensors = factors(n_q, n_k, size, value_dim, heads=heads, batch=1)
    expected = reference.causal_products(*tensors, reverse)
    torch.testing.assert_close(OP(*tensors, reverse), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(2100, 2100), (1500, 2100), (2100, 1500)], ids=str)
def test_segments(lengths, reverse):
    """Few heads are cut into segments."""
    tensors = factors(*lengths, size=9, value_dim=7, batch=1, heads=2)
    expected = reference.causal_products(*tensors, reverse)
    torch.testing.assert_close(OP(*tensors, reverse), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("sizes", [(1024, 5), (1030, 40), (3, 300), (1, 1)], ids=str)
def test_large_sizes(sizes):
    tensors = factors(70, 70, *sizes)
    expected = reference.causal_products(*tensors)
    torch.testing.assert_close(OP(*tensors), expected, rtol=1e-11, atol=1e-10)


def test_strides_are_free():
    wide = cases.normal(2, 40, 3, 3 * 16).to(DEVICE)
    query, key, value = wide.transpose(1, 2).split(16, -1)
    expected = reference.causal_products(query, key, value)
    torch.testing.assert_close(OP(query, key, value), expected)
    turned = [x.mT.contiguous().mT for x in (query, key, value)]
    torch.testing.assert_close(OP(*turned), expected)
    broadcast = query[:1, :1].expand_as(query)
    expected = reference.causal_products(broadcast, key, value)
    torch.testing.assert_close(OP(broadcast, key, value), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 6), (6, 4)], ids=str)
def test_derivatives(lengths, reverse):
    tensors = [x.requires_grad_() for x in factors(*lengths, 3, 2, batch=1, heads=2)]
    function = lambda *x: OP(*x, reverse)  # noqa: E731
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_third_derivative():
    query, key, value = (x.requires_grad_() for x in factors(5, 6, 3, 2, batch=1, heads=2))

    def mixed(product):
        (first,) = torch.autograd.grad(product(query, key, value).pow(3).sum(), query,
                                       create_graph=True)  # fmt: skip
        (second,) = torch.autograd.grad(first.sum(), key, create_graph=True)
        return torch.autograd.grad(second.sum(), value)[0]

    torch.testing.assert_close(mixed(OP), mixed(reference.causal_products))


def test_transforms_of_torch_func():
    tensors = factors(5, 6, 3, 2, batch=1, heads=2)
    grad = torch.func.grad(lambda *x: OP(*x).square().sum(), argnums=(0, 1, 2))(*tensors)
    expected = torch.func.grad(
        lambda *x: reference.causal_products(*x).square().sum(), argnums=(0, 1, 2)
    )(*tensors)
    torch.testing.assert_close(grad, expected)
    stacked = [torch.stack([x, 2 * x]) for x in tensors]
    batched = torch.vmap(OP)(*stacked)
    torch.testing.assert_close(batched, torch.stack([OP(*x) for x in zip(*stacked, strict=True)]))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(dtype):
    tensors = [x.requires_grad_() for x in factors(9, 7, 5, 3, dtype)]
    opcheck(OP, tensors)
    opcheck(OP, (*tensors, True))


@pytest.mark.parametrize("name", ["batch", "heads", "n_q", "n_k", "size", "value_dim"])
def test_empty(name):
    sizes = {"batch": 2, "heads": 3, "n_q": 4, "n_k": 5, "size": 3, "value_dim": 2} | {name: 0}
    tensors = [x.requires_grad_() for x in factors(**sizes)]
    output = OP(*tensors)
    assert output.shape == (sizes["batch"], sizes["heads"], sizes["n_q"], sizes["value_dim"])
    assert torch.equal(output, torch.zeros_like(output))
    output.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in tensors)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the CPU's")
def test_threads_give_the_same_bits():
    tensors = factors(2100, 2100, 20, 17, torch.float32, batch=1, heads=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([OP(*tensors), OP(*tensors, True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_later_keys_change_no_bit_of_earlier_rows():
    tensors = factors(300, 300, 20, 17, torch.float32)
    before = OP(*tensors)
    for x in tensors[1:]:
        x[:, :, 200:] = 1e4
    after = OP(*tensors)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before, after)


def test_half_types_are_summed_in_float32():
    ones = torch.ones(1, 1, 300, 1, dtype=torch.bfloat16, device=DEVICE)
    assert OP(ones, ones, ones)[0, 0, -1, 0] == 300


def tensors_with(position: int, change) -> list[Tensor]:
    tensors = factors(6, 5, 4, 3)
    tensors[position] = change(tensors[position])
    return tensors


@pytest.mark.parametrize(
    ("position", "change", "exception", "words"),
    [
        (0, lambda x: x[0], ValueError, ["query", "batch, heads"]),
        (0, lambda x: x.long(), TypeError, ["query", "Long"]),
        (1, lambda x: x.float(), TypeError, ["key", "Double", "Float"]),
        (1, lambda x: x[:1], ValueError, ["key", "batch", "2"]),
        (1, lambda x: x[:, :1], ValueError, ["key", "heads", "3"]),
        (1, lambda x: x[..., :2], ValueError, ["key", "size", "4"]),
        (2, lambda x: x[:, :, :2], ValueError, ["value", "length", "5"]),
    ],
)
def test_wrong_input(position, change, exception, words):
    with pytest.raises(exception) as caught:
        OP(*tensors_with(position, change))
    assert all(word in str(caught.value) for word in words), caught.value


def check_numbers() -> None:
    """Every path of one instruction set."""
    for dtype in cases.DTYPES:
        for sizes in ((64, 64), (33, 17), (266, 65), (5, 1)):
            reference.check(OP, [reference.causal_products], factors(130, 140, *sizes, dtype))
    features = torch.ops.sparse_attn.positive_features
    for size in (1, 7, 33, 64):
        x = cases.normal(1, 2, 19, size)
        projection = cases.normal(2 * size + 1, size, seed=1)
        for mode in range(3):
            exact, single = (features(x.to(t), projection.to(t), None, mode) for t in
                             (torch.float64, torch.float32))  # fmt: skip
            torch.testing.assert_close(single[0].double(), exact[0], rtol=2e-5, atol=1e-12)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="instruction sets are the CPU's")
@pytest.mark.parametrize("isa", sparse_attn.build_info()["isas"])
def test_instruction_sets(isa):
    if not LEVELS.get(isa, True):
        pytest.skip(f"this machine has no {isa}")
    result = run(isa, __file__)
    assert result.returncode == 0, result.stderr[-3000:]


LONG = 65536
PROBE = """
import torch
from sparse_attn.functional import linear_attention, performer_attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    leaves = [torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3)]
    before = peak()
    {call}.sum().backward()
    return peak() - before

step(256)
print(step({long}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("function", ["linear_attention", "performer_attention"])
def test_memory_is_linear(function, is_causal):
    """A row of scores for each query would be 16 GiB. Performer's 44 features are 2.75 tensors of
    16 columns, of query and of key, with gradients."""
    options = ", num_features=44" if function == "performer_attention" else ""
    program = PROBE.format(call=f"{function}(*leaves, is_causal={is_causal}{options})", long=LONG)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 40 * LONG * 16 * 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_numbers()
