"""Print the requirements of requirements files that this environment lacks, one a line.

With --exact a package of another version than the pinned one counts as lacking.
"""

import argparse
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement


def is_missing(requirement: Requirement, exact: bool) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return False
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return True
    return exact and not requirement.specifier.contains(version, prereleases=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    for file in arguments.files:
        for line in file.read_text().splitlines():
            text = line.split("#")[0].strip()
            if text and is_missing(requirement := Requirement(text), arguments.exact):
                print(f"{requirement.name}{requirement.specifier}")


if __name__ == "__main__":
    main()
