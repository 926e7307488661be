"""The detector of dense fallbacks: visited pairs and memory grow with N, not with its square."""

import subprocess
import sys

import cases
import pytest
import torch
from cases import DEVICE

from sparse_attn import attention, plan_info

LONG, SHORT = 65536, 16384
# Four times the length; the rest is for tiles at the edges.
GROWTH = 4.4
# Radial(64) has keys in log2(n / 64) octaves, and in those nearer than 64.
OCTAVES = 11 / 9

SPARSE = sorted(cases.PATTERNS.keys() - cases.DENSE)
DRAWN_ONE_BY_ONE = {name for name in SPARSE if "RandomTokens" in cases.PATTERNS[name]}


def test_dense_patterns_are_the_quadratic_ones():
    """DENSE excuses nothing: its pairs do grow with N², those of the others do not."""
    for name in cases.PATTERNS:
        pattern = cases.pattern(name)
        growth = pattern.cost(8192).pairs / pattern.cost(2048).pairs
        assert (growth > 6) == (name in cases.DENSE), name


@pytest.mark.parametrize("name", SPARSE)
def test_plans_grow_linearly(name):
    pattern = cases.pattern(name)
    long, short = (plan_info(pattern, n) for n in (LONG, SHORT))
    growth = GROWTH * OCTAVES if name in cases.OCTAVES else GROWTH
    assert long["pairs"] <= growth * short["pairs"]
    assert long["visited_pairs"] <= growth * short["visited_pairs"]
    assert long["bytes"] <= growth * short["bytes"]
    assert long["visited_pairs"] >= long["pairs"] > 0


@pytest.mark.parametrize("name", sorted(set(SPARSE) - DRAWN_ONE_BY_ONE))
def test_masks_do_not_grow(name):
    """The element masks of the tiles are few, whatever the length."""
    pattern = cases.pattern(name)
    long, short = (plan_info(pattern, n) for n in (LONG, SHORT))
    assert long["distinct_masks"] <= short["distinct_masks"] + 8


@pytest.mark.parametrize("name", SPARSE)
def test_plans_for_one_query_are_small(name):
    """Decoding: one query against many keys visits no more than a few of its rows' tiles."""
    visited = plan_info(cases.pattern(name), 1, LONG)["visited_pairs"]
    assert visited <= 4 * 64 * LONG


# Peak resident memory of one forward and backward in a fresh process, beyond the peak after the
# inputs were made and a short call had started the threads. Linux counts it in /proc.
PROBE = """
import sys, torch
sys.path.insert(0, {tests!r})
import cases
from sparse_attn import attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    leaves = [x.requires_grad_() for x in cases.inputs(
        cases.Shape(n_q=n, head_dim=16, batch=1, heads=1))]
    before = peak()
    attention(*leaves, cases.library({expression!r})).sum().backward()
    return peak() - before

step(256)
torch.randn({long}, 16 * 16)  # what inputs() needs at once
print(step({long}))
"""

TENSOR = LONG * 16 * 4


LINEAR = [
    "Window(256)",
    "Window(256) | Global(range(16))",
    "Window(128, dilation=4)",
    "BigBird(64)",
    "Strided(256)",
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize("expression", LINEAR)
def test_peak_memory(expression):
    program = PROBE.format(tests=sys.path[0], expression=expression, long=LONG)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Output, log-sum-exp and four gradients are 4.2 tensors of 4 MiB; as much again for the work.
    # One row of scores per query would be 16 GiB.
    assert int(result.stdout) <= 9 * TENSOR


# Measured: 3 to 9.1 tensors, as what was freed is found again or not; pairs would be thousands.
DERIVATIVES = {
    "tangent": """
leaves = [x.detach() for x in leaves]
torch.func.jvp(lambda *x: attention(*x, Window(256)), tuple(leaves), tuple(leaves))
""",
    "second": """
first = torch.autograd.grad(attention(*leaves, Window(256)).sum(), leaves, create_graph=True)
torch.autograd.grad(sum(x.sum() for x in first), leaves)
""",
    "toeplitz": """
table = torch.zeros(1, 513, requires_grad=True)
attention(*leaves, Window(256), bias=table, gate=table + 1).sum().backward()
""",
    "toeplitz_second": """
table = torch.zeros(1, 513, requires_grad=True)
output = attention(*leaves, Window(256), bias=table)
(first,) = torch.autograd.grad(output.square().sum(), table, create_graph=True)
torch.autograd.grad(first.sum(), [table, *leaves])
""",
    "blocks": """
table = torch.zeros(1, 1, n // 512, n // 512, requires_grad=True)
attention(*leaves, Window(256), bias=BlockBias(table, 512), dropout_p=0.1).sum().backward()
""",
}

PROBE_OF_DERIVATIVES = PROBE.replace(
    "    attention(*leaves, cases.library({expression!r})).sum().backward()\n",
    "    exec({body!r})\n",
).replace(
    "from sparse_attn import attention", "from sparse_attn import BlockBias, Window, attention"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_peak_memory_of_derivatives(name):
    program = PROBE_OF_DERIVATIVES.format(tests=sys.path[0], body=DERIVATIVES[name], long=LONG)
    program = program.replace("step(256)", "step(1024)")
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 12 * TENSOR


@pytest.mark.skipif(DEVICE.type != "cuda", reason="asks torch's CUDA allocator")
@pytest.mark.parametrize("expression", LINEAR)
def test_peak_memory_of_a_gpu(expression):
    shape = cases.Shape(n_q=LONG, head_dim=16, batch=1, heads=1)
    leaves = [x.requires_grad_() for x in cases.inputs(shape)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*leaves, cases.library(expression)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 9 * TENSOR
