"""What stands for the masks of transformers' models, and the function that takes it."""

import math
import subprocess
import sys
from types import SimpleNamespace

import cases
import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs transformers")

from transformers import masking_utils

from sparse_attn import Causal, Full, Mask, Window, attention
from sparse_attn.huggingface.interface import attention_forward
from sparse_attn.huggingface.mask_functions import band_of
from sparse_attn.huggingface.masks import BandMask, attention_mask

N, HEADS, DIM = 23, 4, 8


def both_ways(distance: int):
    return lambda batch, head, query, key: abs(query - key) < distance


BANDS = {
    "causal": (masking_utils.causal_mask_function, (-math.inf, 0)),
    "sliding": (masking_utils.sliding_window_causal_mask_function(5), (-4, 0)),
    "both ways": (both_ways(5), (-4, 4)),
    "union": (
        masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(5), both_ways(3)),
        (-4, 2),
    ),
    "everything": (
        masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: torch.tensor(True)),
        (-math.inf, math.inf),
    ),
    "shifted": (lambda b, h, q, k: (k + 2 > q) & (k - q < 4), (-1, 3)),
    "strictly": (lambda b, h, q, k: k < q, (-math.inf, -1)),
    "self": (lambda b, h, q, k: q == k, (0, 0)),
}
TABLE = torch.tensor([[0, 0, 0, 1, 1, 2]])
OTHERS = {
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
    "a prefix": lambda b, h, q, k: k < 3,
    "two bands": lambda b, h, q, k: (q - k > 5) | (k == q),
    "not": lambda b, h, q, k: ~(k <= q),
    "branch": lambda b, h, q, k: k <= q if q > 3 else q == k,
    "where": lambda b, h, q, k: torch.where(k <= q, True, False),
    "of examples": lambda b, h, q, k: (k <= q) & (b == 0),
    "of heads": lambda b, h, q, k: (h == 0) & (k <= q),
    "parity": lambda b, h, q, k: (q - k) % 2 == 0,
    "product": lambda b, h, q, k: k * 2 <= q,
    "tables": lambda b, h, q, k: (k <= q) & (TABLE[b, q] == (1 - TABLE)[b, k]),
    "table and number": lambda b, h, q, k: TABLE[b, k] == 1,
    "of a computed example": lambda b, h, q, k: TABLE[b + 1, q] == TABLE[b + 1, k],
    "of a fixed example": lambda b, h, q, k: TABLE[0, q] == TABLE[0, k],
    "order of a table": lambda b, h, q, k: TABLE[b, k] <= q,
    "constant": lambda b, h, q, k: True,
    "error": lambda b, h, q, k: q.no_such_thing,
}


@pytest.mark.parametrize("name", BANDS)
def test_bands_are_read(name):
    function, expected = BANDS[name]
    band = band_of(function)
    assert (band.lowest, band.highest) == expected
    assert not band.packed


@pytest.mark.parametrize("name", OTHERS)
def test_other_mask_functions_are_not(name):
    assert band_of(OTHERS[name]) is None


def test_packed_bands():
    function = masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(5),
        masking_utils.packed_sequence_mask_function(TABLE),
    )
    band = band_of(function)
    assert (band.lowest, band.highest, band.sequences is TABLE) == (-4, 0, True)


