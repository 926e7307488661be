"""The examples in the docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import sparse_attn

# Public modules; a name that starts with "_" is the package's own, and libsparse_attn no module.
MODULES = ["sparse_attn"] + [
    module.name
    for module in pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn.")
    if not any(part.startswith(("_", "lib")) for part in module.name.split("."))
]


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    results = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) > 0
