"""`attn_implementation="sparse_attn"` for the models of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_attn.functional import attention
from sparse_attn.huggingface.masks import BandMask, attention_mask
from sparse_attn.patterns import Full, Window

#: The name that models ask for.
_NAME = "sparse_attn"
_OLDEST = (4, 57)


def register() -> None:
    """Make `attn_implementation="sparse_attn"` known to transformers.

    It serves every model that takes its attention from transformers' `AttentionInterface`: with
    sliding windows (Mistral, Gemma 2 and 3, GPT-OSS, ModernBERT, ...) or without, with grouped
    queries, logit softcapping and attention sinks. The numbers are those of `eager`, but for rows
    of padding, whose output is 0. Causal, sliding and padded inputs and packed sequences take
    memory linear in the length, in `generate` too; other masks (custom ones of four dimensions,
    chunks, blocks of image tokens) are honored, as a dense bias. With `output_attentions=True` the
    weights are returned, dense.

    Under `torch.compile`, a call with neither an attention mask nor a cache may be of packed
    sequences for all that is known, and takes a dense mask; a mask of ones avoids it.

    A second call changes nothing.

    Raises:
        ImportError: transformers is missing or older than 4.57.

    >>> import torch
    >>> from transformers import MistralConfig, MistralForCausalLM
    >>> register()
    >>> config = MistralConfig(
    ...     vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, intermediate_size=64, sliding_window=16,
    ...     attn_implementation="sparse_attn")
    >>> model = MistralForCausalLM(config).eval()
    >>> model(torch.arange(40)[None]).logits.shape
    torch.Size([1, 40, 100])
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_requirement("none")) from error
    found = transformers.__version__
    if tuple(map(int, found.split(".")[:2])) < _OLDEST:
        raise ImportError(_requirement(found))
    transformers.AttentionInterface.register(_NAME, attention_forward)
    transformers.AttentionMaskInterface.register(_NAME, attention_mask)