TABLES = {
    "marks": torch.arange(N) % 7 < 3,
    "not in order": torch.arange(N) % 7 // 3,
    "numbers": torch.linspace(0, 3, N),
    "descending": torch.arange(N, 0, -1) // 5,
    "sequences": torch.arange(N) // 5,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("jump", [0, 2])
def test_tables_that_are_no_sequences(name, jump):
    """Only numbered sequences, side by side, of consecutive positions, are taken apart."""
    table = TABLES[name].expand(2, -1).contiguous().to(DEVICE)
    positions = torch.arange(N, device=DEVICE).expand(2, -1).contiguous()
    positions[1, N // 2 :] += jump

    def function(b, h, q, k):
        return (table[b, q] == table[b, k]) & (positions[b, k] > positions[b, q] - 4)

    mask = attention_mask(**arguments(function))
    assert isinstance(mask, BandMask) == (name == "sequences" and jump == 0)
    expected = masking_utils.sdpa_mask(**arguments(function), allow_is_causal_skip=False)
    query, key, value = tensors()
    found, _ = attention_forward(LAYER, query, key, value, mask)
    bias = torch.zeros((), device=DEVICE).where(expected, -math.inf)
    result = attention(query, key, value, Full(), bias=bias, enable_gqa=True)
    assert_close(found, result.transpose(1, 2))


def arguments(function, queries: int = N, keys: int = N, start: int = 0, **options) -> dict:
    """Those of transformers 4 or 5."""
    position = {"q_length": queries, "q_offset": start, "device": DEVICE}
    if masking_utils.sdpa_mask.__code__.co_varnames[1] == "cache_position":
        position = {"cache_position": torch.arange(start, start + queries, device=DEVICE)}
    return {"batch_size": 2, "kv_length": keys, "mask_function": function, **position, **options}


def padding(keys: int) -> Tensor:
    tokens = torch.ones(2, keys, dtype=torch.bool, device=DEVICE)
    tokens[1, :4] = False
    return tokens


PLACES = {
    "all": {},
    "padded": {"attention_mask": padding(N)},
    "after a cache": {"queries": 5, "start": N - 5, "attention_mask": padding(N)},
    "of a window's cache": {
        "queries": 5,
        "keys": 9,
        "start": N - 5,
        "kv_offset": N - 9,
        "attention_mask": padding(N),
    },
    "room behind": {"queries": 5, "start": 3, "attention_mask": padding(8)},
    "room, empty": {"queries": 5},
    "one": {"queries": 1, "start": N - 1},
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("place", PLACES)
def test_masks_mean_what_transformers_makes(name, place):
    """The mask, as attention reads it and as a tensor, is that of `sdpa_mask`."""
    given = arguments(BANDS[name][0], **PLACES[place])
    if masking_utils.sdpa_mask.__code__.co_varnames[1] != "cache_position":
        given["use_vmap"] = name == "everything"
    mask = attention_mask(**given)
    dense = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = masking_utils.sdpa_mask(**{**given, **dense})
    assert torch.equal(mask[:], expected)
    query, key, value = tensors(expected.shape[2], expected.shape[3])
    found, _ = attention_forward(LAYER, query, key, value, mask)
    bias = torch.zeros((), device=DEVICE).where(expected, -math.inf)
    result = attention(query, key, value, Full(), bias=bias, enable_gqa=True)
    assert_close(found, result.transpose(1, 2))


@pytest.mark.parametrize("name", ["causal", "sliding"])
@pytest.mark.parametrize("place", PLACES)
def test_bands_stay_bands(name, place):
    assert isinstance(attention_mask(**arguments(BANDS[name][0], **PLACES[place])), BandMask)


def test_band_masks_pass_for_tensors():
    mask = attention_mask(**arguments(BANDS["sliding"][0], attention_mask=padding(N)))
    dense = mask[:]
    assert (mask.shape, mask.dim(), mask.size(2)) == ((2, 1, N, N), 4, N)
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([dense, dense], -1))
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float())
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert torch.equal(mask.logical_not(), ~dense)
    moved = mask.to("cpu", non_blocking=True)
    assert isinstance(moved, BandMask)
    assert torch.equal(moved[:], dense.cpu())
    assert attention_mask(**arguments(None, attention_mask=mask)) is mask
    with pytest.raises(AttributeError):
        mask.no_such_thing  # noqa: B018


LAYER = SimpleNamespace(is_causal=True)


def tensors(n_q: int = N, n_k: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = [(2, HEADS, n_q, DIM), (2, HEADS // 2, n_k, DIM), (2, HEADS // 2, n_k, 5)]
    return tuple(cases.normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


@pytest.mark.parametrize("n_q", [N, 5, 1])
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, Causal()),
        ({"is_causal": False}, Full()),
        ({"sliding_window": 4}, Window(3, 0)),
        ({"sliding_window": 4, "is_causal": False}, Window(3)),
    ],
)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64])
def test_without_a_mask_of_the_model(n_q, options, pattern, mask):
    query, key, value = tensors(n_q)
    tokens = None if mask is None else padding(N).to(mask)
    ignored = None if mask is None else ~padding(N)
    found, weights = attention_forward(LAYER, query, key, value, tokens, scaling=0.3, **options)
    expected = attention(
        query, key, value, pattern, key_padding_mask=ignored, scale=0.3, enable_gqa=True
    )
    assert weights is None
    assert found.is_contiguous()
    assert torch.equal(found, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float16])
