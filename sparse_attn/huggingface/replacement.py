"""One line for the models of Hugging Face that do their sparse attention themselves."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from torch import nn

from sparse_attn._class_change import change_classes

#: Files of transformers, and the module here that knows their classes.
_FILES = {
    "transformers.models.big_bird.modeling_big_bird": "bigbird",
    "transformers.models.bigbird_pegasus.modeling_bigbird_pegasus": "bigbird",
    "transformers.models.led.modeling_led": "longformer",
    "transformers.models.longformer.modeling_longformer": "longformer",
}


def replace_attention(model: nn.Module) -> nn.Module:
    """Swap the attention of a Hugging Face Longformer, LED or BigBird model in place.

    Modules stay the objects that they are, with their parameters, hooks and modes; they become
    instances of subclasses that compute otherwise. So optimizers, `state_dict`, `save_pretrained`
    and `from_pretrained` go on as before, numbers and layouts are those of the model, and time and
    memory are not. A second call changes nothing. Subclasses of transformers' attention are left
    alone, as what they change would be lost.

    Args:
        model: A model of transformers (4.57 or 5.x), with or without a head, or any module that is
            or holds its attention.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module.
        ValueError: model holds no such attention, or some whose `forward` was replaced.

    >>> from transformers import LongformerConfig, LongformerModel
    >>> config = LongformerConfig(
    ...     vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    ...     intermediate_size=64, attention_window=16)
    >>> model = replace_attention(LongformerModel(config))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sparse_attn: expected model to be an nn.Module, got {type(model).__name__}"
        )
    replace_classes(model.modules())
    if not any(type(module).__module__.startswith(__package__) for module in model.modules()):
        raise ValueError(
            "sparse_attn: expected a model of transformers with the attention of Longformer, LED "
            f"or BigBird, got {type(model).__name__}"
        )
    return model


def replace_classes(modules: Iterable[nn.Module]) -> None:
    """Give modules the classes that take the place of their own, where there are some."""
    found = {}
    for module in modules:
        original = type(module)
        if original.__module__ in _FILES:
            here = import_module(f"{__package__}.{_FILES[original.__module__]}")
            if original in here.REPLACEMENTS:
                found[module] = here.REPLACEMENTS[original]
    change_classes(found)
