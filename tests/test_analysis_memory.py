"""Reports, recommendations and fits take memory that is linear in the length."""

import subprocess
import sys

import cases
import pytest

PROBE = """
import sys, torch
sys.path.insert(0, {tests!r})
import cases
from functools import partial
from sparse_attn import *

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    query, key, value = cases.inputs(cases.Shape(n_q=n, head_dim=16, batch=1, heads=1))
    before = peak()
    {call}
    return peak() - before

step(256)
torch.randn({long}, 16 * 16)  # what inputs() needs at once
print(step({long}))
"""

# Calls, the length, and the most that they may take, in tensors of (length, 16) float32: outputs,
# their difference, its square in float64; or 64 columns of weights, with what is made of them, or
# the sums of 1024 × 1024 blocks, sorted.
CALLS = {
    "report": (
        "approximation_report(query, key, value, Window(256, 0) | GlobalKeys([0]) & Causal())",
        65536,
        9,
    ),
    "sampled": ("approximation_report(query, key, value, Window(64), queries=64)", 65536, 9),
    "function": (
        "approximation_report(query, key, value, partial(attention, pattern=Window(64)), block=64)",
        8192,
        80,
    ),
    "fit": ("fit_pattern([(query, key)], 64, 0.1)", 16384, 8),
    "fit_small": ("fit_pattern([(query, key)], 16, 0.1, is_causal=True)", 16384, 80),
    "gradient": ("gradient_pattern([(query, key, value, value)], 32, 0.1)", 8192, 100),
    "recommend": ("recommend_pattern(query, key, value, 0.05, queries=64)", 16384, 100),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(cases.CUDA_KERNELS, reason="no memory of a GPU in /proc; emulated, it lasts")
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name):
    call, long, tensors = CALLS[name]
    program = PROBE.format(tests=sys.path[0], call=call, long=long)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Weights of all pairs are length / 16 of these tensors, 512 at least.
    assert int(result.stdout) <= tensors * long * 16 * 4
