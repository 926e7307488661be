"""The examples in the docstrings do what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import sparse_attn

# Public modules; a name that starts with "_" is the package's own, and libsparse_attn no module.
MODULES = ["sparse_attn"] + [
    module.name
    for module in pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn.")
    if not any(part.startswith(("_", "lib")) for part in module.name.split("."))
]


# Examples of the patterns use one another without importing them each time.
PUBLIC = sparse_attn.__all__
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    results = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"torch": torch, **{name: getattr(sparse_attn, name) for name in PUBLIC}},
        optionflags=OPTIONS,
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) > 0


@pytest.mark.parametrize("name", ["clustered.md", "modules.md", "ops.md", "patterns.md"])
def test_examples_of_the_pages(name):
    page = Path(__file__).parent.parent / "docs" / name
    result = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
    assert result.attempted >= 10
    assert result.failed == 0
