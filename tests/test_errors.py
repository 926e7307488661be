"""Wrong input: an exception that names the argument, what was expected and what came."""

import contextlib
import math
import random
from collections.abc import Callable

import cases
import pytest
import torch
from cases import DEVICE, Shape

from sparse_attn import Causal, Full, Global, GlobalKeys, GlobalQueries, PerHead, Window, attention

OPS = torch.ops.sparse_attn
WRONG_DTYPE = (TypeError, ValueError, NotImplementedError)
SHAPE = Shape(n_q=16, head_dim=8)

# Every entry point, as call(query, key, value, **options).
ENTRIES: dict[str, Callable] = {
    "python": lambda *tensors, **options: attention(*tensors, Window(3), **options),
    "attention": lambda *tensors, **options: OPS.attention(
        *tensors, list(Window(3).encode()), **options
    ),
    "window": lambda *tensors, **options: OPS.window_attention(*tensors, 3, **options),
    "dilated": lambda *tensors, **options: OPS.dilated_attention(*tensors, 3, None, 2, **options),
    "global": lambda *tensors, **options: OPS.global_attention(*tensors, [0], 3, **options),
}

MODES = {
    "eager": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def zeros(
    *size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE
) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


# What is changed in a good call; the exception; words that its message must hold.
WRONG_TENSORS = {
    "query rank": ({"query": zeros(4, 16, 8)}, ValueError, ["query", "[4, 16, 8]"]),
    "key rank": ({"key": zeros(1, 2, 4, 16, 8)}, ValueError, ["key", "[1, 2, 4, 16, 8]"]),
    "value rank": ({"value": zeros(8)}, ValueError, ["value", "[8]"]),
    "key batch": ({"key": zeros(3, 4, 16, 8)}, ValueError, ["key", "[3, 4, 16, 8]"]),
    "key heads": ({"key": zeros(2, 3, 16, 8)}, ValueError, ["key", "4 heads", "3"]),
    "key head_dim": ({"key": zeros(2, 4, 16, 9)}, ValueError, ["key", "[2, 4, 16, 9]"]),
    "value batch": ({"value": zeros(1, 4, 16, 8)}, ValueError, ["value", "[1, 4, 16, 8]"]),
    "value heads": ({"value": zeros(2, 2, 16, 8)}, ValueError, ["value", "[2, 2, 16, 8]"]),
    "value length": ({"value": zeros(2, 4, 15, 8)}, ValueError, ["value", "[2, 4, 15, 8]"]),
    "gqa not enabled": (
        {"key": zeros(2, 2, 16, 8), "value": zeros(2, 2, 16, 8)},
        ValueError,
        ["key", "4 heads", "2", "enable_gqa"],
    ),
    "gqa does not divide": (
        {"key": zeros(2, 3, 16, 8), "value": zeros(2, 3, 16, 8), "enable_gqa": True},
        ValueError,
        ["4", "3"],
    ),
    "gqa without heads": (
        {"key": zeros(2, 0, 16, 8), "value": zeros(2, 0, 16, 8), "enable_gqa": True},
        ValueError,
        ["0"],
    ),
    "head dimension 0": (
        {"query": zeros(2, 4, 16, 0), "key": zeros(2, 4, 16, 0)},
        ValueError,
        ["query", "[2, 4, 16, 0]"],
    ),
    "mixed key": ({"key": zeros(2, 4, 16, 8, dtype=torch.float64)}, WRONG_DTYPE, ["key"]),
    "mixed value": ({"value": zeros(2, 4, 16, 8, dtype=torch.float16)}, WRONG_DTYPE, ["value"]),
    "integers": (
        {name: zeros(2, 4, 16, 8, dtype=torch.int64) for name in ("query", "key", "value")},
        WRONG_DTYPE,
        ["query"],
    ),
    "complex numbers": (
        {name: zeros(2, 4, 16, 8, dtype=torch.complex64) for name in ("query", "key", "value")},
        WRONG_DTYPE,
        ["query"],
    ),
    "key elsewhere": (
        {"key": zeros(2, 4, 16, 8, device="meta")},
        (ValueError, TypeError, NotImplementedError),
        ["key", "meta"],
    ),
    "query elsewhere": (
        {"query": zeros(2, 4, 16, 8, device="meta")},
        (ValueError, TypeError, NotImplementedError),
        ["meta"],
    ),
    "mask elsewhere": (
        {"key_padding_mask": zeros(2, 16, dtype=torch.bool, device="meta")},
        (ValueError, TypeError, NotImplementedError),
        ["key_padding_mask", "meta"],
    ),
    "scale nan": ({"scale": math.nan}, ValueError, ["scale", "nan"]),
    "scale inf": ({"scale": math.inf}, ValueError, ["scale", "inf"]),
}
for mask in ("key_padding_mask", "global_mask"):
    WRONG_TENSORS |= {
        f"{mask} length": (
            {mask: zeros(2, 15, dtype=torch.bool)},
            ValueError,
            [mask, "[2, 16]", "[2, 15]"],
        ),
        f"{mask} batch": (
            {mask: zeros(1, 16, dtype=torch.bool)},
            ValueError,
            [mask, "[2, 16]", "[1, 16]"],
        ),
        f"{mask} rank": ({mask: zeros(16, dtype=torch.bool)}, ValueError, [mask, "[16]"]),
        f"{mask} of floats": ({mask: zeros(2, 16)}, WRONG_DTYPE, [mask, "ool"]),
        f"{mask} of ints": ({mask: zeros(2, 16, dtype=torch.int64)}, WRONG_DTYPE, [mask, "ool"]),
    }


def refuses(call: Callable[[], object], exception: type | tuple, words: list[str]) -> None:
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors(name, entry, mode):
    changes, exception, words = WRONG_TENSORS[name]
    tensors = dict(zip(("query", "key", "value"), cases.inputs(SHAPE), strict=True))
    options = tensors | changes
    positional = [options.pop(argument) for argument in tensors]
    with MODES[mode]():
        refuses(lambda: ENTRIES[entry](*positional, **options), exception, words)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_that_want_gradients(name, entry):
    changes, exception, words = WRONG_TENSORS[name]
    tensors = dict(zip(("query", "key", "value"), cases.inputs(SHAPE), strict=True))
    options = tensors | changes
    positional = [options.pop(argument) for argument in tensors]
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in positional]
    refuses(lambda: ENTRIES[entry](*leaves, **options), exception, words)


