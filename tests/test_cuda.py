"""What only a GPU has: graphs, streams, devices, and tensors past 32-bit indices.

Everything else of the CUDA kernels is tested by the other files, with `--device cuda`, and on the
emulator of tests/native.
"""

import pytest
import torch
from cases import CUDA_KERNELS, DEVICE
from torch import Tensor

from sparse_attn import (
    BlockLayout,
    Causal,
    Full,
    Global,
    KeyLists,
    Mask,
    Pattern,
    PerHead,
    Window,
    attention,
    clear_plan_cache,
)

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: --device cuda")
needs_kernels = pytest.mark.skipif(not CUDA_KERNELS, reason="of the CUDA kernels, which serve none")


def tensors(
    length: int = 200, batch: int = 2, heads: int = 4, size: int = 64, dtype=torch.bfloat16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, length, size)
    return [
        torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3)
    ]


def patterns(length: int = 200) -> dict[str, tuple[Pattern, dict]]:
    """Those that take different ways to the device."""
    generator = torch.Generator().manual_seed(1)
    tokens = (torch.rand(2, length, generator=generator) < 0.05).to(DEVICE)
    layout = (torch.rand(4, 13, 13, generator=generator) < 0.4).to(DEVICE)
    return {
        "window": (Window(20), {}),
        "passes": (Window(8) | Window(8, dilation=5) | Global([0, -1]), {}),
        "global_mask": (Window(9, 0), {"global_mask": tokens}),
        "padding": (Window(20), {"key_padding_mask": tokens}),
        "layout": (BlockLayout(layout, 16) & Causal(), {}),
        "per_head": (PerHead([Window(5), Full(), Causal(), Window(3, dilation=9)]), {}),
    }


def results(inputs: list[Tensor], pattern: Pattern, options: dict) -> list[Tensor]:
    output = attention(*inputs, pattern, **options)
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def has_sm90() -> bool:
    """The emulator stands for such a device."""
    return DEVICE.type != "cuda" or torch.cuda.get_device_capability() == (9, 0)


