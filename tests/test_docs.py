"""The README shows the commands that work, and every public name says what it is."""

import inspect
from pathlib import Path

import pytest

import sparse_attn

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "tests/run.sh"])
def test_readme_has_the_commands(script):
    assert f"bash {script}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", sparse_attn.__all__)
def test_public_names_have_docstrings(name):
    thing = getattr(sparse_attn, name)
    if inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
        assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [
            member
            for key, member in vars(thing).items()
            if not key.startswith("_") and inspect.isfunction(member)
        ]
        assert all(inspect.getdoc(method) for method in methods)
        # A dataclass without a docstring gets its signature as one.
        assert not thing.__doc__.startswith(f"{name}(")
