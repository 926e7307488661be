"""The gallery draws every pattern."""

import subprocess
import sys
from pathlib import Path

import pytest

import sparse_attn
from sparse_attn import Pattern

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from gallery import CALLS  # noqa: E402

# What other patterns are joined with, and the base.
JOINS = {"Pattern", "Union", "Intersection", "PerHead"}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in sparse_attn.__all__
        if isinstance(thing := getattr(sparse_attn, name), type)
        and issubclass(thing, Pattern)
        and name not in JOINS
    ],
)
def test_every_pattern_is_drawn(name):
    assert any(f"{name}(" in call for call in CALLS)


def test_picture(tmp_path):
    path = tmp_path / "gallery.png"
    command = [sys.executable, EXAMPLES / "gallery.py", "--out", path, "--dpi", "40"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert path.read_bytes().startswith(b"\x89PNG")
