"""Print what each CUDA kernel takes of registers, and fail if a fast one spills them.

The numbers are ptxas's own: build with -DCMAKE_CUDA_FLAGS=-Xptxas=-v and give the log of the build.
Fast kernels are those on tensor cores with masks of a plan, for calls without modifiers; others may
spill, and it is printed.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
KERNEL = re.compile(r"entry<(?P<kernel>\w+(?:<.*?>)?), \w+>")
GRADIENTS = ("of query", "of key and value", "of key", "of value")  # enum Grad


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    spilled: int

    @property
    def fast(self) -> bool:
        return self.name.startswith("Mma") and self.name.endswith("false>")


def readable(mangled: str) -> str:
    """The class of the kernel that an entry function is for."""
    whole = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    for scope in ("sparse_attn::", "cuda::", "(anonymous namespace)::"):
        whole = whole.replace(scope, "")
    name = KERNEL.search(whole)
    return re.sub(
        r"\(Grad\)(\d)", lambda m: GRADIENTS[int(m[1])], name["kernel"] if name else mangled
    )


def kernels(log: str) -> list[Kernel]:
    return sorted(
        Kernel(m["arch"], readable(m["name"]), int(m["registers"]), int(m["spilled"]))
        for m in ENTRY.finditer(log)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="output of the build")
    arguments = parser.parse_args()
    found = kernels(arguments.log.read_text())
    if not any(kernel.fast for kernel in found):
        sys.exit(f"{arguments.log} has no fast kernel: was it built with -Xptxas=-v?")
    for kernel in found:
        spilled = f", spills {kernel.spilled} bytes" if kernel.spilled else ""
        print(f"{kernel.arch}  {kernel.registers:3d} registers{spilled}  {kernel.name}")
    if bad := [k for k in found if k.fast and k.spilled]:
        sys.exit("fast kernels that spill: " + "; ".join(f"{k.name} for {k.arch}" for k in bad))


if __name__ == "__main__":
    main()
