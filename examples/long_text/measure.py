"""Time and memory of training steps, each kind of attention in a process of its own."""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

MEASURED_STEPS = 5


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    try:
        # Linux: ru_maxrss would start from the parent's peak, VmHWM belongs to this process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(trainer) -> dict[str, float]:
    """Median seconds of a step, and peak memory, also without what was there before training."""
    before = peak_memory()
    trainer.train_step()  # allocates the optimizer's state, builds plans
    times = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - start)
    peak = peak_memory()
    return {"seconds": statistics.median(times), "peak": peak, "training": peak - before}


def compare(script: Path, arguments: list[str], bytes_per_step: int) -> int:
    """Run `script --measure` for both kinds of attention, one after the other, and print a table.

    `arguments` are the user's own; what comes later on a command line wins.
    Returns the exit status.
    """
    print(f"{'attention':<10} {'s/step':>8} {'tokens/s':>10} {'peak MiB':>10} {'training MiB':>13}")
    for kind in ("sparse", "full"):
        command = [sys.executable, str(script), *arguments, "--attention", kind, "--measure"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            return child.returncode  # it has said why
        result = json.loads(child.stdout.splitlines()[-1])
        print(
            f"{kind:<10} {result['seconds']:>8.3f} {bytes_per_step / result['seconds']:>10.0f} "
            f"{result['peak'] / 2**20:>10.0f} {result['training'] / 2**20:>13.0f}",
            flush=True,
        )
    print("training: peak memory less what the process held before its first step")
    return 0
