"""`MultiheadAttention` against torch's, under the equivalent dense mask."""

import copy
import inspect
import itertools
import math
import pickle
import warnings

import cases
import pytest
import torch
from cases import DEVICE
from reference import assert_within_budget
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import (
    BlockLayout,
    Causal,
    Global,
    Mask,
    MultiheadAttention,
    Pattern,
    PerHead,
    RandomBlocks,
    Window,
)

EMBED, HEADS = 32, 4
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "kdim_vdim": {"kdim": 24, "vdim": 40, "batch_first": True},
    "vdim": {"vdim": 16, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both_added": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 8, "vdim": 8},
}
PATTERNS = [
    Window(3),
    (Window(4, 0) | Global([0, -1])) & Causal(),
    PerHead([Window(2), Window(3, dilation=2)]),
    RandomBlocks(1, 4, seed=3) | Window(1),
]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.normal(*size, seed=seed, dtype=dtype)


def pair(seed: int = 0, dtype=torch.float32, *, pattern=None, **options):
    """Torch's module and ours, from the same seed, with biases that are not 0."""
    modules = []
    for make in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(seed)
        extra = {"pattern": pattern} if make is MultiheadAttention else {}
        module = make(EMBED, HEADS, **options, **extra).to(DEVICE, dtype)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.3 * noise)
        modules.append(module)
    return modules


