"""Every instruction set that this build has and this machine can run, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import test_selection
import torch

import sparse_attn

if cases.DEVICE.type != "cpu":
    pytest.skip("instruction sets are the CPU's", allow_module_level=True)

CAPABILITY = torch.backends.cpu.get_cpu_capability()
CPU_INFO = Path("/proc/cpuinfo")
LEVELS = {
    "x86-64-amx": CPU_INFO.exists() and " amx_bf16" in CPU_INFO.read_text(),
    "x86-64-v2": True,
    "x86-64-v3": CAPABILITY != "DEFAULT",
    "x86-64-v4": CAPABILITY == "AVX512",
}


def run(isa: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"SPARSE_ATTN_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def check_numbers() -> None:
    """Forward and backward, all dtypes, through the tiles, tails and paths of one kernel."""
    names = ["window", "dilated_5", "causal_global", "per_head", "empty_rows", "full"]
    for dtype in cases.DTYPES:
        for name in names:
            cases.check(cases.PATTERNS[name], cases.inputs(cases.SHAPES["base"], dtype))
        for head_dim in (1, 7, 40, 80, 256):
            shape = cases.Shape(n_q=67, n_k=70, head_dim=head_dim, value_dim=33, kv_heads=2)
            padding = cases.padding(2, 70)
            cases.check("Window(9)", cases.inputs(shape, dtype), key_padding_mask=padding)
        for k in (1, 9, 40):
            test_selection.check_lists(dtype, n_q=75, n_k=300, k=k, is_causal=True)


@pytest.mark.parametrize("isa", sparse_attn.build_info()["isas"])
def test_numbers(isa):
    if not LEVELS.get(isa, True):
        pytest.skip(f"this machine has no {isa}")
    result = run(isa, __file__)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == isa


def test_the_best_one_is_chosen():
    isas = sparse_attn.build_info()["isas"]
    best = next(isa for isa in isas if LEVELS.get(isa, True))
    asked = os.environ.get("SPARSE_ATTN_ISA", best)
    assert sparse_attn.build_info()["isa"] == asked


def test_an_unknown_one_is_refused():
    result = run("pentium", "-c", "import sparse_attn; print(sparse_attn.build_info())")
    assert result.returncode != 0
    assert "SPARSE_ATTN_ISA" in result.stderr
    assert "pentium" in result.stderr
    for isa in sparse_attn.build_info()["isas"]:
        assert (isa in result.stderr) == LEVELS.get(isa, True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in conftest.py
    check_numbers()
    print(sparse_attn.build_info()["isa"])
