"""What torch.compile leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """`torch.compiler.disable`, but only when a compiler comes by: at import it loads
    torch._dynamo, which takes as long as torch itself.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which loads torch._dynamo to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
