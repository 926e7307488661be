"""Small random models of transformers, by name, for the tests of `register()`."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
SEQUENCE_TO_SEQUENCE = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}

#: Name: (classes of configuration and model, arguments of the configuration).
DECODERS = {
    "mistral": ("Mistral", "ForCausalLM", {**GROUPED, "sliding_window": 7}),
    "gemma2": (
        "Gemma2",
        "ForCausalLM",
        {**GROUPED, **MIXED, "head_dim": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3Text", "ForCausalLM", {**GROUPED, **MIXED, "head_dim": 8}),
    "gpt_oss": ("GptOss", "ForCausalLM", {**GROUPED, **MIXED, **EXPERTS, "head_dim": 8}),
    "llama": ("Llama", "ForCausalLM", GROUPED),
    "qwen2": (
        "Qwen2",
        "ForCausalLM",
        {**GROUPED, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "phi3": ("Phi3", "ForCausalLM", {**GROUPED, "sliding_window": 7}),
    "modernbert_decoder": (
        "ModernBertDecoder",
        "ForCausalLM",
        {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
}
#: Masks that are no band.
CHUNKED = {
    "llama4": (
        "Llama4Text",
        "ForCausalLM",
        {
            **GROUPED,
            "attention_chunk_size": 7,
            "num_local_experts": 2,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
        },
    ),
}
ENCODERS = {
    "modernbert": (
        "ModernBert",
        "Model",
        {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "gemma3_both_ways": (
        "Gemma3Text",
        "Model",
        {**GROUPED, **MIXED, "head_dim": 8, "use_bidirectional_attention": True},
    ),
    "bert": ("Bert", "Model", SIZES),
}
BOTH = {
    "bart": ("Bart", "ForConditionalGeneration", SEQUENCE_TO_SEQUENCE),
    "t5gemma": (
        "T5Gemma",
        "ForConditionalGeneration",
        {
            "vocab_size": 99,
            "encoder": {**GROUPED, **MIXED, "head_dim": 8},
            "decoder": {**GROUPED, **MIXED, "head_dim": 8},
        },
    ),
}
MODELS = {**DECODERS, **CHUNKED, **ENCODERS, **BOTH}
#: What transformers 4 gives attention of its own.
OWN_IN_4 = {"modernbert", "bert"}


def build(name: str, implementation: str, **options: object) -> nn.Module:
    """The same weights for every implementation."""
    import transformers

    prefix, suffix, arguments = MODELS[name]
    base = prefix.removesuffix("Text")
    if not hasattr(transformers, f"{prefix}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {prefix}")
    if name in OWN_IN_4 and transformers.__version__ < "5":
        pytest.skip(f"{prefix} takes no AttentionInterface in transformers 4")
    model_class = getattr(transformers, f"{prefix}{suffix}", None) or getattr(
        transformers, f"{base}{suffix}"
    )
    config_class = getattr(transformers, f"{prefix}Config")
    arguments = copy.deepcopy({**arguments, **options})
    config = config_class(**arguments, attn_implementation=implementation)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in parameter_name:
                parameter.normal_(std=0.15)
    return model.eval().to(DEVICE)


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model with eager attention and with this library's."""
    eager, sparse = build(name, "eager", **options), build(name, "sparse_attn", **options)
    assert sparse.config._attn_implementation == "sparse_attn"
    return eager, sparse


def tokens(batch: int = 2, n: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 99, (batch, n), generator=generator).to(DEVICE)


def padded(ids: Tensor, side: str, length: int = 6) -> Tensor:
    """A mask that pads the last row."""
    mask = torch.ones_like(ids)
    mask[-1, slice(0, length) if side == "left" else slice(ids.shape[1] - length, None)] = 0
    return mask
