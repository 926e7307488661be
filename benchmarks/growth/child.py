"""Measures steps in a process of their own: peak memory and time.

A line of JSON on standard input asks for one measurement, a line on standard output answers it.
`Worker` is the other end. Peak memory is the largest resident memory of the process less what it
had when its libraries were loaded and its threads had started, so all of a step counts: inputs,
output, gradients, everything between.
"""

from __future__ import annotations

import argparse
import json
import resource
import select
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from memory import PeakMemory
from timing import once

from growth.methods import METHODS, Method, inputs, task, window

WARM_UP = 256  # tokens


def find_method(name: str) -> Method:
    """A method by its name, or a window by its reach."""
    return METHODS[name] if name in METHODS else window(int(name))


def measure(method: Method, start: PeakMemory, args: argparse.Namespace, wanted: dict) -> dict:
    """Peak bytes of a step, those of the inputs among them, and the seconds of some more steps."""
    n, backward = wanted["n"], wanted["backward"]
    PeakMemory()  # sets the process's peak to what it has now
    leaves, grad = inputs(method.leaves, args.heads, n, args.seed)
    run = task(method, n, (leaves, grad), backward)
    seconds = [once(run)]
    result = {"peak": start.rise(), "inputs": sum(x.nbytes for x in (*leaves, grad))}
    if wanted.get("patience") is None or seconds[0] < wanted["patience"]:
        seconds += [once(run) for _ in range(wanted["repeats"])]
    return result | {"seconds": min(seconds)}


def _allocated() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve(args: argparse.Namespace) -> None:
    """Answers requests until standard input ends."""
    torch.set_num_threads(args.threads)
    method = find_method(args.method)
    for backward in (False, True):
        task(method, WARM_UP, inputs(method.leaves, args.heads, WARM_UP, args.seed), backward)()
    start = PeakMemory()
    if args.ceiling:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_allocated() + args.ceiling, hard))
    for line in sys.stdin:
        try:
            result = measure(method, start, args, json.loads(line))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            result = {"error": "out of memory"}
        print(json.dumps(result), flush=True)


class Worker:
    """A process that measures one method; a context."""

    def __init__(self, method: str, heads: int, threads: int, seed: int, ceiling: int = 0):
        options = {"heads": heads, "threads": threads, "seed": seed, "ceiling": ceiling}
        words = [f"--{name}={value}" for name, value in options.items()]
        self._command = [sys.executable, str(Path(__file__).resolve()), f"--method={method}"]
        self._command += words

    def __enter__(self) -> Worker:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def measure(
        self,
        n: int,
        backward: bool,
        repeats: int = 0,
        patience: float | None = None,
        limit: float | None = None,
    ) -> dict:
        """{"peak", "inputs", "seconds"} or {"error": "out of memory" or "out of time"}.

        `seconds` is the least of 1 + repeats steps, of the first alone if that takes longer than
        `patience`. All of them are broken off after `limit` seconds.
        """
        wanted = {"n": n, "backward": backward, "repeats": repeats, "patience": patience}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self._process.kill()
            self.__exit__()
            self.__enter__()
            return {"error": "out of time"}
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the measuring process ended with {self._process.wait()}")
        return json.loads(answer)


def main() -> None:
    """The command line of the measuring process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True, help=f"{', '.join(METHODS)}, or a reach")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ceiling", type=int, default=0, help="bytes that may be allocated; 0: all"
    )
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