def inputs(module, n_q=13, n_k=None, batch=3, dtype=torch.float32, seed=0) -> list[Tensor]:
    n_k = n_q if n_k is None else n_k
    sizes = ((n_q, module.embed_dim), (n_k, module.kdim), (n_k, module.vdim))
    shapes = [(n, size) if batch is None else (batch, n, size) for n, size in sizes]
    drawn = [normal(*shape, seed=seed + i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    if batch is not None and not module.batch_first:
        drawn = [x.transpose(0, 1).contiguous() for x in drawn]
    return [x.to(dtype) for x in drawn]


def padding(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]


def disallowed(pattern: Pattern, n_q: int, n_k: int, batch: int) -> Tensor:
    """The equivalent attn_mask, (batch · heads, n_q, n_k)."""
    mask = ~pattern.mask(n_q, n_k, heads=HEADS).to(DEVICE)
    return mask.expand(batch, *mask.shape[-3:]).flatten(0, 1)


def results(module, tensors: list[Tensor], **call) -> dict[str, Tensor]:
    """Outputs and gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    module.zero_grad()
    output, weights = module(*leaves, **call)
    made = {"output": output} | ({} if weights is None else {"weights": weights})
    total = sum((x * normal(*x.shape, seed=9).to(x)).sum() for x in made.values())
    total.backward()
    made |= {f"grad {i}": x.grad for i, x in enumerate(leaves)}
    made |= {f"grad {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in made.items()}


def in_double(call: dict) -> dict:
    return {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in call.items()
    }


def assert_equal_to_torch(theirs, ours, tensors, call, their_call=None) -> None:
    """Output, weights and all gradients, with at most twice torch's error."""
    their_call = call if their_call is None else their_call
    double = copy.deepcopy(theirs).double()
    exact = results(double, [x.double() for x in tensors], **in_double(their_call))
    torchs, result = results(theirs, tensors, **their_call), results(ours, tensors, **call)
    assert result.keys() == exact.keys()
    for name, x in result.items():
        assert_within_budget(name, x, [torchs[name]], exact[name])


def assert_modules_agree(name: str, call: dict, dtype=torch.float32, n_k=None) -> None:
    theirs, ours = pair(dtype=dtype, **OPTIONS[name])
    assert_equal_to_torch(theirs, ours, inputs(theirs, n_k=n_k, dtype=dtype), call)


# Construction


@pytest.mark.parametrize("name", OPTIONS)
def test_same_seed_same_weights_and_random_state(name):
    states = []
    for make in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(5)
        module = make(EMBED, HEADS, **OPTIONS[name])
        states.append((module, torch.rand(1)))
    (theirs, after_theirs), (ours, after_ours) = states
    assert torch.equal(after_theirs, after_ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, x in theirs.state_dict().items():
        assert torch.equal(x, ours.state_dict()[key])
    ours.load_state_dict(MultiheadAttention(EMBED, HEADS, **OPTIONS[name]).state_dict())
    theirs.load_state_dict(ours.state_dict())
    attributes = vars(theirs).keys() - {"_forward_pre_hooks"}
    for key in sorted(attributes):
        if not key.startswith("_") or key == "_qkv_same_embed_dim":
            assert getattr(ours, key) == getattr(theirs, key)
    assert isinstance(ours, nn.MultiheadAttention)
    assert type(ours.out_proj) is type(theirs.out_proj)


def test_signatures_are_torchs():
    for name in ("__init__", "forward"):
        theirs, ours = (
            list(inspect.signature(getattr(kind, name)).parameters.values())
            for kind in (nn.MultiheadAttention, MultiheadAttention)
        )
        assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
            (p.name, p.default) for p in theirs
        ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "embed_dim and num_heads must be greater than 0"),
        ((32, 0), ValueError, "embed_dim and num_heads must be greater than 0"),
        ((30, 4), AssertionError, "embed_dim must be divisible by num_heads"),
    ],
)
def test_constructor_errors(arguments, error, message):
    for make in (nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises(error, match=message):
            make(*arguments)


def test_pattern_is_checked():
    with pytest.raises(TypeError, match="expected pattern to be a Pattern"):
        MultiheadAttention(EMBED, HEADS, pattern=3)
    layer = MultiheadAttention(EMBED, HEADS, pattern=PerHead([Window(1)] * 3), device=DEVICE)
    for need_weights in (False, True):
        with pytest.raises(ValueError, match="heads"):
            layer(*inputs(layer), need_weights=need_weights)


# Numbers without a pattern


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch(name, need_weights):
    assert_modules_agree(name, {"need_weights": need_weights})
    assert_modules_agree(name, {"need_weights": need_weights}, n_k=7)


def masks(n_q: int, n_k: int, batch: int = 3) -> dict[str, dict]:
    """Every kind of mask; no row is masked out, where torch gives NaN."""
    pairs = cases.bits(n_q, n_k, share=0.4)
    pairs[:, 0] = False
    per_head = cases.bits(batch * HEADS, n_q, n_k, share=0.4)
    per_head[:, :, 0] = False
    keys = padding([n_k, 1, n_k // 2][:batch], n_k)
    numbers, key_numbers = normal(n_q, n_k, seed=3), normal(batch, n_k, seed=4)
    return {
        "keys": {"key_padding_mask": keys},
        "pairs": {"attn_mask": pairs},
        "per head": {"attn_mask": per_head},
        "both": {"key_padding_mask": keys, "attn_mask": pairs},
        "numbers": {"attn_mask": numbers.masked_fill(pairs, -math.inf)},
        "numbers per head": {"attn_mask": normal(batch * HEADS, n_q, n_k)},
        "key numbers": {"key_padding_mask": key_numbers.masked_fill(keys, -math.inf)},
        "both numbers": {"key_padding_mask": key_numbers, "attn_mask": numbers},
        "keys and numbers": {"key_padding_mask": keys, "attn_mask": numbers},
        "pairs and key numbers": {"key_padding_mask": key_numbers, "attn_mask": pairs},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", masks(2, 2))
@pytest.mark.parametrize("name", ["batch_first", "both_added"])
def test_masks(name, kind, need_weights):
    call = {"need_weights": need_weights, "average_attn_weights": False}
    assert_modules_agree(name, call | masks(13, 9)[kind], n_k=9)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "keys", "pairs", "per head"])
@pytest.mark.parametrize("name", ["plain", "batch_first", "bias_kv"])
def test_without_a_batch(name, mask, average):
    theirs, ours = pair(**OPTIONS[name])
    call = {"none": {}, **masks(13, 9, 1)}[mask]
    if mask == "keys":
        call = {"key_padding_mask": padding([5], 9)[0]}
    for need_weights in (True, False):
        call = call | {"need_weights": need_weights, "average_attn_weights": average}
        assert_equal_to_torch(theirs, ours, inputs(theirs, n_k=9, batch=None), call)


@pytest.mark.parametrize("shared", ["query is key", "key is value", "all"])
@pytest.mark.parametrize("name", ["plain", "batch_first"])
def test_the_same_tensors(name, shared):
    theirs, ours = pair(**OPTIONS[name])
    q, k, v = inputs(theirs)
    tensors = {"query is key": (q, q, v), "key is value": (q, k, k), "all": (q, q, q)}[shared]
    for need_weights in (True, False):
        torch.testing.assert_close(
            ours(*tensors, need_weights=need_weights), theirs(*tensors, need_weights=need_weights)
        )
        # The same numbers from copies, which are projected apart.
        apart = ours(*(x.clone() for x in tensors), need_weights=need_weights)[0]
        torch.testing.assert_close(apart, ours(*tensors, need_weights=need_weights)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["batch_first", "both_added"])
def test_dtypes(name, need_weights, dtype):
    call = {"need_weights": need_weights, "key_padding_mask": padding([13, 1, 6], 13)}
    assert_modules_agree(name, call, dtype)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_float32_mask_in_half_precision(need_weights):
    """As `generate_square_subsequent_mask` makes them; torch takes it without weights."""
    theirs, ours = pair(dtype=torch.bfloat16, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(13, device=DEVICE)
    call = {"attn_mask": mask, "need_weights": need_weights}
    their_call = call | {"attn_mask": mask.bfloat16()}
    assert_equal_to_torch(theirs, ours, inputs(theirs, dtype=torch.bfloat16), call, their_call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_the_least_number(dtype, need_weights):
    """Added to a logit in float16 it may become −inf: a row of them must not give NaN."""
    _, ours = pair(dtype=dtype, batch_first=True)
    x = inputs(ours, dtype=dtype)[0] * 4
    for mask_dtype in (dtype, torch.float32):
        mask = torch.zeros(13, 13, dtype=mask_dtype, device=DEVICE)
        mask[3] = torch.finfo(mask_dtype).min
        mask[5, 1:] = torch.finfo(mask_dtype).min
        output, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
        assert output.isfinite().all()
        if need_weights:
            torch.testing.assert_close(weights[:, 5, 0], torch.ones_like(weights[:, 5, 0]))
            assert (weights.sum(-1) - 1).abs().max() < 13 * torch.finfo(dtype).eps


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 1, 1), (2, 1, 6), (2, 0, 4)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_small_sizes(sizes, need_weights):
    batch, n_q, n_k = sizes
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs, n_q, n_k, batch)
    torch.testing.assert_close(
        ours(*tensors, need_weights=need_weights), theirs(*tensors, need_weights=need_weights)
    )


def test_output_is_contiguous():
    for name in ("plain", "batch_first"):
        layer = pair(**OPTIONS[name])[1]
        assert all(layer(*inputs(layer), need_weights=w)[0].is_contiguous() for w in (True, False))


def test_inputs_of_any_strides():
    _, ours = pair(batch_first=True)
    wide = normal(3, 13, 2 * EMBED)[..., ::2]
    mask = normal(13, 26)[:, ::2].T
    for need_weights in (True, False):
        call = {"need_weights": need_weights}
        torch.testing.assert_close(
            ours(wide, wide, wide, attn_mask=mask, **call),
            ours(*(wide.contiguous(),) * 3, attn_mask=mask.contiguous(), **call),
        )


def test_learned_masks_get_gradients():
    theirs, ours = pair(dtype=torch.float64, batch_first=True)
    x = normal(2, 7, EMBED, dtype=torch.float64)
    for shape, need_weights in itertools.product([(7, 7), (2 * HEADS, 7, 7)], [True, False]):
        mask = normal(*shape, dtype=torch.float64)
        keys = normal(2, 7, dtype=torch.float64)
        keys[1, 3:] = -math.inf
        grads = []
        for module in (theirs, ours):
            leaves = [mask.clone().requires_grad_(), keys.clone().requires_grad_()]
            output, _ = module(
                x, x, x, attn_mask=leaves[0], key_padding_mask=leaves[1], need_weights=need_weights
            )
            grads.append(torch.autograd.grad(output.square().sum(), leaves))
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal(need_weights):
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs)
    for dtype in (torch.bool, torch.float32):
        mask = nn.Transformer.generate_square_subsequent_mask(13, device=DEVICE)
        mask = mask == -math.inf if dtype == torch.bool else mask
        for keys in (None, padding([13, 4, 9], 13).to(dtype)):
            keys = keys if keys is None or dtype == torch.bool else keys * -3
            call = {"attn_mask": mask, "key_padding_mask": keys, "need_weights": need_weights}
            assert_equal_to_torch(theirs, ours, tensors, call | {"is_causal": True}, call)
    # With keys of another number, the mask is aligned at the start.
    tensors = inputs(theirs, n_k=17)
    call = {
        "attn_mask": torch.ones(13, 17, dtype=torch.bool, device=DEVICE).triu(1),
        "need_weights": need_weights,
        "is_causal": True,
    }
    assert_equal_to_torch(theirs, ours, tensors, call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_hint_with_added_keys(zero, need_weights):
    """torch's causal products leave out the keys that are added at the end; its masks do not."""
    theirs, ours = pair(batch_first=True, add_bias_kv=True, add_zero_attn=zero)
    call = {
        "attn_mask": torch.ones(13, 13, dtype=torch.bool, device=DEVICE).triu(1),
        "need_weights": need_weights,
        "is_causal": True,
    }
    assert_equal_to_torch(theirs, ours, inputs(theirs), call)


def test_a_wrong_hint_is_taken_where_torch_takes_it():
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs)
    for keys, need_weights in itertools.product([None, padding([13, 4, 9], 13)], [True, False]):
        call = {"attn_mask": masks(13, 13)["pairs"]["attn_mask"], "is_causal": True}
        call |= {"key_padding_mask": keys, "need_weights": need_weights}
        torch.testing.assert_close(ours(*tensors, **call)[0], theirs(*tensors, **call)[0])


# Patterns


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("sizes", [(13, 13), (5, 13)])
def test_pattern_is_a_mask(pattern, need_weights, sizes):
    theirs, ours = pair(pattern=pattern, batch_first=True)
    call = {"need_weights": need_weights, "average_attn_weights": False}
    their_call = call | {"attn_mask": disallowed(pattern, *sizes, batch=3)}
    assert_equal_to_torch(theirs, ours, inputs(theirs, *sizes), call, their_call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["keys", "pairs", "per head", "numbers", "key numbers"])
def test_pattern_with_masks(kind, need_weights):
    """Every query still sees key 0."""
    pattern = PerHead([Window(3) | Global([0]), Window(1) | Global([0, 4])])
    theirs, ours = pair(pattern=pattern)
    call = {"need_weights": need_weights} | masks(13, 13)[kind]
    combined = torch.zeros(3, HEADS, 13, 13, device=DEVICE)
    combined.masked_fill_(disallowed(pattern, 13, 13, 3).view_as(combined), -math.inf)
    given = masks(13, 13)[kind]
    for name, mask in given.items():
        shape = (3, 1, 1, 13) if name == "key_padding_mask" else (-1, HEADS, 13, 13)
        if mask.shape == (13, 13):
            shape = (1, 1, 13, 13)
        numbers = (
            torch.zeros_like(mask, dtype=combined.dtype).masked_fill(mask, -math.inf)
            if (mask.dtype == torch.bool)
            else mask
        )
        combined = combined + numbers.view(shape)
    their_call = {"need_weights": need_weights, "attn_mask": combined.flatten(0, 1)}
    assert_equal_to_torch(theirs, ours, inputs(theirs), call, their_call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["bias_kv", "zero_attn", "both_added"])
@pytest.mark.parametrize(
    "pattern", [Window(2), Global([-1]) | Window(0), Causal(), RandomBlocks(1, 3)], ids=repr
)
def test_added_keys_are_seen_under_any_pattern(name, need_weights, pattern):
    """The pattern stands as without them: its negative tokens count the keys that are given."""
    theirs, ours = pair(pattern=pattern, **OPTIONS[name])
    for sizes in ((13, 13), (6, 11)):
        call = {"need_weights": need_weights, "key_padding_mask": padding([0, 5, 9], sizes[1])}
        their_call = call | {"attn_mask": disallowed(pattern, *sizes, batch=3)}
        assert_equal_to_torch(theirs, ours, inputs(theirs, *sizes), call, their_call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("examples", [1, 3])
def test_patterns_with_tensors(need_weights, examples):
    allowed = cases.bits(examples, HEADS, 13, 13, share=0.5)
    allowed[..., 0] = True
    layout = cases.bits(examples, 1, 4, 4, share=0.5)
    layout[..., 0] = True
    for pattern in (Mask(allowed), BlockLayout(layout, 4) | Window(1)):
        theirs, ours = pair(pattern=pattern, batch_first=True)
        call = {"need_weights": need_weights}
        their_call = call | {"attn_mask": disallowed(pattern, 13, 13, batch=3)}
        assert_equal_to_torch(theirs, ours, inputs(theirs), call, their_call)


def test_both_paths_agree():
    for name, pattern in itertools.product(OPTIONS, [None, *PATTERNS]):
        _, ours = pair(pattern=pattern, **OPTIONS[name])
        tensors = inputs(ours)
        call = {"key_padding_mask": padding([13, 3, 0], 13)}
        torch.testing.assert_close(
            ours(*tensors, need_weights=False, **call)[0], ours(*tensors, **call)[0]
        )


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_and_evaluation_give_the_same_bits(need_weights):
    for pattern in (None, Window(3)):
        _, ours = pair(pattern=pattern, batch_first=True)
        x = inputs(ours)[0]
        call = {"need_weights": need_weights, "key_padding_mask": padding([13, 2, 0], 13)}
        training = ours(x, x, x, **call)[0]
        with torch.no_grad():
            assert torch.equal(training, ours.eval()(x, x, x, **call)[0])


# Rows without keys


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("pattern", [None, Window(2)])
@pytest.mark.parametrize("mask", ["keys", "key numbers", "pairs", "numbers"])
def test_rows_without_keys(mask, pattern, need_weights):
    _, ours = pair(pattern=pattern, batch_first=True)
    n, rows = 7, torch.zeros(7, dtype=torch.bool, device=DEVICE)
    if "keys" in mask or "key" in mask:
        given, where = padding([n, 0, n], n), (1,)
    else:
        rows[2] = True
        given, where = rows[:, None].expand(n, n), (slice(None), 2)
    if "numbers" in mask:
        given = torch.zeros(given.shape, device=DEVICE).masked_fill(given, -math.inf)
    name = "key_padding_mask" if "key" in mask else "attn_mask"
    call = {name: given, "need_weights": need_weights}
    with torch.autograd.set_detect_anomaly(True):
        made = results(ours, inputs(ours, n), **call)
    assert all(x.isfinite().all() for x in made.values())
    expected = ours.out_proj.bias.expand_as(made["output"][where])
    assert torch.equal(made["output"][where], expected)
    if need_weights:
        assert (made["weights"][where] == 0).all()
    assert made["grad 0"][where].eq(0).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_what_padding_holds_does_not_matter(need_weights):
    _, ours = pair(batch_first=True)
    query, key, value = inputs(ours)
    keys = padding([13, 4, 9], 13)
    poisoned = [x.masked_fill(keys[..., None], math.nan) for x in (key, value)]
    for mask in (keys, torch.zeros_like(keys, dtype=query.dtype).masked_fill(keys, -math.inf)):
        call = {"key_padding_mask": mask, "need_weights": need_weights}
        clean = ours(query, key, value, **call)
        torch.testing.assert_close(ours(query, *poisoned, **call), clean, rtol=0, atol=0)


# Weights and dropout


def test_returned_weights():
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs, 5, 9)
    for average, shape in ((True, (3, 5, 9)), (False, (3, HEADS, 5, 9))):
        weights = ours(*tensors, average_attn_weights=average)[1]
        assert weights.shape == shape
        torch.testing.assert_close(weights, theirs(*tensors, average_attn_weights=average)[1])
    assert ours(*tensors, need_weights=False)[1] is None


def test_dropout_with_weights_draws_as_torch():
    theirs, ours = pair(dropout=0.4, batch_first=True)
    tensors = inputs(theirs)
    made = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        made.append(module(*tensors, average_attn_weights=False))
    torch.testing.assert_close(made[1], made[0])
    assert (made[1][1] == 0).any()


@pytest.mark.parametrize("name", ["batch_first", "both_added"])
def test_returned_weights_made_the_output(name):
    _, ours = pair(dropout=0.3, pattern=Window(4), **OPTIONS[name])
    ours = ours.double()
    query, key, value = inputs(ours, dtype=torch.float64)
    output, weights = ours(query, key, value, average_attn_weights=False)
    names = ["in_proj_weight"] if ours.in_proj_weight is not None else ["v_proj_weight"]
    projection = getattr(ours, names[0])[-EMBED:]
    v = nn.functional.linear(value, projection, ours.in_proj_bias[-EMBED:])
    v = v if ours.batch_first else v.transpose(0, 1)
    if ours.bias_v is not None:
        v = torch.cat([v, ours.bias_v.expand(3, 1, -1), torch.zeros_like(v[:, :1])], 1)
    heads = weights @ v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = ours.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output if ours.batch_first else output.transpose(0, 1), expected)


