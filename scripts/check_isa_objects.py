"""Fail if an object file of one instruction set defines a symbol that the linker may merge.

Inline functions and templates, the standard library's too, come out as weak symbols. The linker
keeps one copy of each for the whole library: perhaps the AVX-512 one, which then runs, and dies, on
a machine without it. So what is compiled per instruction set must keep everything to itself, or
give it a name with the instruction set in it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

# Only a pointer, and the same in every copy.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


def mergeable_symbols(file: Path) -> list[str]:
    """The defined symbols that nm marks as weak (W, V) or unique (u)."""
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", file], check=True, capture_output=True, text=True
    ).stdout
    fields = (line.split(maxsplit=2) for line in listing.splitlines())
    return [name for _, kind, name in fields if kind in "WVu" and name not in HARMLESS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="CMake's build folder")
    build = parser.parse_args().build
    files = sorted(build.glob("CMakeFiles/sparse_attn_cpu_*.dir/**/*.o"))
    if not files:
        sys.exit(f"no object files of CPU kernels in {build}")
    found = [f"{file}: {name}" for file in files for name in mergeable_symbols(file)]
    if found:
        sys.exit("mergeable symbols:\n" + "\n".join(found))
    print(f"{len(files)} object files, none with a symbol that the linker may merge")


if __name__ == "__main__":
    main()