@needs_kernels
@pytest.mark.skipif(not has_sm90(), reason="of the kernels for sm_90a, which run on no other")
@pytest.mark.parametrize("name", patterns())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 40])
def test_kernels_for_sm90_are_as_exact_as_others(monkeypatch, name, dtype, size):
    pattern, options = patterns()[name]
    inputs = tensors(size=size, dtype=dtype)
    exact = results([x.detach().double().requires_grad_() for x in inputs], pattern, options)
    monkeypatch.setenv("SPARSE_ATTN_SM90", "0")
    usual = results(inputs, pattern, options)
    monkeypatch.setenv("SPARSE_ATTN_SM90", "1")
    ours = results(inputs, pattern, options)
    assert all(map(torch.equal, ours, results(inputs, pattern, options)))
    for mine, other, expected in zip(ours, usual, exact, strict=True):
        bound = (other - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
        assert (mine - expected).abs().max() <= 2 * bound
    assert torch.ops.sparse_attn._cuda_kernels(inputs[0], inputs[2]) == "sm90"


@needs_gpu
@pytest.mark.parametrize("name", patterns())
def test_no_synchronization(name):
    """Once the plan is there, nobody waits for the device."""
    inputs, (pattern, options) = tensors(), patterns()[name]
    results(inputs, pattern, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(inputs, pattern, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("name", patterns())
def test_graph(name):
    """A captured call gives the same bits, also for other values and with the cache cleared."""
    inputs, (pattern, options) = tensors(), patterns()[name]
    other = [x.detach() * 2 for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = results(inputs, pattern, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, pattern, options)
    clear_plan_cache()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        for x, y in zip(inputs, other, strict=True):
            x.copy_(y)
    graph.replay()
    for ours, theirs in zip(captured, results(inputs, pattern, options), strict=True):
        assert torch.equal(ours, theirs)


@needs_gpu
def test_graph_without_a_call_before():
    inputs = tensors(length=333)
    clear_plan_cache()
    refused = pytest.raises(RuntimeError, match="expected one call with this pattern")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention(*inputs, Window(31))


@needs_gpu
def test_streams():
    """Calls on several streams at a time, with plans that are dropped in between."""
    inputs = tensors()
    expected = {n: results(inputs, *case) for n, case in patterns().items()}
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for turn in range(6):
        found = {}
        for i, (name, case) in enumerate(patterns().items()):
            with torch.cuda.stream(streams[(turn + i) % 3]):
                found[name] = results(inputs, *case)
            clear_plan_cache()
        torch.cuda.synchronize()
        for name, of_name in found.items():
            for ours, theirs in zip(of_name, expected[name], strict=True):
                assert torch.equal(ours, theirs), name


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    """While the first one is current."""
    inputs = [x.detach().to("cuda:1").requires_grad_() for x in tensors()]
    for ours, theirs in zip(
        results(inputs, Window(20), {}), results(tensors(), Window(20), {}), strict=True
    ):
        assert ours.device == inputs[0].device
        assert torch.equal(ours.to(DEVICE), theirs)


@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last head of tensors with 2^31 elements and more."""
    heads, length, size = 8200, 4096, 64
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    query, key, value = (
        torch.randn(1, heads, length, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    output = attention(query, key, value, Window(64))
    last = [x[:, -1:].clone() for x in (query, key, value)]
    assert torch.equal(output[:, -1:], attention(*last, Window(64)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_heads(dtype):
    """More than the 65535 blocks that the second dimension of a grid may have."""
    inputs = tensors(length=3, batch=2, heads=33000, size=8, dtype=dtype)
    output, *gradients = results(inputs, Causal(), {})
    few = [x.detach()[-1:, -2:].requires_grad_() for x in inputs]
    expected = results(few, Causal(), {})
    for ours, theirs in zip([output, *gradients], expected, strict=True):
        assert torch.equal(ours[-1:, -2:], theirs)


def set_precision(name: str) -> None:
    torch.set_float32_matmul_precision(name)


def allow_tf32(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def set_fp32_precision(name: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = name


@needs_kernels
@pytest.mark.parametrize(
    ("setting", "on", "off"),
    [
        (set_precision, "high", "highest"),
        (allow_tf32, True, False),
        (set_fp32_precision, "tf32", "ieee"),
    ],
)
def test_tf32_is_asked_for(setting, on, off):
    """float32 goes through TF32 only where the user lets products do so, in whatever way."""
    inputs = tensors(dtype=torch.float32)
    exact = results([x.double().detach().requires_grad_() for x in inputs], Window(20), {})

    def error() -> float:
        found = results(inputs, Window(20), {})
        return max(float((a - b).detach().abs().max()) for a, b in zip(found, exact, strict=True))

    try:
        setting(off)
        assert error() < 1e-4
        setting(on)
        assert 1e-4 < error() < 5e-2
        attention(*tensors(), Window(20))  # other types do not ask
    finally:
        setting(off)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_below_the_smallest_number(dtype):
    inputs = tensors(dtype=dtype)
    found = results(inputs, Window(20), {"scale": 1e-60})
    for ours, zero in zip(found, results(inputs, Window(20), {"scale": 0.0}), strict=True):
        assert torch.equal(ours, zero)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_slots_after_another_pass(dtype):
    """Rows that are cut along their keys go on from the states of the pass before."""
    inputs = tensors(length=1100, batch=1, heads=1, size=16, dtype=dtype)
    layout = torch.ones(18, 18, dtype=torch.bool, device=DEVICE)
    output = attention(*inputs, BlockLayout(layout, 64) | Window(5))
    exact = [x.detach().double() for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert float((output.detach() - expected).abs().max()) < bound


@needs_kernels
def test_layout_in_place():
    """A layout is read at each call: edits are seen."""
    inputs = tensors()
    layout = torch.zeros(4, 13, 13, dtype=torch.bool, device=DEVICE)
    pattern = BlockLayout(layout, 16)
    assert not results(inputs, pattern, {})[0].any()
    layout[:, torch.arange(13), torch.arange(13)] = True
    assert results(inputs, pattern, {})[0].any(dim=-1).all()


@needs_kernels
def test_too_many_tensors():
    lists = torch.zeros(200, 1, dtype=torch.int64, device=DEVICE)
    pattern = KeyLists(lists)
    for _ in range(12):
        pattern = pattern | Mask(torch.zeros(200, 200, dtype=torch.bool, device=DEVICE))
    with pytest.raises(NotImplementedError, match="fewer than 12 tensors"):
        attention(*tensors(), pattern)
