"""The example of context parallelism: the losses are those of the process alone."""

import re
import subprocess
import sys

import pytest
import torch.distributed as dist
from example_scripts import EXAMPLES

TOY = "--length 301 --layers 2 --width 32 --heads 2 --window 16 --steps 8 --dtype float64"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk by gloo")
def test_losses_are_those_of_the_process_alone(tmp_path):
    text = tmp_path / "text"  # the Python reference is another one with each version
    text.write_text("the same few words, again and again; " * 100)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    script = str(EXAMPLES / "train_context_parallel.py")
    command = [sys.executable, *launch.split(), script, "--text", str(text), *TOY.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "301 bytes over 2 processes: [151, 150]" in done.stdout
    rows = re.findall(r"^\d+ +([\d.]+) +([\d.]+) +([\d.e+-]+)", done.stdout, re.MULTILINE)
    assert len(rows) == 8
    assert all(loss == alone and float(difference) < 1e-10 for loss, alone, difference in rows)
    assert float(rows[0][0]) > float(rows[-1][0])