@pytest.mark.parametrize("name", ["batch_first", "both_added"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_keeps_the_mean(name, need_weights):
    _, ours = pair(dropout=0.5, pattern=Window(5), **OPTIONS[name])
    # As many examples as draws; each is another draw.
    tensors = [x[:1] if ours.batch_first else x[:, :1] for x in inputs(ours)]
    draws = 4000
    many = [
        x.expand(draws, -1, -1) if ours.batch_first else x.expand(-1, draws, -1) for x in tensors
    ]
    with torch.no_grad():
        output = ours(*many, need_weights=need_weights)[0]
        exact = ours.eval()(*tensors)[0]
    at = 0 if ours.batch_first else 1
    error = (output.mean(at, keepdim=True) - exact).abs()
    spread = output.std(at, keepdim=True)
    assert (spread > 0).all()
    assert (error < 5 * spread / math.sqrt(draws)).all()


def test_dropout_is_for_training_alone():
    for need_weights in (True, False):
        _, ours = pair(dropout=0.9, batch_first=True)
        tensors = inputs(ours)
        call = {"need_weights": need_weights}
        assert not torch.equal(ours(*tensors, **call)[0], ours(*tensors, **call)[0])
        ours.eval()
        assert torch.equal(ours(*tensors, **call)[0], ours(*tensors, **call)[0])


# Errors


def zeros(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


X, KEYS = zeros(3, 5, EMBED), zeros(3, 7, EMBED)
ERRORS = {
    "query of 4 dimensions": ((zeros(1, 3, 5, EMBED),) * 3, {}, AssertionError,
        "query should be unbatched 2D or batched 3D tensor but received"),
    "key without batch": ((X, X[0], X[0]), {}, AssertionError, "expected `key` and `value` to be"),
    "query without batch": ((X[0], X, X), {}, AssertionError, "expected `key` and `value` to be"),
    "channels": ((zeros(3, 5, 16), X, X), {}, AssertionError,
        "was expecting embedding dimension of 32, but got 16"),
    "channels of key": ((X, zeros(3, 5, 16), zeros(3, 5, 16)), {}, RuntimeError, "shape"),
    "value": ((X, KEYS, X), {}, AssertionError, "key shape .* does not match value shape"),
    "batch": ((X, KEYS[:2], KEYS[:2]), {}, RuntimeError, "."),
    "integer mask": ((X, X, X), {"attn_mask": zeros(5, 5, dtype=torch.int64)}, AssertionError,
        "only bool and floating types of attn_mask are supported"),
    "integer padding": ((X, X, X), {"key_padding_mask": zeros(3, 5, dtype=torch.uint8)},
        AssertionError, "only bool and floating types of key_padding_mask are supported"),
    "mask of 4 dimensions": ((X, X, X), {"attn_mask": zeros(3, HEADS, 5, 5)}, AssertionError,
        "expected `attn_mask` to be `None`, 2-D or 3-D"),
    "2D mask": ((X, KEYS, KEYS), {"attn_mask": zeros(5, 5)}, RuntimeError,
        "The shape of the 2D attn_mask is .*, but should be"),
    "3D mask": ((X, KEYS, KEYS), {"attn_mask": zeros(3, 5, 7)}, RuntimeError,
        "The shape of the 3D attn_mask is .*, but should be"),
    "3D mask without batch": ((X[0], X[0], X[0]), {"attn_mask": zeros(2, 5, 5)}, AssertionError,
        "Expected `attn_mask` shape to be"),
    "padding of 1 dimension": ((X, X, X), {"key_padding_mask": zeros(5)}, AssertionError,
        "expected `key_padding_mask` to be"),
    "padding length": ((X, KEYS, KEYS), {"key_padding_mask": zeros(3, 5)}, AssertionError,
        r"Expected key_padded_mask.shape\[1\] to be 7, but got 5"),
    "padding batch": ((X, KEYS, KEYS), {"key_padding_mask": zeros(2, 7)}, AssertionError,
        r"Expected key_padded_mask.shape\[0\] to be 3, but got 2"),
    "hint alone": ((X, X, X), {"is_causal": True}, RuntimeError,
        "Need attn_mask if specifying the is_causal hint"),
}  # fmt: skip


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name, need_weights):
    tensors, call, error, message = ERRORS[name]
    for module in pair(batch_first=True):
        with pytest.raises(error, match=message):
            module(*tensors, need_weights=need_weights, **call)


def test_lengths_of_other_channels_are_checked():
    for module in pair(batch_first=True, kdim=8, vdim=8):
        with pytest.raises(AssertionError, match=r"sequence and batch dims .* do not match"):
            module(X, zeros(3, 7, 8), zeros(3, 5, 8))


def test_masks_of_two_kinds_warn():
    call = {"attn_mask": zeros(5, 5), "key_padding_mask": zeros(3, 5, dtype=torch.bool)}
    for module in pair(batch_first=True):
        message = "Support for mismatched key_padding_mask and attn_mask is deprecated"
        with pytest.warns(UserWarning, match=message):
            module(X, X, X, **call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(X, X, X, **(call | {"key_padding_mask": zeros(3, 5)}))


# Compilers, transforms, copies


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("batch_first", None),
        ("plain", Window(3)),
        ("both_added", PerHead([Window(2), Window(3)])),
        ("zero_attn", Mask(torch.ones(13, 13, dtype=torch.bool, device=DEVICE).tril())),
    ],
)
def test_compile(name, pattern, need_weights):
    torch._dynamo.reset()
    _, ours = pair(pattern=pattern, **OPTIONS[name])
    tensors = inputs(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for kind in ("both", "key numbers"):
        call = masks(13, 13)[kind] | {"need_weights": need_weights}
        result, expected = results(compiled, tensors, **call), results(ours, tensors, **call)
        result = {name.replace("_orig_mod.", ""): x for name, x in result.items()}
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compile_with_dynamic_lengths(need_weights):
    torch._dynamo.reset()
    _, ours = pair(pattern=Window(3), batch_first=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for n in (13, 20, 31):
        tensors = inputs(ours, n)
        call = {"need_weights": need_weights}
        torch.testing.assert_close(compiled(*tensors, **call), ours(*tensors, **call))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_export(need_weights, strict):
    _, ours = pair(pattern=Window(3) | Global([0]), batch_first=True)
    tensors = tuple(inputs(ours))
    call = {"key_padding_mask": padding([13, 5, 0], 13), "need_weights": need_weights}
    program = torch.export.export(ours.eval(), tensors, call, strict=strict)
    torch.testing.assert_close(program.module()(*tensors, **call), ours(*tensors, **call))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["batch_first", "both_added"])
def test_gradcheck(name, need_weights):
    _, ours = pair(dtype=torch.float64, pattern=Window(2), **OPTIONS[name])
    tensors = [x.requires_grad_() for x in inputs(ours, 5, batch=2, dtype=torch.float64)]
    mask = normal(5, 5, dtype=torch.float64).requires_grad_()
    keys = padding([5, 0], 5)

    def call(*leaves):
        *xs, added = leaves
        return ours(*xs, keys.double() * -2, need_weights, added)[: 1 + need_weights]

    assert torch.autograd.gradcheck(call, (*tensors, mask), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (*tensors, mask), fast_mode=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_transforms(need_weights):
    _, ours = pair(dtype=torch.float64, pattern=Window(2), batch_first=True)
    x = normal(4, 2, 7, EMBED, dtype=torch.float64)

    def call(x, parameters=None):
        parameters = dict(ours.named_parameters()) if parameters is None else parameters
        options = {"need_weights": need_weights}
        return torch.func.functional_call(ours, parameters, (x, x, x), options)[0]

    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(one) for one in x]))
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    per_example = torch.vmap(
        torch.func.grad(lambda p, one: call(one, p).square().sum()), in_dims=(None, 0)
    )(parameters, x)
    call(x[2]).square().sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(per_example[name][2], p.grad)
    _, tangent = torch.func.jvp(call, (x[0],), (x[1],))
    numeric = (call(x[0] + 1e-6 * x[1]) - call(x[0] - 1e-6 * x[1])) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["batch_first", "both_added"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(name, need_weights):
    theirs, ours = pair(**OPTIONS[name])
    tensors = inputs(theirs)
    call = {"need_weights": need_weights, "attn_mask": normal(13, 13)}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        expected, result = theirs(*tensors, **call), ours(*tensors, **call)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_copies_keep_the_pattern():
    _, ours = pair(pattern=Window(3) | Global([0]), batch_first=True)
    tensors = inputs(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.pattern == ours.pattern
        assert torch.equal(twin(*tensors)[0], ours(*tensors)[0])
    assert "pattern=Window(3) | Global([0])" in repr(ours)


def test_opcheck_of_the_dense_mask():
    sizes = (3, HEADS, 13, 13)
    layout = BlockLayout(cases.bits(3, 1, 4, 4), 4)
    for pattern in (Window(2), layout):
        tensors = list(pattern.tensors(13, 13))
        torch.library.opcheck(
            torch.ops.sparse_attn._dense_mask, (list(pattern.encode()), tensors, *sizes)
        )


def test_parametrized_weights():
    _, ours = pair(pattern=Window(3), batch_first=True)
    tensors = inputs(ours)
    expected = copy.deepcopy(ours)
    expected.in_proj_weight.data.mul_(2)
    expected.out_proj.weight.data.mul_(2)

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    for module, name in ((ours, "in_proj_weight"), (ours.out_proj, "weight")):
        nn.utils.parametrize.register_parametrization(module, name, Double())
    torch.testing.assert_close(ours(*tensors), expected(*tensors))


def test_memory_is_linear_without_weights():
    n = 2**15
    layer = MultiheadAttention(8, 1, batch_first=True, pattern=Window(4), device=DEVICE)
    x = normal(1, n, 8)
    keys = zeros(1, n)
    keys[:, -5:] = -math.inf
    with torch.no_grad():  # a dense mask alone would take 4 GiB
        output, _ = layer(x, x, x, key_padding_mask=keys, need_weights=False)
    assert output.isfinite().all()
