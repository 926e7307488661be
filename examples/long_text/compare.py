"""Does sparsity keep the quality? Each attention trained alike, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from long_text.measure import peak_memory
from long_text.model import ATTENTIONS
from long_text.plots import save_comparison
from long_text.training import Trainer

STEPS = 140  # of each attention: about seven minutes for all on two quiet cores
HEAD = (
    f"{'attention':<11} {'keys/query':>10} {'bits/byte':>10} {'vs. full':>10} {'seconds':>8} "
    f"{'s/step':>7} {'bytes/s':>8} {'peak MiB':>9} {'training MiB':>13}"
)


def measure(trainer: Trainer) -> dict:
    """Train to the end, without checkpoints: what it took, and what came out."""
    settings, history = trainer.settings, trainer.history
    before = peak_memory()
    if not trainer.train(None):
        raise KeyboardInterrupt
    peak = peak_memory()
    return {
        "keys": trainer.model.config.keys_per_query(settings.length),
        "bits": trainer.held_out_bits(),
        "seconds": history.seconds,
        "bytes": len(history.train) * settings.batch * settings.length,
        "peak": peak,
        "training": peak - before,
        "train": history.train,
        "gradient_norms": history.gradient_norms,
    }


def row(kind: str, result: dict, full: dict) -> str:
    """A line under HEAD."""
    seconds, steps = result["seconds"], len(result["train"])
    return (
        f"{kind:<11} {result['keys']:>10.0f} {result['bits']:>10.3f} "
        f"{result['bits'] - full['bits']:>+10.3f} {seconds:>8.0f} {seconds / steps:>7.3f} "
        f"{result['bytes'] / seconds:>8.0f} {result['peak'] / 2**20:>9.0f} "
        f"{result['training'] / 2**20:>13.0f}"
    )


def compare(
    script: Path,
    arguments: Sequence[str],
    out: Path,
    baseline: float,
    kinds: Sequence[str] = ATTENTIONS,
) -> int:
    """Run `script --measure` for each attention, one after the other; print a table, draw a figure.

    `arguments` are the user's own; what comes later on a command line wins. `baseline` is in bits
    per byte. The others are held against the first of `kinds`.

    Returns:
        The exit status.
    """
    results: dict[str, dict] = {}
    print(HEAD, flush=True)
    for kind in kinds:
        command = [sys.executable, str(script), *arguments, "--attention", kind, "--measure"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            return child.returncode  # it has said why
        results[kind] = json.loads(child.stdout.splitlines()[-1])
        print(row(kind, results[kind], results[kinds[0]]), flush=True)
    print(
        f"bits/byte: of the held-out text, {baseline:.3f} by two bytes of context\n"
        "training: peak memory less what the process held before its first step"
    )
    text = json.dumps({"baseline_bits": baseline, "attention": results})
    (out / "compare.json").write_text(text + "\n")
    save_comparison(out / "compare.png", results, baseline)
    print(f"{out}: compare.png, compare.json")
    return 0
