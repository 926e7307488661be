"""`torch.nn.MultiheadAttention` over any pattern."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn.functional import attention as whole_attention
from sparse_attn.merging import merge
from sparse_attn.nn._context_parallel import SharedGroup, own_group
from sparse_attn.nn._dense import dense_attention
from sparse_attn.nn._masks import Masks, check_types, read_masks
from sparse_attn.patterns import Causal, Full, Mask, Pattern, check_pattern

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (Vaswani et al. 2017, section 3.2.2) with a pattern.

    It is a subclass, with torch's constructor, parameters, initialization and `state_dict`, and
    gives torch's numbers, with a pattern those of torch under the same mask. Two things differ:

    - A query without keys gets the bias of the output projection and weights of 0, never NaN.
    - Evaluation takes the path of training: torch's fast paths, its own and those of
      `nn.TransformerEncoderLayer` and `nn.TransformerEncoder`, know of no pattern.

    The pattern applies to the keys given, with their ends aligned to the queries' where the lengths
    differ, as in cross-attention. It is intersected with `attn_mask` and `key_padding_mask`. Keys
    of `add_bias_kv` and `add_zero_attn` come after them and are seen by every query.

    Args:
        embed_dim: Channels of query and output.
        num_heads: Number of heads; divides embed_dim.
        dropout: Dropout of the attention weights in training.
        bias: Whether the projections have biases.
        add_bias_kv: Add a learned key and value.
        add_zero_attn: Add a key and a value of zeros.
        kdim: Channels of key; embed_dim if None.
        vdim: Channels of value; embed_dim if None.
        batch_first: Whether batched input is (batch, length, channels), not (length, batch,
            channels).
        device: Device of the parameters.
        dtype: Data type of the parameters.
        pattern: Who sees whom; a `PerHead` for heads that differ; every pair if None. It is no
            parameter: tensors that it holds (`BlockLayout`) stay on their device.
        context_parallel_group: A process group, or a `DeviceMesh` of one dimension, over whose
            ranks the sequence is sharded (`sparse_attn.distributed.context_parallel_attention`):
            lengths are then those of the rank's shard, the pattern is that of the whole. Neither
            weights nor an attn_mask other than the causal one; gradients of parameters are the
            rank's share.

    Raises:
        ValueError: embed_dim or num_heads is less than 1.
        AssertionError: embed_dim is not a multiple of num_heads.
        TypeError: pattern is no Pattern.
        NotImplementedError: In a call with context_parallel_group, for weights, masks of pairs or
            nested tensors.

    >>> from sparse_attn import Global, MultiheadAttention, Window
    >>> layer = MultiheadAttention(64, 4, batch_first=True, pattern=Window(16) | Global([0]))
    >>> x = torch.randn(2, 100, 64)
    >>> output, weights = layer(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([2, 100, 64]), torch.Size([2, 100, 100]))
    >>> output, _ = layer(x, x, x, need_weights=False)  # memory linear in the length

    Weights move in both directions:

    >>> _ = torch.nn.MultiheadAttention(64, 4).load_state_dict(layer.state_dict())
    """

    _context_parallel: SharedGroup | None = None  # also of modules that became one

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        context_parallel_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._set_pattern(pattern)
        self._context_parallel = own_group(context_parallel_group)

    @property
    def context_parallel_group(self) -> ProcessGroup | DeviceMesh | None:
        """The ranks that the sequence is sharded over."""
        return self._context_parallel.group if self._context_parallel else None

    def _set_pattern(self, pattern: Pattern | None) -> None:
        if pattern is not None:
            check_pattern(pattern)
        self.pattern = pattern
        if _keep_off_fast_path not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_keep_off_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; shapes are for `batch_first=True`, else batch and length change places.

        Args:
            query: (batch, n_q, embed_dim), or (n_q, embed_dim) without a batch. A nested tensor
                (torch.strided) where query, key and value are the same one and no mask is given.
            key: (batch, n_k, kdim) or (n_k, kdim).
            value: (batch, n_k, vdim) or (n_k, vdim).
            key_padding_mask: (batch, n_k) or (n_k). bool: True = ignore this key. Floating: added
                to the logits.
            need_weights: Whether to return the weights, for which all pairs are computed, in memory
                quadratic in the length, whatever the pattern.
            attn_mask: (n_q, n_k) or (batch · num_heads, n_q, n_k). bool: True = ignore this pair.
                Floating: added to the logits, and differentiable.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: attn_mask is the causal mask: a hint that, as in torch, takes its place where
                there is neither need_weights nor key_padding_mask.

        Returns:
            The output, of query's shape, and the weights after dropout: (batch, n_q, n_k), with
            `average_attn_weights=False` (batch, num_heads, n_q, n_k), without the batch where there
            is none, or None. n_k counts the added keys. For nested input the output is nested, and
            the weights are padded with 0.

        Raises:
            AssertionError: A shape, or a dtype of a mask, does not fit, or a nested tensor comes
                with a mask, with another tensor or without batch_first.
            RuntimeError: attn_mask has another shape, or `is_causal` comes without it.
            ValueError: The pattern does not fit the heads or the lengths.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if self._context_parallel:
                raise NotImplementedError(
                    "sparse_attn: expected dense tensors with context_parallel_group, got nested "
                    "ones"
                )
            self._check_nested(query, key, value, key_padding_mask, attn_mask)
            return self._forward_nested(query, need_weights, average_attn_weights, is_causal)
        check_types(key_padding_mask, attn_mask)
        batched = self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("sparse_attn: Need attn_mask if specifying the is_causal hint.")
        q, k, v = (self._split(x, batched) for x in self._project(query, key, value))
        sizes = (q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        pattern = self.pattern
        # Over a shard the mask cannot say what the hint does.
        takes_hint = key_padding_mask is None or self._context_parallel is not None
        hint = is_causal and takes_hint and not need_weights and sizes[2] == sizes[3]
        if hint:
            pattern = Causal() if pattern is None else pattern & Causal()
            attn_mask = None
        if self._context_parallel:
            key_padding_mask = _as_flags(key_padding_mask)
        masks = read_masks(key_padding_mask, attn_mask, *sizes)
        attend = dense_attention if need_weights else _fused_attention
        if self._context_parallel:
            _check_context_parallel(need_weights, masks)
            attend = functools.partial(
                _fused_attention,
                attention=self._context_parallel.attention,
                to_added=self._context_parallel.attention_to_shared_keys,
            )
        dropout_p = self.dropout if self.training else 0.0
        added = self._added_keys(q)
        if added is not None and hint and self.pattern is None:
            added = [x[:, :, :0] for x in added]  # torch's causal products leave them out
        output, weights = attend(q, k, v, pattern, masks, added, dropout_p)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if weights is not None and not batched:
            weights = weights.squeeze(0)
        return self._join(output, batched), weights

    def extra_repr(self) -> str:
        """The pattern, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern}"

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, *masks: Any) -> bool:
        """As torch's checks; returns whether the input has a batch."""
        batched = F._mha_shape_check(query, key, value, *masks, self.num_heads)
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"sparse_attn: was expecting embedding dimension of {self.embed_dim}, but got "
                f"{query.shape[-1]}"
            )
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(
                f"sparse_attn: key shape {key.shape} does not match value shape {value.shape}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"sparse_attn: key's sequence and batch dims {key.shape[:-1]} do not match value's "
                f"{value.shape[:-1]}"
            )
        at = 0 if self.batch_first else 1
        if batched and query.shape[at] != key.shape[at]:
            raise RuntimeError(
                f"sparse_attn: expected key with query's batch of {query.shape[at]}, got "
                f"{key.shape[at]}"
            )
        return batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        if self._qkv_same_embed_dim:
            weight, bias = self.in_proj_weight, self.in_proj_bias
            return F._in_projection_packed(query, key, value, weight, bias)
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = () if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return F._in_projection(query, key, value, *weights, *biases)

    def _split(self, x: Tensor, batched: bool) -> Tensor:
        """To (batch, heads, length, head_dim)."""
        if not batched:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _join(self, x: Tensor, batched: bool) -> Tensor:
        """From (batch, heads, length, head_dim), through the output projection."""
        x = x.transpose(1, 2)
        if not batched:
            x = x.squeeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return self.out_proj(x.flatten(-2))

    def _added_keys(self, query: Tensor) -> list[Tensor] | None:
        """Key and value (batch, heads, added, head_dim) of add_bias_kv and add_zero_attn."""
        shape = (1, self.num_heads, 1, self.head_dim)
        pairs = []
        if self.bias_k is not None:
            pairs.append((self.bias_k.view(shape), self.bias_v.view(shape)))
        if self.add_zero_attn:
            pairs.append((query.new_zeros(shape),) * 2)
        if not pairs:
            return None
        return [
            torch.cat(x, 2).expand(query.shape[0], -1, -1, -1) for x in zip(*pairs, strict=True)
        ]

    def _check_nested(self, query: Tensor, key: Tensor, value: Tensor, *masks: Any) -> None:
        reason = None
        if query is not key or key is not value:
            reason = "query, key and value are not the same Tensor"
        elif query.layout != torch.strided:
            reason = f"its layout is {query.layout}, not torch.strided"
        elif not self.batch_first:
            reason = "batch_first is not True"
        elif any(mask is not None for mask in masks):
            reason = "a mask is given"
        if reason is not None:
            raise AssertionError(
                "sparse_attn: MultiheadAttention does not support NestedTensor input where "
                f"{reason}"
            )

    def _forward_nested(
        self, x: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """By way of the padded tensor."""
        lengths = [example.shape[0] for example in x.unbind()]
        x = x.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=x.device)[:, None]
        padding = torch.arange(x.shape[1], device=x.device) >= ends
        output, weights = self.forward(
            x, x, x, padding, need_weights, None, average_attn_weights, is_causal
        )
        if weights is not None:
            rows = padding[:, :, None] if average_attn_weights else padding[:, None, :, None]
            weights = weights.masked_fill(rows, 0)
        examples = [row[:length] for row, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(examples), weights


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | None,
    masks: Masks,
    added: list[Tensor] | None,
    dropout_p: float,
    attention: Callable[..., tuple[Tensor, Tensor]] = whole_attention,
    to_added: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, None]:
    """As `dense_attention`, without weights, over the pattern's pairs alone."""
    pattern = Full() if pattern is None else pattern
    if masks.excluded is not None:
        pattern = pattern & Mask(~masks.excluded)
    bias = masks.bias
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    options = {"dropout_p": dropout_p, "return_lse": True}
    output, lse = attention(
        query, key, value, pattern, key_padding_mask=masks.padding, bias=bias, **options
    )
    if added is not None and to_added is not None and dropout_p > 0:
        output, _ = merge(output, lse, *to_added(query, *added, dropout_p=dropout_p))
    elif added is not None:
        output, _ = merge(output, lse, *whole_attention(query, *added, Full(), **options))
    return output, None


def _as_flags(padding: Tensor | None) -> Tensor | None:
    """A floating mask of 0 and -inf, into which torch's layers turn theirs, as bool."""
    if padding is None or not padding.is_floating_point():
        return padding
    ignored = padding == -math.inf
    return ignored if bool((ignored | (padding == 0)).all()) else padding


def _check_context_parallel(need_weights: bool, masks: Masks) -> None:
    if need_weights:
        raise NotImplementedError(
            "sparse_attn: expected need_weights=False with context_parallel_group, got True"
        )
    if masks.excluded is not None or masks.bias is not None:
        raise NotImplementedError(
            "sparse_attn: expected no attn_mask with context_parallel_group but the causal one by "
            "is_causal, and a key_padding_mask of dtype bool, got another one: say it by the "
            "pattern"
        )


def _keep_off_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: nn.TransformerEncoderLayer calls modules that have one, and would
    else compute on their parameters itself.
    """
