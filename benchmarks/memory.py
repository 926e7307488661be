"""Extra peak memory of one forward and backward, in a process of its own.

Prints JSON. Extra is what the process needs at its peak beyond inputs, output and gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from peers import PEERS, Setup, make_task
from workload import HEADS, find_case, make_inputs


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


class PeakMemory:
    """The rise of the resident memory from here to the peak."""

    def __init__(self) -> None:
        try:
            # What earlier work freed must not serve the measured call from the allocator's pool.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
            self._start, self.method = _status("VmRSS"), "VmHWM"
        except (OSError, AttributeError):
            self._start, self.method = self._largest(), "ru_maxrss"

    @staticmethod
    def _largest() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def rise(self) -> int:
        return (_status("VmHWM") if self.method == "VmHWM" else self._largest()) - self._start


def measure(peer_name: str, case_name: str, dtype: torch.dtype, seed: int) -> dict:
    """The extra peak memory of one forward and backward of a peer."""
    peer, case = PEERS[peer_name], find_case(case_name)
    small = case.at(2048)
    task, _ = make_task(peer, Setup(small, make_inputs(small.length, HEADS, dtype, seed), True))
    task()  # loads libraries and starts threads
    inputs = make_inputs(case.length, HEADS, dtype, seed)
    task, note = make_task(peer, Setup(case, inputs, True))
    peak = PeakMemory()
    results = task()
    rise = peak.rise()
    size = inputs[0].nbytes
    produced = sum(x.nbytes for x in results)
    needed = 3 * size + produced
    extra = rise - produced
    return {
        "peer": peer_name,
        "case": case.name,
        "extra_bytes": extra,
        "needed_bytes": needed,
        "extra_percent": 100 * extra / needed,
        "method": peak.method,
        "note": note,
    }


def measure_apart(peer: str, case: str, dtype: str, threads: int, seed: int) -> dict:
    """`measure` in a fresh process."""
    options = {"peer": peer, "case": case, "dtype": dtype, "threads": threads, "seed": seed}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"peer": peer, "case": case, "error": reason[0]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, default="sparse_attn")
    parser.add_argument("--case", default="window256_n65536")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.peer, args.case, getattr(torch, args.dtype), args.seed)))


if __name__ == "__main__":
    main()
