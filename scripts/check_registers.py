"""Print what each CUDA kernel takes of registers, and fail if a fast one spills or waits too often.

The numbers are ptxas's own: build with -DCMAKE_CUDA_FLAGS=-Xptxas=-v and give the log of the build.
Fast kernels are those on tensor cores with masks of a plan, for calls without modifiers; others may
spill, and it is printed. Products of a warpgroup (wgmma) are to be under way while others begin;
where ptxas cannot see that this is right it waits for each, and says so.

With --library, and where there is cuobjdump, the machine code is looked at as well: the kernels for
sm_90a are to have warpgroup products, and fast ones no access to local memory.
"""

import argparse
import re
import shutil
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
WAITS = re.compile(r"\((?P<code>C75\d\d)\)(?P<what>[^\n]*?) in (?:the )?function '(?P<name>\w+)'")
FUNCTION = re.compile(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", re.DOTALL)
GRADIENTS = ("of query", "of key and value", "of key", "of value")  # enum Grad


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    spilled: int

    @property
    def fast(self) -> bool:
        return self.name.startswith(("Mma", "Sm90")) and self.name.endswith("false>")


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


def waits(log: str) -> list[str]:
    """What ptxas says of warpgroup products that it could not leave under way."""
    return sorted(
        {
            f"{readable(m['name'])}: {m['code']}: {m['what'].strip(' :')}"
            for m in WAITS.finditer(log)
        }
    )


def check_machine_code(library: Path) -> list[str]:
    """What is wrong with the kernels for sm_90a of a library."""
    command = ["cuobjdump", "-sass", "-arch", "sm_90a", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wrong = []
    for name, code in FUNCTION.findall(listing):
        kernel = readable(name)
        if not kernel.startswith("Sm90"):
            continue
        products, local = code.count("HGMMA"), len(re.findall(r"\b(?:STL|LDL)\b", code))
        print(f"sm_90a  {products:3d} warpgroup products  {kernel}")
        if products == 0 or (kernel.endswith("false>") and local > 0):
            wrong.append(f"{kernel}: {products} HGMMA, {local} accesses to local memory")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="output of the build")
    parser.add_argument("--library", type=Path, help="what was built")
    arguments = parser.parse_args()
    log = arguments.log.read_text()
    found = kernels(log)
    if not any(kernel.fast for kernel in found):
        sys.exit(f"{arguments.log} has no fast kernel: was it built with -Xptxas=-v?")
    for kernel in found:
        spilled = f", spills {kernel.spilled} bytes" if kernel.spilled else ""
        print(f"{kernel.arch}  {kernel.registers:3d} registers{spilled}  {kernel.name}")
    if bad := [k for k in found if k.fast and k.spilled]:
        sys.exit("fast kernels that spill: " + "; ".join(f"{k.name} for {k.arch}" for k in bad))
    if waiting := waits(log):
        sys.exit("products that are waited for one by one: " + "; ".join(waiting))
    if arguments.library is None:
        return
    if shutil.which("cuobjdump") is None:
        print("machine code left out: there is no cuobjdump")
    elif wrong := check_machine_code(arguments.library):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
