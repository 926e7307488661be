"""The benchmark of deep stacks runs, on a toy size, and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "deep_stack.py"
TOY = {"layers": 2, "steps": 3, "seeds": 1, "width": 16, "length": 40, "batch": 1, "rounds": 1}


def test_writes_curves_and_what_recomputation_keeps(tmp_path):
    words = [f"--{name}={value}" for name, value in TOY.items()]
    command = [sys.executable, str(SCRIPT), *words, "--depths", "1", "3", "--seconds", "0.01"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert [run["kind"] for run in result["runs"]] == ["scaled", "unscaled", "post-norm"]
    assert all(len(run["loss"]) == len(run["gradient_norm"]) == 3 for run in result["runs"])
    kept = {(r["layers"], r["recompute"]): r["kept_bytes"] for r in result["recomputation"]}
    assert kept[3, True] < kept[3, False] / 2
    assert kept[3, True] > kept[1, True]
    assert written.with_suffix(".png").stat().st_size > 10000
