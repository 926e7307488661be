"""One line for the models of Hugging Face that do their sparse attention themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def _adapt_bigbird(module: nn.Module) -> nn.Module:
    from sparse_attn.huggingface.bigbird import swap

    return swap(module)


_BIGBIRD = "transformers.models.big_bird.modeling_big_bird"
_PEGASUS = "transformers.models.bigbird_pegasus.modeling_bigbird_pegasus"

#: For each class of transformers what makes, from the old module, the one that takes its place.
_ADAPTERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    f"{_BIGBIRD}.BigBirdAttention": _adapt_bigbird,
    f"{_BIGBIRD}.BigBirdBlockSparseAttention": _adapt_bigbird,
    f"{_PEGASUS}.BigBirdPegasusBlockSparseAttention": _adapt_bigbird,
    f"{_PEGASUS}.BigBirdPegasusEncoderAttention": _adapt_bigbird,
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
                new = adapter(child)
                if new is not child:
                    setattr(parent, name, new.train(child.training))
    if not any(type(module).__module__.startswith(__package__) for module in model.modules()):
        raise ValueError(
            "sparse_attn: expected a model that holds one of transformers' "
            f"{', '.join(key.rsplit('.', 1)[1] for key in _ADAPTERS)}, got {type(model).__name__}"
        )
    return model


def _name_of(module: nn.Module) -> str:
    """A subclass has another: what it changes would be lost."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