def _requirement(found: str) -> str:
    oldest = ".".join(map(str, _OLDEST))
    return f"sparse_attn: expected transformers {oldest} or newer for register(), found {found}"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BandMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' models call it, through its `AttentionInterface`.

    Args:
        module: The layer; its `is_causal` counts if there is no mask and `is_causal` is None.
        query: (batch, heads, n_q, head_dim).
        key: (batch, heads_kv, n_k, head_dim).
        value: (batch, heads_kv, n_k, value_dim).
        attention_mask: What `masks.attention_mask` gave; or (batch or 1, heads or 1, n_q, n_k),
            bool (True = allowed) or added to the logits, where the dtype's minimum excludes. These
            say all. With (batch, n_k), nonzero = a token, or None, `is_causal` and
            `sliding_window` hold.
        dropout: Probability that a weight is dropped.
        scaling: Factor of the products; 1 / √head_dim if None.
        is_causal: Whether a query sees no later keys.
        sliding_window: Keys that a causal query sees, its own included; as many on either side of
            a query that is not causal.
        softcap: Bounds the logits.
        s_aux: (heads,), the sinks.
        position_bias: (batch or 1, heads or 1, n_q, n_k), added to the logits.
        head_mask: Factor of each head's weights.
        output_attentions: Also return the weights.
        **others: Options of other implementations.

    Returns:
        (batch, n_q, heads, value_dim) and the weights (batch, heads, n_q, n_k), or None.

    Raises:
        NotImplementedError: An option changes the numbers and has no counterpart here.
    """
    _refuse(**others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, BandMask) and not attention_mask.fits(query, key):
        attention_mask = attention_mask.dense()
    pairs = _read(attention_mask, query, key, causal, sliding_window)
    if pairs.lengths is not None and (output_attentions or position_bias is not None):
        pairs = _read(attention_mask.dense(), query, key, causal, sliding_window)
    wide = torch.promote_types(query.dtype, torch.float32)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, ...] | Tensor:
        return attention(
            query,
            key,
            value,
            pairs.pattern,
            key_padding_mask=padding,
            bias=_sum(pairs.bias, position_bias, (*query.shape[2:3], key.shape[2]), wide),
            dropout_p=dropout,
            scale=scaling,
            softcap=softcap,
            sink=None if s_aux is None else s_aux.to(wide),
            enable_gqa=True,
            return_weights=bool(output_attentions),
        )

    tensors = (query, key[:, :, : pairs.keys], value[:, :, : pairs.keys], pairs.padding)
    if pairs.lengths is not None:
        output, weights = _each_sequence(attend, pairs.lengths, *tensors), None
    elif output_attentions:
        output, weights = attend(*tensors)
        weights = functional.pad(weights.to_dense(), (0, key.shape[2] - pairs.keys)).to(query.dtype)
    else:
        output, weights = attend(*tensors), None
    if head_mask is not None:
        factor = head_mask.view(1, -1, 1, 1) if head_mask.dim() == 1 else head_mask
        output, weights = output * factor, None if weights is None else weights * factor
    return output.transpose(1, 2).contiguous(), weights


#: Options that choose keys or add logits, with what they are called by whom.
_REFUSED = {
    "cache": "continuous batching",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks chosen by an indexer",
    "sinks": "sinks of each query",
}


def _refuse(**options: Any) -> None:
    for name, meaning in _REFUSED.items():
        if options.get(name) is not None:
            raise NotImplementedError(
                f"sparse_attn: expected no {name} ({meaning}), which "
                'attn_implementation="sparse_attn" does not serve; use "eager"'
            )


class _Pairs(NamedTuple):
    """The pairs that a mask allows, as `attention` takes them."""

    pattern: Window | Full
    #: Of the keys the first so many.
    keys: int
    padding: Tensor | None = None
    bias: Tensor | None = None
    lengths: list[list[int]] | None = None


def _read(
    mask: BandMask | Tensor | None,
    query: Tensor,
    key: Tensor,
    causal: bool,
    sliding_window: int | None,
) -> _Pairs:
    batch, keys = key.shape[0], key.shape[2]
    if isinstance(mask, BandMask):
        return _Pairs(mask.pattern, mask.keys, mask.padding, lengths=mask.lengths)
    if mask is None or (isinstance(mask, Tensor) and mask.shape == (batch, keys)):
        reach = math.inf if sliding_window is None else sliding_window - 1
        padding = None if mask is None else mask == 0
        return _Pairs(Window(reach, 0 if causal else reach), keys, padding)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        found = f"a {type(mask).__name__} of shape {tuple(getattr(mask, 'shape', ()))}"
        raise TypeError(
            f"sparse_attn: expected attention_mask of shape {(batch, keys)} or of 4 dimensions, "
            f"got {found}"
        )
    mask = mask[..., :keys]
    if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        return _Pairs(Full(), keys, ~mask[:, 0, 0].expand(batch, -1))
    return _Pairs(Full(), keys, bias=_additive(mask, query.dtype))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of four dimensions as a bias, in which −inf excludes."""
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(
            f"sparse_attn: expected attention_mask to be bool or float, got {mask.dtype}"
        )
    # Sums of two minima may lie below, roundings of one above.
    least = max(torch.finfo(dtype).min, torch.finfo(mask.dtype).min) / 2
    return mask.masked_fill(mask <= least, -math.inf)


def _sum(
    bias: Tensor | None, other: Tensor | None, sizes: tuple[int, int], dtype: torch.dtype
) -> Tensor | None:
    """Biases together, with all the queries and only the keys there are."""
    given = [table[..., : sizes[1]].to(dtype) for table in (bias, other) if table is not None]
    return sum(given[1:], given[0]).expand(-1, -1, *sizes) if given else None


def _each_sequence(
    attend: Callable[..., Tensor],
    lengths: list[list[int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Packed sequences one by one."""
    rows = []
    for row, sizes in enumerate(lengths):
        parts = [tensor[row : row + 1].split(sizes, 2) for tensor in (query, key, value)]
        masks = [None] * len(sizes) if padding is None else padding[row : row + 1].split(sizes, 1)
        rows.append(torch.cat([attend(*part) for part in zip(*parts, masks, strict=True)], 2))
    return torch.cat(rows)
