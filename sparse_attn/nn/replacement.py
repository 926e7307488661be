"""One line that gives the attention of a model a pattern."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sparse_attn._class_change import change_classes
from sparse_attn.nn.multihead import MultiheadAttention
from sparse_attn.patterns import Pattern, check_pattern

#: Called with a module's name and the module; None leaves it as it is.
Choice = Callable[[str, nn.MultiheadAttention], Pattern | None]


def replace_multihead_attention(model: nn.Module, pattern: Pattern | Choice | None) -> nn.Module:
    """Make each `torch.nn.MultiheadAttention` of a model a `MultiheadAttention`, in place.

    The modules stay the objects that they are, with their parameters, settings, mode and hooks, so
    optimizers and `state_dict` go on as before. Modules that are swapped already get the new
    pattern. Subclasses, such as those for quantization, are left alone: what they change would be
    lost.

    Args:
        model: A module that holds some, or is one itself.
        pattern: For all of them, cross-attention too; None for every pair. To choose, a function
            that takes the name of a module in the model and the module, and returns its pattern,
            or None to leave it alone.

    Returns:
        The same model, which may be an `nn.MultiheadAttention` itself.

    Raises:
        TypeError: model is no module, or pattern neither a Pattern nor a function that returns one.
        ValueError: model holds no `nn.MultiheadAttention`, or one that has parametrizations or a
            `forward` of its own. Then nothing is changed.

    >>> from sparse_attn import Window, replace_multihead_attention
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2)
    >>> replace_multihead_attention(model, Window(16))(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])

    A model whose cross-attention stays as it is:

    >>> model = torch.nn.Transformer(64, 4, 1, 1)
    >>> model = replace_multihead_attention(
    ...     model, lambda name, module: Window(16) if name.endswith("self_attn") else None)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sparse_attn: expected model to be an nn.Module, got {type(model).__name__}"
        )
    found = {name: module for name, module in model.named_modules() if _is_plain(module)}
    if not found:
        raise ValueError(
            "sparse_attn: expected a model that holds a torch.nn.MultiheadAttention, got "
            f"{type(model).__name__}"
        )
    patterns: dict[nn.Module, Pattern | None] = {}
    for name, module in found.items():
        chosen = pattern(name, module) if callable(pattern) else pattern
        if chosen is None and pattern is not None:
            continue
        if is_parametrized(module):
            raise ValueError(
                "sparse_attn: expected modules without parametrizations, which can be added "
                f"afterwards, got them on {name or 'model'}"
            )
        if chosen is not None:
            check_pattern(chosen)
        patterns[module] = chosen
    change_classes(dict.fromkeys(patterns, MultiheadAttention))
    for module, chosen in patterns.items():
        module._set_pattern(chosen)
    return model


def _is_plain(module: nn.Module) -> bool:
    """Whether it is of the class itself, which parametrizations derive from."""
    of = type(module).__bases__ if is_parametrized(module) else (type(module),)
    return of in ((nn.MultiheadAttention,), (MultiheadAttention,))
