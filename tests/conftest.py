"""The device of the tests, and the slice that runs of those marked `sample`.

`--device cuda` (or SPARSE_ATTN_TEST_DEVICE=cuda) puts the tensors of the tests on the GPU. Tests
marked `sample` run in part, another part for every commit.

`SPARSE_ATTN_FULL=1` runs everything, `SPARSE_ATTN_SEED` chooses the part (by default the commit
hash), and a test that the command line names (with `::`) always runs.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings

SHARE = 0.25

# The same examples every time, other ones in each full run; a failure prints how to repeat it.
FULL = os.environ.get("SPARSE_ATTN_FULL") == "1"
settings.register_profile(
    "sparse_attn", deadline=None, derandomize=not FULL, database=None, print_blob=True
)
settings.load_profile("sparse_attn")


def slice_seed() -> str:
    """The environment's seed, else the commit's hash, else 0."""
    if seed := os.environ.get("SPARSE_ATTN_SEED"):
        return seed
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "0"
    return result.stdout.strip() if result.returncode == 0 else "0"


def runs_everything(config: pytest.Config) -> bool:
    return FULL or any("::" in arg for arg in config.args)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=os.environ.get("SPARSE_ATTN_TEST_DEVICE", "cpu"),
        help="of the tensors of the tests: cpu, cuda, cuda:1 (default: SPARSE_ATTN_TEST_DEVICE)",
    )


def check_device(name: str) -> None:
    """Refuses what no test could run on, before thousands of them fail one by one."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {name}: {error}") from None
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {name}: expected cpu or cuda")
    if kind == "cpu":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: torch {torch.__version__} sees no CUDA device")
    import sparse_attn  # noqa: F401 - defines the operator

    if not torch.ops.sparse_attn._cuda_archs():
        raise pytest.UsageError(f"--device {name}: this build of sparse_attn has no CUDA kernels")


def pytest_configure(config: pytest.Config) -> None:
    check_device(config.getoption("device"))
    # For cases.DEVICE, here and in the processes that tests start.
    os.environ["SPARSE_ATTN_TEST_DEVICE"] = config.getoption("device")
    config.addinivalue_line("markers", "sample: a part runs by default, SPARSE_ATTN_FULL=1 all")


def pytest_report_header(config: pytest.Config) -> str:
    where = f"sparse_attn on {config.getoption('device')}"
    if runs_everything(config):
        return f"{where}: all tests"
    return f"{where}: a slice, seed {slice_seed()} (SPARSE_ATTN_FULL=1 runs everything)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if runs_everything(config):
        return
    seed = slice_seed()

    def chosen(item: pytest.Item) -> bool:
        if item.get_closest_marker("sample") is None:
            return True
        # The name without its folder: the same slice from wherever pytest is started.
        name = f"{seed}:{item.path.name}::{item.name}"
        return zlib.crc32(name.encode()) < SHARE * 2**32

    dropped = [item for item in items if not chosen(item)]
    items[:] = [item for item in items if chosen(item)]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Thousands of tiny calls: with a busy neighbor, waking a second thread for each took 20 times
    as long. Tests of several threads ask for them; they hold that the results are the same bits.
    """
    torch.set_num_threads(1)
