"""Peak memory of attention beyond its inputs, for each peer in a process of its own.

    python benchmarks/memory.py --peer sparse_attn --cases window256 window256_n16384

Prints JSON: the rise to the peak of a forward in inference mode and of a forward and backward, with
the output and the gradients, and what of it is neither (extra).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from measure import use_threads
from peers import PEERS, Setup, Unsupported, make_task
from record import DIRECTIONS, OURS
from suites import Problem
from tqdm import tqdm
from workload import find_case, make_inputs


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


def measure(peer_name: str, problem: Problem, direction: str, seed: int) -> dict:
    """The rise of the memory in one call."""
    peer, backward = PEERS[peer_name], direction == DIRECTIONS[1]

    def task_at(length: int):
        sizes = (length, problem.heads, problem.torch_dtype, seed, problem.head_dim)
        return make_task(peer, Setup(problem.case.at(length), make_inputs(*sizes), backward))[0]

    if not peer.compiles:
        task_at(2048)()  # loads libraries and starts threads
    task = task_at(problem.case.length)
    if peer.compiles:
        task()
    peak = PeakMemory()
    results = task()
    rise = peak.rise()
    return {"peak_mib": rise / 2**20, "extra_mib": (rise - sum(x.nbytes for x in results)) / 2**20}


def measure_all(peer: str, problems: Iterable[Problem], seed: int) -> list[dict]:
    """A record for each problem and direction that the peer has."""
    found = []
    for problem in problems:
        for direction in DIRECTIONS:
            use_threads(problem.threads)
            row = problem.fields() | {"peer": peer, "direction": direction}
            try:
                found.append(row | measure(peer, problem, direction, seed))
            except (Unsupported, ImportError):
                continue
    return found


def measure_apart(peer: str, problems: Iterable[Problem], seed: int) -> list[dict]:
    """`measure_all` in fresh processes: one for each set of options."""
    groups = defaultdict(list)
    for problem in problems:
        options = {key: getattr(problem, key) for key in ("dtype", "head_dim", "heads", "threads")}
        groups[tuple(options.items())].append(problem.case.name)
    found = []
    for options, cases in groups.items():
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options]
        command = [sys.executable, __file__, f"--peer={peer}", f"--seed={seed}", *words]
        done = subprocess.run([*command, "--cases", *cases], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            if peer == OURS:
                raise RuntimeError(f"memory: {reason[0]}")
            tqdm.write(f"no memory of {peer}: {reason[0]}")
            continue
        found += json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=PEERS, default="sparse_attn")
    parser.add_argument("--cases", nargs="+", default=["window256_n65536"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = (args.dtype, args.head_dim, args.heads, args.threads)
    problems = [Problem(find_case(name), *options) for name in args.cases]
    print(json.dumps(measure_all(args.peer, problems, args.seed)))


if __name__ == "__main__":
    main()
