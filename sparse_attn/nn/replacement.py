"""One line that gives the attention of a model a pattern."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from sparse_attn.nn.multihead import MultiheadAttention
from sparse_attn.patterns import Pattern

#: Called with a module's name and the module; None leaves it as it is.
Choice = Callable[[str, nn.MultiheadAttention], Pattern | None]


def replace_multihead_attention(model: nn.Module, pattern: Pattern | Choice | None) -> nn.Module:
    """Swap each `torch.nn.MultiheadAttention` of a model for a `MultiheadAttention`, in place.

    The new modules hold the same parameters under the same names, so optimizers and `state_dict`
    go on as before, and the same settings, mode and hooks. Modules that are swapped already get the
    new pattern. Subclasses, such as those for quantization, are left alone: what they change would
    be lost.

    Args:
        model: A module that holds some, or is one itself.
        pattern: For all of them, cross-attention too; None for every pair. To choose, a function
            that takes the name of a module in the model and the module, and returns its pattern,
            or None to leave it alone.

    Returns:
        The model; where it is an `nn.MultiheadAttention` itself, what takes its place.

    Raises:
        TypeError: model is no module, or pattern neither a Pattern nor a function that returns one.
        ValueError: model holds no `nn.MultiheadAttention`.

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
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.MultiheadAttention, MultiheadAttention)
    ]
    if not found:
        raise ValueError(
            "sparse_attn: expected a model that holds a torch.nn.MultiheadAttention, got "
            f"{type(model).__name__}"
        )
    new: dict[nn.Module, nn.Module] = {}
    for name, module in found:
        chosen = pattern(name, module) if callable(pattern) else pattern
        if chosen is not None or pattern is None:
            new[module] = _converted(module, chosen)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def _converted(module: nn.MultiheadAttention, pattern: Pattern | None) -> MultiheadAttention:
    """A module with all that the old one has; it draws no random numbers."""
    state = dict(vars(module))
    for members in ("_parameters", "_buffers", "_modules"):
        state[members] = copy.copy(state[members])
    new = MultiheadAttention.__new__(MultiheadAttention)
    new.__setstate__(state)
    new._set_pattern(pattern)
    return new
