"""Hand the build to CMake; everything else about the package stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"  # kept, so that a second build compiles only what changed

NO_TORCH = """sparse_attn is compiled against the torch that you use, and this environment has none.
Install torch 2.11 or newer first, then sparse_attn with
    pip install --no-build-isolation .
Without --no-build-isolation pip builds in an environment of its own, which has no torch."""


def torch_root() -> Path:
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(NO_TORCH)
    return Path(spec.submodule_search_locations[0])


def parallel_jobs() -> int:
    """As many compilers as cores, and no more than memory holds: one takes up to 1.5 GB."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, int(memory / 1.5e9)))


def find_ninja() -> str | None:
    scripts = sysconfig.get_path("scripts")
    return shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))


def forget_foreign_cache() -> None:
    """Drop CMake's cache if the folder was moved or copied, or its generator's program is gone."""
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists():
        return
    entries = dict(line.split("=", 1) for line in cache.read_text().splitlines() if "=" in line)
    home = entries.get("CMAKE_HOME_DIRECTORY:INTERNAL", "")
    uses_ninja = entries.get("CMAKE_GENERATOR:INTERNAL") == "Ninja"
    if Path(home) != ROOT or uses_ninja != bool(find_ninja()):
        cache.unlink()
        shutil.rmtree(BUILD / "CMakeFiles", ignore_errors=True)


class CMakeBuild(build_ext):
    """Configure, build, and install into the package's folder: the sources' when in place."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        forget_foreign_cache()
        ninja = find_ninja()
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        options = [
            f"-DSPARSE_ATTN_TORCH_ROOT={torch_root()}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DSPARSE_ATTN_LIBDIR=.",
            *shlex.split(os.environ.get("SPARSE_ATTN_CMAKE_ARGS", "")),
        ]
        self.cmake("-S", ROOT, "-B", BUILD, *generator, *options)
        self.cmake("--build", BUILD, "--parallel", parallel_jobs())
        self.cmake("--install", BUILD, "--prefix", package / "sparse_attn")

    def cmake(self, *arguments: object) -> None:
        if not shutil.which("cmake"):
            raise SystemExit("sparse_attn needs CMake 3.18 or newer; there is none on PATH")
        try:
            subprocess.run(["cmake", *map(str, arguments)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"cmake failed with {error.returncode}, see above") from None


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("sparse_attn._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": "build/python"}},
    )
