"""Loads the compiled ops, so that `torch.ops.sparse_attn` exists."""

import os
from pathlib import Path

import torch

ROOT = Path(__file__).parent


def load() -> None:
    """Load libsparse_attn, which does not depend on the version of Python.

    The environment variable SPARSE_ATTN_LIBRARY names one built elsewhere.

    Raises:
        ImportError: It was not built, or was built for another torch.
    """
    chosen = os.environ.get("SPARSE_ATTN_LIBRARY")
    library = Path(chosen) if chosen else ROOT / "libsparse_attn.so"
    if not library.exists():
        raise ImportError(
            f"sparse_attn: expected the compiled library {chosen}, which SPARSE_ATTN_LIBRARY names"
            if chosen
            else f"sparse_attn: expected the compiled library {library.name} beside the package, "
            "found none; build it with: pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"sparse_attn: expected {library.name} to be built for torch {torch.__version__}; "
            "build it again with: pip install --no-build-isolation --force-reinstall --no-deps . "
            f"({error})"
        ) from error


load()
ops = torch.ops.sparse_attn
