"""Memory of the attentions of low rank, of Performer, and of a gate for each key, is linear in the
length."""

import subprocess
import sys

import pytest
from cases import DEVICE

LONG = 65536
TENSOR = LONG * 16 * 4

# As in test_linear_memory.py: the peak of a forward and backward beyond that after a short one.
PROBE = """
import torch
from sparse_attn.functional import *

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(n):
    query, key, value = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    few, some = query[:, :, :64], torch.randn(n, 16)
    before = peak()
    output = {call}
    output.sum().backward()
    return peak() - before

step(1024)
print(step({long}))
"""

# In tensors of (length, 16) floats: four gradients, the output and what each saves and copies.
# Queries are few where time would be quadratic. One row of scores for each would be 4096 of them.
CALLS = {
    "linformer": ("linformer_attention(query, key, value, some.requires_grad_())", 16),
    "nystrom": ("nystrom_attention(query, key, value, 16)", 24),
    "low_rank": ("low_rank_attention(few, key, value, 8)", 24),
    # The features of one side would be 16.
    "performer": ("performer_attention(query, key, value, num_features=256)", 12),
    "tucker": ("tucker_attention(few, key, value, (1, 8, 8))", 24),
    "gate_of_keys": ("dynamic_attention(few, key, value, lambda q, k, v: k.mean(-1)[:, None])", 16),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name):
    call, tensors = CALLS[name]
    program = PROBE.format(call=call, long=LONG)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= tensors * TENSOR, int(result.stdout) / TENSOR
