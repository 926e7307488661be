"""Products and sums over listed pairs, and the lists themselves."""

import cases
import pytest
import reference
import torch
from cases import DEVICE, PATTERNS, SIZED, Shape
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

OPS = torch.ops.sparse_attn
LENGTHS = [(67, 67), (30, 67), (67, 30), (1, 131), (131, 131)]


def indices(name: str, shape: Shape, **masks: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of a named pattern, on the device."""
    expression, sizes = (PATTERNS | SIZED)[name], cases.sizes(shape)
    n_q, n_k = sizes["n_q"], sizes["n_k"]
    pattern = cases.library(expression, shape)
    pairs = OPS._pattern_pairs(
        pattern.encode(), pattern.tensors(n_q, n_k), n_q, n_k, shape.batch, shape.heads, **masks
    )
    return tuple(x.to(DEVICE) for x in pairs)


def coordinates(crow: Tensor, col: Tensor) -> tuple[Tensor, ...]:
    """Example, head, query and key of each pair."""
    batch, heads, rows = crow.shape
    places = (torch.zeros(batch, heads, rows - 1, device=DEVICE) == 0).nonzero()
    return (*places.repeat_interleave(crow.diff().flatten(), 0).unbind(1), col)


def dense(crow: Tensor, col: Tensor, values: Tensor, n_k: int) -> Tensor:
    """(batch, heads, n_q, n_k) with the values at their pairs."""
    batch, heads, rows = crow.shape
    zeros = values.new_zeros(batch, heads, rows - 1, n_k)
    return zeros.index_put(coordinates(crow, col), values)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", [*PATTERNS, *SIZED])
def test_pairs_are_those_of_the_pattern(name, lengths):
    """Every allowed pair once, keys ascending."""
    shape = Shape(*lengths)
    crow, col = indices(name, shape)
    counts = dense(crow, col, torch.ones(len(col), device=DEVICE), lengths[1])
    rule = cases.definition((PATTERNS | SIZED)[name], shape)
    allowed = torch.from_numpy(rule.mask(*lengths, shape.heads).copy()).to(DEVICE)
    assert torch.equal(counts == 1, allowed.expand(counts.shape))
    assert crow[0, 0, 0] == 0
    assert crow[-1, -1, -1] == len(col) == int(counts.sum())
    example, head, query, key = coordinates(crow, col)
    row = (example * shape.heads + head) * lengths[0] + query
    assert (key.diff()[row.diff() == 0] > 0).all()


@pytest.mark.parametrize("name", [*PATTERNS, "mask_examples", "lists_causal", "layout_heads"])
def test_pairs_with_masks(name):
    shape = Shape(37, 41)
    query, key, _ = cases.inputs(shape)
    masks = {"key_padding_mask": cases.padding(2, 41), "global_mask": cases.global_tokens(2, 41)}
    crow, col = indices(name, shape, **masks)
    counts = dense(crow, col, torch.ones(len(col), device=DEVICE), 41)
    rule = cases.definition((PATTERNS | SIZED)[name], shape)
    if isinstance(rule, reference.HeadRules) and len({one.causal for one in rule.rules}) > 1:
        pytest.skip("heads that differ in what global tokens mean")
    allowed = reference.allowed_pairs(rule, query, key, *masks.values())
    assert torch.equal(counts == 1, allowed.expand(counts.shape))


def factors(
    shape: Shape, dtype: torch.dtype, name: str = "per_head"
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """values, rows, columns and the indices."""
    rows, columns, _ = cases.inputs(shape, dtype)
    pairs = indices(name, shape)
    wide = torch.promote_types(dtype, torch.float32)
    return cases.normal(len(pairs[1]), dtype=wide), rows, columns, pairs


def as_dense(values: Tensor, rows: Tensor, columns: Tensor, pairs) -> tuple[Tensor, ...]:
    """What the three ops stand for, in float64."""
    values, rows, columns = (x.double() for x in (values, rows, columns))
    heads_kv, n_k = columns.shape[1:3]
    repeated = columns.repeat_interleave(rows.shape[1] // heads_kv, 1)
    matrix = dense(*pairs, values, n_k)
    of_columns = (matrix.mT @ rows).unflatten(1, (heads_kv, -1)).sum(2)
    return (rows @ repeated.mT)[coordinates(*pairs)], matrix @ repeated, of_columns


def run(values: Tensor, rows: Tensor, columns: Tensor, pairs) -> tuple[Tensor, ...]:
    heads_kv, n_k = columns.shape[1:3]
    return (
        OPS.pair_products(rows, columns, *pairs),
        OPS.pair_sums(values, columns, *pairs),
        OPS.pair_column_sums(values, rows, *pairs, heads_kv, n_k),
    )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(kv_heads=2),
        Shape(kv_heads=1, head_dim=40),
        Shape(37, 67, head_dim=1),
        Shape(67, 37, head_dim=7, kv_heads=2),
        Shape(1, head_dim=300),
        Shape(67, head_dim=15, batch=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["per_head", "empty_rows", "random_tokens", "window_global"])
def test_against_dense_products(name, shape, dtype):
    given = factors(shape, dtype, name)
    values, rows, columns, pairs = given
    exact = as_dense(*given)
    # What the terms of each sum add up to without their signs: the scale of rounding errors.
    largest = as_dense(values.abs(), rows.abs(), columns.abs(), pairs)
    types = (values.dtype, dtype, dtype)
    for result, expected, size, kind in zip(run(*given), exact, largest, types, strict=True):
        assert result.dtype == kind
        assert result.shape == expected.shape
        if not result.numel():
            continue
        sums = 64 * torch.finfo(values.dtype).eps * size
        kind = torch.finfo(kind)
        rounding = kind.eps * (expected.abs() + kind.smallest_normal)
        assert ((result.double() - expected).abs() <= sums + rounding).all()


def test_strides_do_not_matter():
    values, rows, columns, pairs = factors(Shape(kv_heads=2), torch.float32)
    expected = run(values, rows, columns, pairs)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (rows, columns)]
    turned = [x.mT.contiguous().mT for x in (rows, columns)]
    for others in (moved, turned):
        for result, other in zip(run(values, *others, pairs), expected, strict=True):
            assert torch.equal(result, other)
    spread = rows[:, :, :1].expand(rows.shape)
    assert torch.equal(
        OPS.pair_products(spread, columns, *pairs),
        OPS.pair_products(spread.contiguous(), columns, *pairs),
    )


def test_threads_do_not_matter():
    given = factors(Shape(513, kv_heads=2), torch.float32, "window_global")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(*given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SMALL = Shape(6, 5, head_dim=3, kv_heads=2, heads=4, batch=1)


def small_calls(requires_grad: bool = True) -> list[tuple]:
    """(function of two factors, factors) for each op."""
    values, rows, columns, pairs = factors(SMALL, torch.float64)
    for x in (values, rows, columns):
        x.requires_grad_(requires_grad)
    sizes = columns.shape[1:3]
    return [
        (lambda a, b: OPS.pair_products(a, b, *pairs), (rows, columns)),
        (lambda a, b: OPS.pair_sums(a, b, *pairs), (values, columns)),
        (lambda a, b: OPS.pair_column_sums(a, b, *pairs, *sizes), (values, rows)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_derivatives(number):
    function, given = small_calls()[number]
    assert gradcheck(function, given, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, given, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("number", range(3))
def test_third_derivative(number):
    """Of a form linear in each factor: not zero only where the two factors alternate."""
    function, given = small_calls()[number]

    def cubic(*x: Tensor) -> Tensor:
        return function(*x).pow(3).sum()

    a, b = given
    (first,) = torch.autograd.grad(cubic(a, b), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), b, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), a)
    step = 1e-4 * torch.ones_like(a)

    def mixed(a: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(cubic(a, b), a, create_graph=True)
        return torch.autograd.grad(g.sum(), b)[0].sum()

    difference = (mixed(a + step) - mixed(a - step)) / 2e-4
    torch.testing.assert_close(third.sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", range(3))
def test_transforms_of_torch_func(number):
    function, (a, b) = small_calls(requires_grad=False)[number]
    tangents = torch.randn_like(a), torch.randn_like(b)
    out, tangent = torch.func.jvp(function, (a, b), tangents)
    expected = function(tangents[0], b) + function(a, tangents[1])
    torch.testing.assert_close(tangent, expected)
    assert torch.equal(out, function(a, b))
    batched = torch.vmap(function)(torch.stack([a, 2 * a]), torch.stack([b, b]))
    torch.testing.assert_close(batched, torch.stack([out, 2 * out]))
    hessian = torch.func.hessian(lambda a: function(a, b).square().sum())(a)
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacfwd(
        lambda a: function(a, b).square().sum()))(a))  # fmt: skip
    assert hessian.abs().max() > 0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_opcheck(dtype):
    values, rows, columns, pairs = factors(Shape(9, 7, head_dim=3, kv_heads=2), dtype)
    for x in (values, rows, columns):
        x.requires_grad_()
    opcheck(OPS.pair_products.default, (rows, columns, *pairs))
    opcheck(OPS.pair_sums.default, (values, columns, *pairs))
    opcheck(OPS.pair_column_sums.default, (values, rows, *pairs, 2, 7))


@pytest.mark.parametrize("name", ["n_q", "n_k", "batch", "size", "pairs"])
def test_empty(name):
    sizes = {"n_q": 3, "n_k": 4, "batch": 2, "size": 5} | {name: 0}
    crow = torch.zeros(sizes["batch"], 4, sizes["n_q"] + 1, dtype=torch.long, device=DEVICE)
    col = torch.zeros(0, dtype=torch.long, device=DEVICE)
    rows = cases.normal(sizes["batch"], 4, sizes["n_q"], sizes["size"])
    columns = cases.normal(sizes["batch"], 2, sizes["n_k"], sizes["size"])
    products, sums, column_sums = run(col.double(), rows, columns, (crow, col))
    assert products.shape == (0,)
    assert torch.equal(sums, torch.zeros_like(rows))
    assert torch.equal(column_sums, torch.zeros_like(columns))


def test_integers_in_half_types_are_exact():
    """Sums are in float32: 300 ones in bfloat16 would stop at 256."""
    crow = torch.tensor([[[0, 300]]], device=DEVICE)
    col = torch.arange(300, device=DEVICE)
    ones = torch.ones(1, 1, 300, 1, dtype=torch.bfloat16, device=DEVICE)
    products = OPS.pair_products(257 * ones[:, :, :1], ones, crow, col)
    assert products.dtype == torch.float32
    values = torch.ones(300, device=DEVICE)
    assert OPS.pair_sums(values, ones, crow, col).item() == 300


def changed(**other: object) -> dict:
    values, rows, columns, (crow, col) = factors(SMALL, torch.float64)
    given = {"values": values, "rows": rows, "columns": columns, "crow": crow, "col": col}
    return given | {k: f(given[k]) if callable(f) else f for k, f in other.items()}


PRODUCTS, SUMS = ("rows", "columns", "crow", "col"), ("values", "columns", "crow", "col")
WRONG = [
    (PRODUCTS, {"rows": lambda x: x[0]}, ValueError, ["rows", "4 dimensions"]),
    (PRODUCTS, {"rows": lambda x: x[..., :2]}, ValueError, ["columns", "shape"]),
    (PRODUCTS, {"rows": lambda x: x.float()}, TypeError, ["columns", "Float", "Double"]),
    (PRODUCTS, {"rows": lambda x: x.long()}, TypeError, ["rows", "Long"]),
    (PRODUCTS, {"crow": lambda x: x[0]}, ValueError, ["crow_indices", "batch, heads, queries"]),
    (PRODUCTS, {"crow": lambda x: x.int()}, TypeError, ["crow_indices", "int64"]),
    (PRODUCTS, {"crow": lambda x: x[:, :, 1:]}, ValueError, ["rows", "shape"]),
    (PRODUCTS, {"crow": lambda x: x + 1}, ValueError, ["crow_indices", "ascend"]),
    (PRODUCTS, {"crow": lambda x: x.flip(2)}, ValueError, ["crow_indices", "ascend"]),
    (SUMS, {"columns": lambda x: x[:, :1].expand(-1, 3, -1, -1)}, ValueError, ["heads", "3"]),
    (SUMS, {"col": lambda x: x + 3}, ValueError, ["col_indices", "[0, 5)"]),
    (SUMS, {"col": lambda x: x - 1}, ValueError, ["col_indices", "-1"]),
    (SUMS, {"col": lambda x: x[None]}, ValueError, ["col_indices", "(pairs)"]),
    (SUMS, {"values": lambda x: x[1:]}, ValueError, ["values", "shape"]),
    (SUMS, {"values": lambda x: x.float()}, TypeError, ["values", "Double"]),
]


@pytest.mark.skipif(cases.CUDA_KERNELS, reason="asserts on the device instead")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(("names", "other", "exception", "words"), WRONG)
def test_wrong_input(names, other, exception, words, mode):
    given = changed(**other)
    op = OPS.pair_products if names == PRODUCTS else OPS.pair_sums
    with mode(), pytest.raises(exception) as caught:
        op(*(given[name] for name in names))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.skipif(cases.CUDA_KERNELS, reason="asserts on the device instead")
def test_wrong_sizes_of_column_sums():
    g = changed()
    given = g["values"], g["rows"], g["crow"], g["col"]
    for sizes, words in (((3, 5), ["heads", "3"]), ((2, 4), ["col_indices", "[0, 4)"])):
        with pytest.raises(ValueError, match="sparse_attn") as caught:
            OPS.pair_column_sums(*given, *sizes)
        assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("arguments", "masks", "exception", "words"),
    [
        ((9, 9, 2, 3), {}, ValueError, ["4", "3"]),  # four patterns for three heads
        ((-1, 9, 2, 4), {}, ValueError, ["n_q", "-1"]),
        ((9, 9, 2, 4), {"key_padding_mask": (2, 8)}, ValueError, ["key_padding_mask", "2, 8"]),
        ((9, 9, 2, 4), {"global_mask": (1, 9)}, ValueError, ["global_mask", "1, 9"]),
    ],
)
def test_wrong_input_of_the_list(arguments, masks, exception, words):
    pattern = cases.pattern("per_head")
    masks = {name: torch.zeros(size, dtype=torch.bool) for name, size in masks.items()}
    with pytest.raises(exception) as caught:
        OPS._pattern_pairs(pattern.encode(), (), *arguments, **masks)
    assert all(word in str(caught.value) for word in words), caught.value
