"""`sparse_attn.attention` against dense attention in float64, forward and backward."""

import math
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import reference
import torch
from cases import CUDA_KERNELS, DEVICE, DTYPES, HEAD_DIMS, PATTERNS, SHAPES, Shape, check, inputs

from sparse_attn import BigBird, Full, Global, RandomTokens, Strided, Window, attention

# A few that take different ways through the engine.
SOME = [
    *("window", "dilated_5", "causal_global", "global", "two_dilations", "empty_rows", "per_head"),
    *("strided_7", "bigbird_5", "random_tokens"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_dtypes(name, dtype):
    check(PATTERNS[name], inputs(SHAPES["base"], dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_shapes(name, shape):
    check(PATTERNS[name], inputs(SHAPES[shape]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["window_global", "dilated_causal"])
def test_head_dims(name, head_dim, dtype):
    """The fast sizes, those between them, and more than the largest."""
    if CUDA_KERNELS and head_dim > 256:
        with pytest.raises(NotImplementedError, match="heads of at most 256 with CUDA kernels"):
            attention(*inputs(Shape(n_q=100, head_dim=head_dim), dtype), Full())
        return
    check(PATTERNS[name], inputs(Shape(n_q=100, head_dim=head_dim), dtype))


@pytest.mark.parametrize("value_dim", [1, 24, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_dims(value_dim, dtype):
    check("Window(9) | Global([0])", inputs(Shape(n_q=90, head_dim=48, value_dim=value_dim), dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 31, 63, 64, 65, 67, 127, 193, 257, 515])
@pytest.mark.parametrize("name", SOME)
def test_lengths(name, n):
    check(PATTERNS[name], inputs(Shape(n_q=n, head_dim=16)))


@pytest.mark.parametrize(
    ("n_q", "n_k"), [(1, 200), (200, 1), (65, 64), (64, 65), (3, 257), (257, 3)]
)
@pytest.mark.parametrize("name", SOME)
def test_ends_are_aligned(name, n_q, n_k):
    check(PATTERNS[name], inputs(Shape(n_q=n_q, n_k=n_k, head_dim=16)))


@pytest.mark.parametrize(
    "expression",
    [
        "Window(130)",
        "Window(131)",
        "Window(10**12, 0)",
        "Window(3, 10**12)",
        "Window(math.inf)",
        "Window(2**62, 2**62, dilation=2**62)",
        "Window(200, dilation=130)",
        "Window(1, dilation=131)",
        "Window(0, 0, dilation=5)",
        "Global([])",
        "Global(range(0, 131, 2))",
        "GlobalKeys(range(131))",
        "Window(5) & Global([])",
        "Window(0, 2) & Causal()",
        " | ".join(f"GlobalKeys([{token}])" for token in range(0, 131, 2)),
        " | ".join(f"Window(1, dilation={dilation})" for dilation in range(1, 40)),
        "({}) & ({})".format(
            " | ".join(f"Window({d}, 0, dilation={d})" for d in range(1, 13)),
            " | ".join(f"Window({d}, 1, dilation={d + 1})" for d in range(1, 13)),
        ),
    ],
    ids=lambda expression: expression[:40],
)
def test_extremes(expression):
    check(expression, inputs(SHAPES["base"]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (12, 4), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gqa(heads, kv_heads, dtype):
    shape = Shape(n_q=100, head_dim=32, heads=heads, kv_heads=kv_heads)
    check("PerHead([Window(16) | Global([0]), Window(5, 0, dilation=3)])", inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_padding(name, dtype):
    shape = Shape(n_q=70, head_dim=32, batch=3)
    check(PATTERNS[name], inputs(shape, dtype), key_padding_mask=cases.padding(3, 70))


def test_padding_may_have_holes():
    holes = cases.random(2, 131) < 0.4
    check("Window(9) | Global([0, -1])", inputs(SHAPES["base"]), key_padding_mask=holes)


@pytest.mark.parametrize("name", ["window", "per_head", "global"])
def test_padding_of_everything_gives_zeros(name):
    query, key, value = (x.requires_grad_() for x in inputs(SHAPES["base"]))
    mask = torch.tensor([[True], [False]], device=DEVICE).expand(2, 131)
    output, lse = attention(
        query, key, value, cases.pattern(name), key_padding_mask=mask, return_lse=True
    )
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], -math.inf))
    loss = output.sum() + torch.where(lse.isinf(), 0, lse).sum()
    for gradient in torch.autograd.grad(loss, (query, key, value)):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert gradient[1].isfinite().all()
        assert gradient[1].abs().max() > 0


# A causal and a two-sided one of each kind; per-head patterns that agree on being causal.
WITH_GLOBAL_MASK = [
    "Window(16)",
    "Window(16, 0)",
    "Window(5, dilation=3)",
    "Window(5, 0, dilation=3)",
    "Window(9) | Global([0, -1])",
    "(Window(9, 0) | Global([0])) & Causal()",
    "Global([3])",
    "GlobalKeys([0]) & Window(5)",
    "Causal()",
    "Full()",
    "PerHead([Window(8), Window(4, dilation=2)])",
    "PerHead([Window(8, 0), Window(4, 0, dilation=2)])",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expression", WITH_GLOBAL_MASK)
def test_global_mask(expression, dtype):
    shape = Shape(n_q=131, head_dim=32)
    check(expression, inputs(shape, dtype), global_mask=cases.global_tokens(2, 131))


@pytest.mark.parametrize(("n_q", "n_k"), [(60, 131), (131, 60), (1, 131), (131, 1)])
@pytest.mark.parametrize("expression", WITH_GLOBAL_MASK)
def test_global_mask_with_padding_and_other_lengths(expression, n_q, n_k):
    expression = expression.replace("Global([3])", "Global([0])")
    check(
        expression,
        inputs(Shape(n_q=n_q, n_k=n_k, head_dim=16, kv_heads=2)),
        global_mask=cases.global_tokens(2, n_k),
        key_padding_mask=cases.padding(2, n_k),
    )


@pytest.mark.parametrize("expression", WITH_GLOBAL_MASK)
def test_global_mask_from_nobody_to_everybody(expression):
    mask = torch.zeros(4, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    mask[2, -1] = True
    mask[3, ::2] = True
    check(expression, inputs(Shape(n_q=70, head_dim=16, batch=4)), global_mask=mask)


@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("name", SOME)
def test_scale(name, scale):
    check(PATTERNS[name], inputs(Shape(head_dim=16)), scale=scale)


# Layouts: each takes the contiguous tensors and gives the call's own view of the same numbers.
LAYOUTS = {
    "heads_last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last_stride": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every_second": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["window_global", "dilated_5"])
def test_layouts_change_nothing(name, layout, dtype):
    tensors = inputs(Shape(n_q=100, head_dim=40), dtype)
    plain = check(PATTERNS[name], tensors)
    for moved in ([0], [1], [2], [0, 1, 2]):
        views = [LAYOUTS[layout](x) if n in moved else x for n, x in enumerate(tensors)]
        results = check(PATTERNS[name], views)
        for result, expected in zip(results.values(), plain.values(), strict=True):
            assert torch.equal(result, expected)


def test_packed_projection():
    """Query, key and value as three views of one (B, N, 3, H, D) tensor, and its gradient."""
    packed = cases.normal(2, 70, 3, 4, 32).requires_grad_()
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    ours = attention(query, key, value, Window(9))
    allowed = reference.allowed_pairs(reference.Window(9), query, key)
    dense, _ = reference.dense_attention(query, key, value, allowed)
    torch.testing.assert_close(ours, dense)
    ours, expected = (torch.autograd.grad(x.square().sum(), packed)[0] for x in (ours, dense))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_expanded_heads_and_gradients(dtype):
    """Stride 0 in the inputs, and in the gradient that `sum()` sends back."""
    query, key, value = inputs(Shape(n_q=100, head_dim=32), dtype)
    key, value = key[:, :1].expand(-1, 4, -1, -1), value[:1].expand(2, -1, -1, -1)
    check("Window(9) | Global([0])", [query, key, value])
    leaf = query.clone().requires_grad_()
    (ours,) = torch.autograd.grad(attention(leaf, key, value, Window(9)).sum(), leaf)
    ones = torch.ones_like(query)
    (expected,) = torch.autograd.grad(attention(leaf, key, value, Window(9)), leaf, ones)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", SOME)
def test_gradient_of_the_output_alone(name):
    check(PATTERNS[name], inputs(SHAPES["base"]), lse_gradient=False)


@pytest.mark.parametrize("name", SOME)
def test_gradient_of_the_logsumexp_alone(name):
    query, key, value = (x.double().requires_grad_() for x in inputs(Shape(head_dim=16)))
    expression = PATTERNS[name]
    allowed = reference.allowed_pairs(cases.definition(expression), query, key)
    _, ours = attention(query, key, value, cases.library(expression), return_lse=True)
    _, dense = reference.dense_attention(query, key, value, allowed)
    pair = [torch.where(x.isinf(), 0, x).square().sum() for x in (ours, dense)]
    ours, expected = (torch.autograd.grad(x, (query, key)) for x in pair)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 1], [1, 2]])
def test_gradient_of_some_inputs(wanted):
    tensors = inputs(SHAPES["base"], torch.float64)
    leaves = [x.clone().requires_grad_(n in wanted) for n, x in enumerate(tensors)]
    attention(*leaves, Window(9)).square().sum().backward()
    every = [x.clone().requires_grad_() for x in tensors]
    attention(*every, Window(9)).square().sum().backward()
    for n, (leaf, other) in enumerate(zip(leaves, every, strict=True)):
        assert torch.equal(leaf.grad, other.grad) if n in wanted else leaf.grad is None


def test_inputs_are_left_alone():
    tensors = [x.requires_grad_() for x in inputs(SHAPES["base"])]
    copies = [x.detach().clone() for x in tensors]
    attention(*tensors, Window(9)).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_without_return_lse_the_output_stands_alone():
    tensors = inputs(SHAPES["base"])
    output = attention(*tensors, Window(9))
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, attention(*tensors, Window(9), return_lse=True)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "n_q", "n_k", "value_dim"),
    [(0, 9, 9, 8), (2, 0, 9, 8), (2, 9, 0, 8), (2, 0, 0, 8), (2, 9, 9, 0)],
)
@pytest.mark.parametrize(
    "pattern",
    [Window(3), Window(3, dilation=2), Full(), Strided(3), BigBird(4), RandomTokens(0.5)],
    ids=repr,
)
def test_empty(pattern, batch, n_q, n_k, value_dim, dtype):
    shape = Shape(n_q=n_q, n_k=n_k, head_dim=8, value_dim=value_dim, batch=batch)
    leaves = [x.requires_grad_() for x in inputs(shape, dtype)]
    output, lse = attention(*leaves, pattern, return_lse=True)
    assert output.shape == (batch, 4, n_q, value_dim)
    assert lse.shape == (batch, 4, n_q)
    if n_k == 0:
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(lse, torch.full_like(lse, -math.inf))
    gradients = torch.autograd.grad(output.sum(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_no_heads():
    nothing = torch.zeros(2, 0, 9, 8, device=DEVICE)
    assert attention(nothing, nothing, nothing, Window(3)).shape == (2, 0, 9, 8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*SOME, "window_global", "full", "fixed", "radial"])
@pytest.mark.parametrize(
    "shape",
    [Shape(n_q=257), pytest.param(Shape(n_q=1500, batch=1, kv_heads=1), marks=pytest.mark.sample)],
    ids=["short", "long"],
)
def test_the_same_bits_for_any_number_of_threads(name, dtype, shape, threads):
    tensors = inputs(shape, dtype)
    n = tensors[1].shape[2]
    cotangents = (inputs(shape, dtype, seed=1)[0], cases.normal(*tensors[0].shape[:3]))

    def run(number: int) -> dict[str, torch.Tensor]:
        threads(number)
        return reference.with_gradients(
            lambda q, k, v: attention(
                q,
                k,
                v,
                cases.pattern(name),
                key_padding_mask=cases.padding(shape.batch, n),
                global_mask=cases.global_tokens(shape.batch, n),
                enable_gqa=True,
                return_lse=True,
            ),
            tensors,
            cotangents,
        )

    first = run(1)
    for number in (2, 1, 2, 3):
        for result, expected in zip(run(number).values(), first.values(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    """Logits of about a thousand: no overflow, and no more lost than their own rounding takes."""
    expression = "Window(16) | Global([0])"
    query, key, value = inputs(Shape(n_q=67, head_dim=16), dtype)
    query, key = 16 * query, 16 * key
    allowed = reference.allowed_pairs(cases.definition(expression), query, key)
    exact, exact_lse = reference.dense_attention(
        *(x.double() for x in (query, key, value)), allowed
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output, lse = attention(*leaves, cases.library(expression), return_lse=True)
    # A logit l is known to eps · l, and its weight relative to itself as well.
    rounding = 4 * torch.finfo(lse.dtype).eps * exact_lse.abs().max().item()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=rounding)
    rounding += torch.finfo(dtype).eps
    limit = rounding * value.abs().max().item()
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=limit)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum() + lse.sum(), leaves))


@pytest.mark.parametrize("factor", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("expression", ["Full()", "Window(9) | Window(5, dilation=3)"])
def test_peaked_rows(expression, factor):
    """With logits up to 1e9 each row is one key's, and no more may be lost than torch loses.

    What is lost are near-ties, one row in a thousand, and how they round is luck: many rows.
    """
    query, key, value = inputs(Shape(n_q=67, head_dim=16, batch=16))
    check(expression, [factor * query, factor * key, value])


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_near_the_largest_float(sign):
    query = torch.full((1, 1, 9, 4), 1e18, device=DEVICE)
    key = sign * query
    value = cases.normal(1, 1, 9, 4, dtype=torch.float32)
    output, lse = attention(query, key, value, Window(0), return_lse=True)
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(lse, torch.full_like(lse, sign * 2e36))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_stays_nan(where, dtype):
    tensors = inputs(Shape(n_q=100, head_dim=16), dtype)
    clean = attention(*tensors, Window(9))
    tensors[where][:, :, 50] = math.nan
    leaves = [x.requires_grad_() for x in tensors]
    output = attention(*leaves, Window(9))
    seen = torch.zeros(100, dtype=torch.bool, device=DEVICE)
    seen[50 if where == 0 else slice(41, 60)] = True
    assert output[:, :, seen].isnan().all()
    if where == 0:
        assert torch.equal(output[:, :, ~seen], clean[:, :, ~seen])
    torch.autograd.grad(output.sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("number", [math.inf, -math.inf])
def test_infinite_inputs_do_no_harm(where, number, dtype):
    tensors = inputs(Shape(n_q=400, head_dim=16), dtype)
    tensors[where][:, :, 300, 3] = number
    leaves = [x.requires_grad_() for x in tensors]
    output = attention(*leaves, Window(9))
    assert output[:, :, :100].isfinite().all()
    torch.autograd.grad(output.sum(), leaves)


def test_a_later_call_with_other_sizes_is_not_confused():
    """Plans are cached: the same pattern with other lengths, and back."""
    for n in (67, 257, 67, 1, 131, 67):
        check("Window(9) | Global([0])", inputs(Shape(n_q=n, head_dim=16)))


def test_calls_from_many_threads():
    """The same plans asked for, and made, by several Python threads at once."""
    lengths = [n for n in range(30, 90) for _ in range(2)]

    def run(n: int) -> torch.Tensor:
        return attention(*inputs(Shape(n_q=n, head_dim=8)), Window(7) | Global([0]))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, lengths))
    for n, result in zip(lengths, results, strict=True):
        assert torch.equal(result, run(n))


def test_the_set_counts_a_key_once():
    tensors = inputs(SHAPES["base"])
    once = attention(*tensors, Window(9))
    twice = attention(*tensors, Window(9) | Window(5) | Window(9, 0) | Window(0, 9))
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["window", "dilated_5", "global", "causal_global"])
def test_padded_keys_are_ignored_whatever_they_hold(name, dtype):
    shape = Shape(n_q=150, head_dim=16)
    clean = inputs(shape, dtype)
    dirty = inputs(shape, dtype)
    mask = cases.padding(shape.batch, 150)
    for tensor in dirty[1:]:
        tensor.masked_fill_(mask[:, None, :, None], math.nan)
    results = []
    for tensors in (clean, dirty):
        leaves = [x.requires_grad_() for x in tensors]
        output = attention(*leaves, cases.library(PATTERNS[name]), key_padding_mask=mask)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_no_gradient_whatever_comes(dtype):
    tensors = [x.requires_grad_() for x in inputs(Shape(n_q=70, head_dim=16), dtype)]
    mask = torch.zeros(tensors[0].shape[0], 70, dtype=torch.bool, device=DEVICE)
    mask[:, 3] = True  # and query 3 sees only itself
    output = attention(*tensors, Window(0), key_padding_mask=mask)
    grad = torch.ones_like(output)
    grad[:, :, 3] = math.nan
    for gradient in torch.autograd.grad(output, tensors, grad):
        assert gradient.isfinite().all()
        assert (gradient[:, :, 3] == 0).all()
