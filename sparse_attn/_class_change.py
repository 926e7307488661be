"""Modules that become instances of a subclass of their class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType

from torch import nn


def change_classes(classes: Mapping[nn.Module, type[nn.Module]]) -> None:
    """Give each module a class derived from its own; all else stays, and so does the object.

    Where a wrapper (accelerate's hooks) keeps the module's own `forward` as an attribute of the
    module, the new one takes its place.

    Raises:
        ValueError: A module has a `forward` that does not come from its class, so that the new
            class could not tell what is called. Then none is changed.
    """
    for module in classes:
        if "forward" in vars(module) and not _kept_forwards(module):
            raise ValueError(
                "sparse_attn: expected modules that call the forward of their class, got a "
                f"{type(module).__name__} whose forward was replaced; replace the attention first"
            )
    for module, new in classes.items():
        for name in _kept_forwards(module):
            vars(module)[name] = MethodType(new.forward, module)
        module.__class__ = new


def _kept_forwards(module: nn.Module) -> list[str]:
    """The attributes that hold the method of the class."""
    own = type(module).forward
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is own
    ]
