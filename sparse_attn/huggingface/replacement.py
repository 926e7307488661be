"""One line for the models of Hugging Face that do their sparse attention themselves."""

from __future__ import annotations

from torch import nn

from sparse_attn.huggingface.longformer import LongformerSelfAttention

#: For each class of transformers the one whose module, made from the old one, takes its place.
_ADAPTERS: dict[str, type[nn.Module]] = {
    "transformers.models.led.modeling_led.LEDEncoderSelfAttention": LongformerSelfAttention,
    "transformers.models.longformer.modeling_longformer.LongformerSelfAttention": (
        LongformerSelfAttention
    ),
}


def replace_attention(model: nn.Module) -> nn.Module:
    """Swap the attention of a Hugging Face Longformer, LED or BigBird model in place.

    The new modules hold the same parameters under the same names, so optimizers, `state_dict`,
    `save_pretrained` and `from_pretrained` go on as before, and return what the old ones return.
    The numbers are those of the model; time and memory are not. A second call changes nothing.

    Args:
        model: A model of transformers (4.57 or 5.x), with or without a head, or any module that
            holds one.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module.
        ValueError: model holds no attention that can be swapped.

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
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            adapter = _ADAPTERS.get(_name_of(child))
            if adapter is not None:
                setattr(parent, name, adapter(child).train(child.training))
    if not any(isinstance(module, tuple(_ADAPTERS.values())) for module in model.modules()):
        raise ValueError(
            "sparse_attn: expected a model that holds one of transformers' "
            f"{', '.join(key.rsplit('.', 1)[1] for key in _ADAPTERS)}, got {type(model).__name__}"
        )
    return model


def _name_of(module: nn.Module) -> str:
    """A subclass has another: what it changes would be lost."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