def test_dtypes_of_masks(dtype, mask_dtype):
    query, key, value = tensors(dtype=dtype)
    allowed = torch.tril(torch.ones(1, 1, N, N, dtype=torch.bool, device=DEVICE))
    mask = allowed
    if mask_dtype.is_floating_point:
        mask = torch.zeros(1, 1, N, N, dtype=mask_dtype, device=DEVICE)
        mask = mask.masked_fill(~allowed, torch.finfo(mask_dtype).min)
    found, weights = attention_forward(LAYER, query, key, value, mask, output_attentions=True)
    pattern = Mask(allowed[0, 0])
    expected = attention(query, key, value, pattern, enable_gqa=True).transpose(1, 2)
    assert_close(found, expected)
    assert (found.dtype, weights.dtype, weights.shape) == (dtype, dtype, (2, HEADS, N, N))
    assert not weights[:, :, ~allowed[0, 0]].any()


def test_biases_heads_and_learned_masks():
    query, key, value = tensors()
    bias = cases.normal(1, HEADS, N, N, seed=5, dtype=torch.float32).requires_grad_()
    mask = cases.normal(2, 1, 1, N, seed=6, dtype=torch.float32).requires_grad_()
    factor = torch.tensor([0.0, 1.0, 2.0, 0.5], device=DEVICE)
    found, weights = attention_forward(
        LAYER, query, key, value, mask, position_bias=bias, head_mask=factor, output_attentions=True
    )
    total = (bias + mask).detach().requires_grad_()
    expected, expected_weights = attention(
        query, key, value, Full(), bias=total, enable_gqa=True, return_weights=True
    )
    assert_close(found, (expected * factor.view(1, -1, 1, 1)).transpose(1, 2))
    assert_close(weights, expected_weights.to_dense() * factor.view(1, -1, 1, 1))
    found.square().sum().backward()
    (expected * factor.view(1, -1, 1, 1)).square().sum().backward()
    assert_close(bias.grad, total.grad.sum(0, keepdim=True))
    assert_close(mask.grad, total.grad.sum((1, 2), keepdim=True))


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks"])
def test_what_is_not_served_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"expected no {name}"):
        attention_forward(LAYER, *tensors(), None, **{name: torch.zeros(1)})


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, N + 1),
        torch.ones(2, N, N),
        torch.ones(2, 1, N, N, dtype=torch.int64),
        "causal",
    ],
)
def test_wrong_masks(mask):
    with pytest.raises(TypeError, match="sparse_attn: expected attention_mask"):
        attention_forward(LAYER, *tensors(), mask)


# Peak resident memory of one forward and backward in a fresh process, beyond that of what came
# before. One bool for each pair would be 1 GiB.
LONG = 32768
PROBE = """
import sys, torch
from transformers import MistralConfig, MistralModel
from sparse_attn.huggingface import register

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n, window, **options):
    config = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, sliding_window=window,
        attn_implementation=sys.argv[1])
    before = peak()
    ids = torch.randint(3, 32, (1, n))
    MistralModel(config)(ids, **options).last_hidden_state.square().sum().backward()
    return peak() - before

register()
n = int(sys.argv[2])
halves = torch.cat([torch.arange(n // 2), torch.arange(n - n // 2)])[None]
padding = (torch.arange(n) >= n // 3).long()[None]
step(256, 256)
print(step(n, 256))
print(step(n, 256, use_cache=False))
print(step(n, 256, attention_mask=padding))
print(step(n, 256, position_ids=halves, use_cache=False))
print(step(n, None, attention_mask=padding))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize(("implementation", "n"), [("sparse_attn", LONG), ("eager", LONG // 8)])
def test_peak_memory(implementation, n):
    command = [sys.executable, "-c", PROBE, implementation, str(n)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    growth = [int(line) for line in result.stdout.split()]
    # Measured: 68 to 94 MiB for the first, of tensors of 2 MiB; eager takes more at an eighth.
    assert (sum(growth) <= 160 * 2**20) == (implementation == "sparse_attn"), growth
