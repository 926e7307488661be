"""The GPU benchmark: rules are patterns, its accounting is `cost`, its file has the fields."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_attentions  # noqa: E402
import gpu_peers  # noqa: E402
from gpu_workload import CASES, Reference, Setup, make_inputs  # noqa: E402


def setup(name: str, length: int, dtype: torch.dtype = torch.float32) -> Setup:
    return Setup(CASES[name], length, 16, 2, 4, 2, dtype, DEVICE)


@pytest.mark.parametrize("length", [300, 640])
@pytest.mark.parametrize("name", CASES)
def test_rules_and_accounting_are_those_of_the_pattern(name, length):
    call = setup(name, length)
    index = torch.arange(length, device=DEVICE)
    seen = call.visible()(index[:, None], index).cpu()
    assert torch.equal(seen, call.case.pattern.mask(length))
    cost = call.case.pattern.cost(length, head_dim=16, dtype=torch.float32)
    assert call.flops("forward") == 2 * 4 * cost.flops
    assert call.flops("backward") == 2 * 4 * 10 * cost.pairs * 16
    # Four query heads to two key heads: three quarters of what heads of their own would take.
    assert call.bytes("forward") == 2 * 4 * cost.bytes * 3 / 4
    assert call.bytes("backward") == 2 * call.bytes("forward")


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_block_masks_hold_the_pattern(name, block):
    call = setup(name, 640)
    mask = gpu_attentions.block_mask(call, block, elements=3 * block * 640)
    blocks = 640 // block
    seen = call.case.pattern.mask(640).view(blocks, block, blocks, block)
    assert torch.equal(mask.to_dense()[0, 0].cpu().bool(), seen.any(3).any(1))
    assert torch.equal(mask.full_kv_num_blocks[0, 0].cpu(), seen.all(3).all(1).sum(1).int())


@pytest.mark.parametrize("dense", [False, True])
def test_reference_rows_are_dense_attention(dense):
    call = setup("window512_global16", 600)
    inputs = make_inputs(call)
    reference = Reference(call, inputs, count=40)
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    query, key, value = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    mask = None if dense else call.case.pattern.mask(600).to(DEVICE)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    grads = torch.autograd.grad(output, leaves, reference.grad.double())
    rows = reference.rows
    expected = (output[:, :, rows], grads[0][:, :, rows], *grads[1:])
    for result, other in zip(reference.compute(dense), expected, strict=True):
        torch.testing.assert_close(result, other)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def test_what_it_writes_and_resumes(tmp_path):
    out = tmp_path / "found.json"
    options = ["--device", DEVICE, "--lengths", 256, 512, "--head-dims", 16, "--heads", 2]
    options += ["--rounds", 1, "--seconds", 0.001, "--dtype", "float32", "--out", out]
    options += ["--implementations", "sparse_attn", "sdpa_flash"]
    done = run("gpu_peers.py", *options, "--cases", "window512")
    assert done.returncode == 0, done.stderr
    done = run("gpu_peers.py", *options, "--cases", "window512", "bigbird64", "--resume")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"device", "torch", "commit", "results"} <= result.keys()
    ours = [row for row in result["results"] if row["implementation"] == "sparse_attn"]
    calls = {(row["case"], row["length"], row["direction"]) for row in ours}
    assert len(calls) == len(ours) == 8
    for row in ours:
        assert row["ms"] > 0
        assert row["error"] < 1e-2
        assert row["path"]
        assert {"dtype", "batch", "heads", "heads_kv", "head_dim", "gb_per_s", "peak_mib"} <= set(
            row
        )
        pattern = CASES[row["case"]].pattern
        per_pair = {"forward": 4, "backward": 10}[row["direction"]]
        flops = 2 * per_pair * 16 * pattern.cost(row["length"]).pairs
        assert row["useful_tflops"] == pytest.approx(flops / row["ms"] / 1e9)
    assert out.with_suffix(".png").stat().st_size > 10000
    assert "| bigbird64 | 512 |" in out.with_suffix(".md").read_text()


def test_no_case_within_the_budget_is_an_error(tmp_path):
    done = run("gpu_peers.py", "--device", DEVICE, "--budget", 0, "--out", tmp_path / "found.json")
    assert done.returncode != 0
    assert "budget" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_calls_that_matter_most_come_first(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_peers.py", "--device", "cpu"])
    args = gpu_peers.parse_arguments()
    first = [(s.length, s.case.name, s.head_dim) for s in gpu_peers.setups(args)[:8]]
    names, head_dims = ("window512", "window512_causal"), (64, 128)
    assert first == [(n, c, d) for n in (16384, 65536) for c in names for d in head_dims]


def test_the_small_set_runs_here():
    done = run("gpu_small.py", "--device", DEVICE, "--dtypes", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of the tolerance") >= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_the_check_says_so(tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.sh"
    command = ["env", f"PYTHON={sys.executable}", "bash", str(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] == ["machine"]
    assert "no CUDA device" in summary["steps"][0]["note"]