@pytest.mark.parametrize("name", [n for n in WRONG_TENSORS if "elsewhere" not in n])
def test_wrong_tensors_on_the_meta_device(name):
    changes, exception, words = WRONG_TENSORS[name]
    tensors = dict(zip(("query", "key", "value"), cases.inputs(SHAPE), strict=True))
    options = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in (tensors | changes).items()
    }
    positional = [options.pop(argument) for argument in tensors]
    refuses(lambda: attention(*positional, Window(3), **options), exception, words)


def good_call(pattern: object, **options: object) -> torch.Tensor:
    return attention(*cases.inputs(SHAPE), pattern, **options)


WRONG_CALLS = {
    "negative left": (lambda: Window(-1), ValueError, ["left", "-1"]),
    "negative right": (lambda: Window(3, -2), ValueError, ["right", "-2"]),
    "infinitely negative": (lambda: Window(-math.inf), (TypeError, ValueError), ["left", "-inf"]),
    "window of half": (lambda: Window(1.5), (TypeError, ValueError), ["left", "1.5"]),
    "window nan": (lambda: Window(math.nan), (TypeError, ValueError), ["left", "nan"]),
    "window of text": (lambda: Window("3"), TypeError, ["left", "'3'"]),
    "window none": (lambda: Window(None), TypeError, ["left"]),
    "dilation 0": (lambda: Window(3, dilation=0), ValueError, ["dilation", "0"]),
    "dilation -1": (lambda: Window(3, dilation=-1), ValueError, ["dilation", "-1"]),
    "dilation of half": (lambda: Window(3, dilation=1.5), (TypeError, ValueError), ["dilation"]),
    "dilation inf": (lambda: Window(3, dilation=math.inf), (TypeError, ValueError), ["dilation"]),
    "token of half": (lambda: Global([0.5]), (TypeError, ValueError), ["tokens", "0.5"]),
    "token of text": (lambda: Global(["a"]), (TypeError, ValueError), ["tokens"]),
    "tokens none": (lambda: Global(None), TypeError, ["tokens"]),
    "union with an int": (lambda: Window(3) | 3, TypeError, []),
    "intersection with text": (lambda: Window(3) & "x", TypeError, []),
    "per-head of nothing": (lambda: PerHead([]), ValueError, ["patterns"]),
    "per-head of ints": (lambda: PerHead([3]), TypeError, ["int"]),
    "per-head of one": (lambda: PerHead(Window(3)), TypeError, ["Window"]),
    "per-head in a per-head": (
        lambda: PerHead([PerHead([Window(3)])]),
        (TypeError, ValueError, NotImplementedError),
        ["PerHead"],
    ),
    "pattern text": (lambda: good_call("window"), TypeError, ["pattern", "str"]),
    "pattern none": (lambda: good_call(None), TypeError, ["pattern"]),
    "pattern list": (lambda: good_call([Window(3)] * 4), TypeError, ["pattern", "list"]),
    "pattern class": (lambda: good_call(Full), TypeError, ["pattern"]),
    "per-head of 3 for 4": (lambda: good_call(PerHead([Window(3)] * 3)), ValueError, ["3", "4"]),
    "per-head of 8 for 4": (lambda: good_call(PerHead([Window(3)] * 8)), ValueError, ["8", "4"]),
    "mask of 3 for 4": (lambda: PerHead([Full()] * 3).mask(9, heads=4), ValueError, ["3", "4"]),
    "negative length": (lambda: Window(3).mask(-1), ValueError, ["-1"]),
    "negative length of cost": (lambda: Window(3).cost(-1), ValueError, ["-1"]),
    "query list": (
        lambda: attention([[1.0]], *cases.inputs(SHAPE)[1:], Window(3)),
        TypeError,
        ["query"],
    ),
    "scale text": (lambda: good_call(Window(3), scale="1"), TypeError, ["scale"]),
    "mask list": (
        lambda: good_call(Window(3), key_padding_mask=[[True] * 16] * 2),
        TypeError,
        ["key_padding_mask"],
    ),
    "unknown argument": (lambda: good_call(Window(3), mask=None), TypeError, ["mask"]),
    "op left": (lambda: OPS.window_attention(*cases.inputs(SHAPE), -1), ValueError, ["left", "-1"]),
    "op right": (
        lambda: OPS.window_attention(*cases.inputs(SHAPE), 1, -5),
        ValueError,
        ["right", "-5"],
    ),
    "op dilation": (
        lambda: OPS.dilated_attention(*cases.inputs(SHAPE), 1, None, 0),
        ValueError,
        ["dilation", "0"],
    ),
    "op token": (
        lambda: OPS.global_attention(*cases.inputs(SHAPE), [16], 1),
        ValueError,
        ["token", "16"],
    ),
    "op heads": (
        lambda: OPS.attention(*cases.inputs(SHAPE), list(PerHead([Full()] * 3).encode())),
        ValueError,
        ["3", "4"],
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name, mode):
    call, exception, words = WRONG_CALLS[name]
    with MODES[mode]():
        refuses(call, exception, words)


@pytest.mark.parametrize("kind", [Global, GlobalKeys, GlobalQueries])
@pytest.mark.parametrize("token", [16, -17, 10**15, -(10**15)])
def test_tokens_out_of_range(kind, token):
    pattern = kind([0, token]) | Window(2)
    for call in (lambda: good_call(pattern), lambda: pattern.mask(16), lambda: pattern.cost(16)):
        refuses(call, ValueError, ["token", str(token)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 1.5])
def test_no_such_dropout(value):
    refuses(lambda: good_call(Window(3), dropout_p=value), ValueError, ["dropout_p", str(value)])


def test_pattern_tensors_are_for_later():
    tensors, pattern = cases.inputs(SHAPE), list(Window(3).encode())
    refuses(
        lambda: OPS.attention(*tensors, pattern, [zeros(3)]),
        (ValueError, NotImplementedError),
        ["pattern_tensors"],
    )


WRONG_BACKWARD = {
    "grad_output": (0, zeros(2, 4, 15, 8), ValueError),
    "grad_output of another dtype": (0, zeros(2, 4, 16, 8, dtype=torch.float64), WRONG_DTYPE),
    "grad_logsumexp": (1, zeros(2, 4, 15), ValueError),
    "query": (2, zeros(2, 4, 16, 7), ValueError),
    "key": (3, zeros(2, 4, 16), ValueError),
    "value": (4, zeros(2, 4, 15, 8), ValueError),
    "output": (5, zeros(2, 4, 16, 7), ValueError),
    "logsumexp": (6, zeros(2, 4, 15), ValueError),
    "logsumexp of another dtype": (6, zeros(2, 4, 16, dtype=torch.float64), WRONG_DTYPE),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["attention", "window_attention"])
@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_wrong_tensors_of_backward(name, op, mode):
    position, tensor, exception = WRONG_BACKWARD[name]
    pattern = (list(Window(3).encode()),) if op == "attention" else (3,)
    query, key, value = cases.inputs(SHAPE)
    output, lse = getattr(OPS, op)(query, key, value, *pattern)
    given = [torch.ones_like(output), torch.ones_like(lse), query, key, value, output, lse]
    given[position] = tensor
    with MODES[mode]():
        backward = getattr(OPS, f"{op}_backward")
        # A wrong query shows in the first tensor that no longer fits it.
        words = [] if name == "query" else [name.split()[0]]
        refuses(lambda: backward(*given, *pattern), exception, words)


VALID = [list(pattern.encode()) for pattern in map(cases.library, cases.PATTERNS.values())]
SPECIAL = [0, 1, 2, 3, 7, -1, 10**9, 2**31, 2**62, 2**63 - 1, -(2**63)]


def survives(words: list[int]) -> None:
    """A list of integers either means a pattern, or gives a ValueError: no other way out."""
    tensors = cases.inputs(Shape(n_q=8, head_dim=2, value_dim=1))
    try:
        output, lse = OPS.attention(*tensors, words)
    except ValueError:
        return
    assert output.shape == (2, 4, 8, 1)
    assert output.isfinite().all()
    assert not lse.isnan().any()


def test_garbage_patterns_do_no_harm():
    generator = random.Random(0)
    for _ in range(2000):
        words = list(generator.choice(VALID))
        for _ in range(generator.randint(1, 3)):
            kind, place = generator.randrange(4), generator.randrange(len(words) + 1)
            if kind == 0:
                words[place:] = []
            elif kind == 1:
                words.insert(place, generator.choice(SPECIAL))
            elif kind == 2:
                words[place : place + 1] = [generator.choice(SPECIAL)]
            else:
                words += generator.choice(VALID)
        survives(words)
        survives([generator.choice(SPECIAL) for _ in range(generator.randint(0, 12))])


@pytest.mark.parametrize("word", sorted({word for words in VALID for word in words}))
def test_endless_patterns_do_no_harm(word):
    survives([word] * 100_000)
    survives([word, 1] * 100_000)


def test_no_pattern_at_all():
    refuses(lambda: OPS.attention(*cases.inputs(SHAPE), []), ValueError, [])


def test_a_refused_call_leaves_no_trace():
    """The same good call works, with the same bits, after a bad one."""
    before = good_call(Causal() | Global([0]))
    with pytest.raises(ValueError, match="token"):
        good_call(Causal() | Global([99]))
    assert torch.equal(good_call(Causal() | Global([0])), before)


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_ints_in_the_place_of_numbers(name):
    refuses(lambda: good_call(Window(3), **{name: True}), TypeError, [name, "a number", "True"])
    refuses(lambda: good_call(Window(3), **{name: 10**400}), ValueError, [name, "finite"])


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize(
    "value", [torch.tensor(0.5, requires_grad=True), torch.full((1,), 0.5)], ids=["learned", "list"]
)
def test_numbers_are_not_learned(name, value):
    refuses(lambda: good_call(Window(3), **{name: value}), TypeError, [name])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nested_tensors(name):
    tensors = dict(zip(("query", "key", "value"), cases.inputs(SHAPE), strict=True))
    tensors[name] = torch.nested.nested_tensor(list(tensors[name]))
    refuses(lambda: attention(**tensors, pattern=Window(3)), TypeError, [name, "dense", "nested"])
