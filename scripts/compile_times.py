"""Print how long each source file took to compile, and fail if one took longer than the budget.

The times are those of Ninja's log, so they cover the files of earlier builds too.
"""

import argparse
import sys
from pathlib import Path


def compile_seconds(log: Path) -> dict[str, float]:
    seconds = {}
    for line in log.read_text().splitlines():
        if line.startswith("#"):
            continue
        start, end, _, output, *_ = line.split("\t")
        if output.endswith(".o") and (log.parent / output).exists():
            seconds[output] = (int(end) - int(start)) / 1000
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="CMake's build folder")
    parser.add_argument("--budget", type=float, default=90, help="seconds a file may take")
    arguments = parser.parse_args()
    log = arguments.build / ".ninja_log"
    if not log.exists():
        sys.exit(f"{log} is not there: compile times are known only for Ninja builds")
    seconds = compile_seconds(log)
    for output, value in sorted(seconds.items(), key=lambda item: -item[1]):
        target, _, source = output.removeprefix("CMakeFiles/").partition(".dir/")
        print(f"{value:7.1f} s  {target}: {source.removesuffix('.o')}")
    print(f"{sum(seconds.values()):7.1f} s  in all, {len(seconds)} files")
    slow = [output for output, value in seconds.items() if value > arguments.budget]
    if slow:
        sys.exit(f"over the budget of {arguments.budget:g} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
