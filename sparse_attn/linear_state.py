"""The sums that linear attention keeps of a sequence that is decoded step by step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_attn._beams import chosen_sequences
from sparse_attn._library import ops
from sparse_attn.functional._common import check_padding, repeat_heads, without_autocast
from sparse_attn.functional._features import (
    ROW,
    RUNNING,
    FeatureMap,
    Inputs,
    all_products,
    causal_products,
    check_eps,
    elu_plus_one,
    map_features,
    normalise,
    prepare,
    sum_dtype,
)
from sparse_attn.functional.linear import (
    LARGEST_POWER,
    check_kernel,
    check_projection,
    check_scale,
    eps_of_sums,
    relu_features,
)
from sparse_attn.patterns.arguments import index as integer


class LinearState:
    """Sums of keys and values for causal decoding, of constant size whatever the length.

    Each call of `attend` appends tokens and gives their rows: the last ones of the causal
    `linear_attention`, or of the causal `performer_attention` if there is a projection, over the
    whole sequence.

    Args:
        batch_size: Number of sequences.
        num_heads_kv: Heads of key and value.
        head_dim: Size of query and key.
        value_dim: Size of value; head_dim if None.
        feature_map: As in `linear_attention`; not with a projection.
        projection: (m, head_dim) or (heads of the query, m, head_dim), as in `performer_attention`.
        kernel: As in `performer_attention`.
        scale: As in `performer_attention`.
        eps: As in the function; its default if None.
        dtype: Of query, key and value; torch's default if None. Sums of half types are float32.
        device: Of query, key and value.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is out of range, or arguments exclude each other.

    >>> from sparse_attn.functional import linear_attention
    >>> state = LinearState(batch_size=2, num_heads_kv=4, head_dim=32)
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> steps = zip(query.split(1, 2), key.split(1, 2), value.split(1, 2))
    >>> rows = torch.cat([state.attend(*step) for step in steps], 2)
    >>> torch.allclose(rows, linear_attention(query, key, value, is_causal=True), atol=1e-5)
    True
    >>> state.length, state.nbytes == 2 * 4 * 32 * 33 * 4
    (100, True)
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_heads_kv: int,
        head_dim: int,
        value_dim: int | None = None,
        feature_map: FeatureMap | None = None,
        projection: Tensor | None = None,
        kernel: str = "softmax",
        scale: float | None = None,
        eps: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_heads_kv = integer("num_heads_kv", num_heads_kv, 1)
        self.head_dim = integer("head_dim", head_dim, 1)
        self.value_dim = self.head_dim if value_dim is None else integer("value_dim", value_dim, 0)
        self._first_batch_size = integer("batch_size", batch_size, 1)
        like = torch.empty(0, dtype=dtype, device=device)
        if not like.is_floating_point():
            raise TypeError(f"sparse_attn: expected a floating-point dtype, got {dtype}")
        self.dtype, self.device = like.dtype, like.device
        if projection is None:
            self._features = _Mapped(feature_map or elu_plus_one, 1e-6 if eps is None else eps)
            if scale is not None:
                raise ValueError(
                    "sparse_attn: expected scale=None without a projection: linear attention has "
                    f"none, got {scale}"
                )
        else:
            self._features = self._performer(feature_map, projection, kernel, scale, eps)
        self.reset()

    def _performer(
        self,
        feature_map: FeatureMap | None,
        projection: Tensor,
        kernel: str,
        scale: float | None,
        eps: float | None,
    ) -> _Features:
        if feature_map is not None:
            raise ValueError("sparse_attn: expected no feature_map with a projection, got both")
        heads = projection.shape[0] if getattr(projection, "dim", int)() == 3 else self.num_heads_kv
        like = torch.empty(
            0, heads, 0, self.head_dim, dtype=sum_dtype(self.dtype), device=self.device
        )
        if heads % self.num_heads_kv:
            raise ValueError(
                "sparse_attn: expected projection of heads that are a multiple of num_heads_kv, "
                f"{self.num_heads_kv}, got {heads}"
            )
        projection = check_projection(projection, None, like).detach()
        kernel, eps = check_kernel(kernel, eps)
        scale = check_scale(scale, self.head_dim)
        if kernel == "relu":
            return _Mapped(relu_features(projection, scale, eps), 0.0)
        return _Softmax(projection, scale, eps)

    @property
    def length(self) -> int:
        """How many tokens have been appended."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the sums; those of a projection per head, and of a feature map, begin with the
        first call."""
        return sum(x.numel() * x.element_size() for x in self._sums)

    def __repr__(self) -> str:
        return f"LinearState(length={self.length}, nbytes={self.nbytes})"

    def reset(self) -> None:
        """Forget all tokens, and have as many sequences as at first."""
        self.batch_size = self._first_batch_size
        self._length = 0
        self._sums: tuple[Tensor, ...] = ()

    def reorder(self, index: Tensor | Iterable[int]) -> None:
        """Go on with chosen sequences: sequence b becomes what sequence index[b] was.

        Args:
            index: (new batch size,) int64 or int32, in [0, batch_size): sequences may be repeated
                or left out, as beam search does.

        Raises:
            TypeError: index holds no ints.
            ValueError: It is empty or out of range, or has more dimensions.
        """
        chosen = chosen_sequences(index, self.batch_size, self.device)
        self._sums = tuple(x.index_select(0, chosen) for x in self._sums)
        self.batch_size = len(chosen)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Append new tokens, and attend from them to all tokens so far.

        Rows are differentiable with respect to the arguments of this call; what is kept is
        detached. A call that raises appends nothing.

        Args:
            query: (batch, heads, new, head_dim), new ≥ 1; heads a multiple of num_heads_kv.
            key: (batch, num_heads_kv, new, head_dim).
            value: (batch, num_heads_kv, new, value_dim).
            key_padding_mask: (batch, new) bool, True = no query ever sees this new key.

        Returns:
            (batch, heads, new, value_dim).

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape or device does not fit.
        """
        self._check(query, key, value, key_padding_mask)
        inputs = prepare(query, key, value, key_padding_mask, True)
        with without_autocast(query):
            rows, sums = self._features.attend(inputs, key_padding_mask, self._sums)
        # Copies of their own: ordinary tensors, also in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._sums = tuple(x.detach().clone() for x in sums)
        self._length += query.shape[2]
        return rows

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"sparse_attn: expected {name} to be a Tensor, got {type(x).__name__}"
                )
            if x.dtype != self.dtype:
                raise TypeError(
                    f"sparse_attn: expected {name} of dtype {self.dtype}, the state's, got "
                    f"{x.dtype}"
                )
            if x.device != self.device:
                raise ValueError(
                    f"sparse_attn: expected {name} on {self.device}, the state's, got {x.device}"
                )
        heads, new = query.shape[1:3] if query.dim() == 4 else (0, 0)
        if heads == 0 or heads % self.num_heads_kv or new == 0:
            raise ValueError(
                f"sparse_attn: expected query of shape (batch, a multiple of {self.num_heads_kv} "
                f"heads, new tokens, {self.head_dim}), got {tuple(query.shape)}"
            )
        for name, x, own_heads, size in (
            ("query", query, heads, self.head_dim),
            ("key", key, self.num_heads_kv, self.head_dim),
            ("value", value, self.num_heads_kv, self.value_dim),
        ):
            shape = (self.batch_size, own_heads, new, size)
            if x.shape != shape:
                raise ValueError(
                    f"sparse_attn: expected {name} of shape {shape}, got {tuple(x.shape)}"
                )
        if key_padding_mask is not None:
            check_padding(key_padding_mask, key)


class _Features:
    """What is kept of keys and values, as a tuple of tensors with the batch first, empty before
    the first token."""

    def attend(
        self, inputs: Inputs, padding: Tensor | None, sums: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of new tokens, and the sums with them."""
        raise NotImplementedError


class _Mapped(_Features):
    """Σ φ(key)ᵀ value, (batch, heads_kv, m, value_dim + 1)."""

    def __init__(self, feature_map: FeatureMap, eps: float) -> None:
        if not callable(feature_map):
            raise TypeError(
                f"sparse_attn: expected feature_map to be callable, got {feature_map!r}"
            )
        self.feature_map = feature_map
        self.eps = check_eps(eps)

    def attend(
        self, inputs: Inputs, padding: Tensor | None, sums: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        query, key = map_features(self.feature_map, inputs.query, inputs.key, padding)
        rows = causal_products(query, key, inputs.value)
        total = ops.outer_sums(key, inputs.value)
        if sums:
            rows = rows + all_products(query, sums[0])
            total = total + sums[0]
        return normalise(rows, self.eps, inputs.dtype), (total,)


class _Softmax(_Features):
    """Σ exp(w · key' - |key'|² / 2 - r)ᵀ value, the power r that it is relative to, the largest
    w · key' so far (-inf before the first key), and Σ value, for eps; of all heads."""

    def __init__(self, projection: Tensor, scale: float, eps: float) -> None:
        self.projection, self.scale, self.eps = projection, scale, eps

    def attend(
        self, inputs: Inputs, padding: Tensor | None, sums: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads = inputs.query.shape[1]
        key, value = repeat_heads(inputs.key, heads), repeat_heads(inputs.value, heads)
        options = self.scale, self.eps
        query, weight, *_ = ops.positive_features(
            inputs.query, self.projection, None, ROW, *options
        )
        of_key, _, maximum, power, index = ops.positive_features(
            key, self.projection, padding, RUNNING, *options
        )
        unseen = float("-inf")
        power = power.masked_fill(index[:, :, -1] < 0, unseen)
        largest = (maximum + power.unsqueeze(-1)).masked_fill(index < 0, unseen)
        kept, kept_power, kept_largest, kept_values = sums or (
            value.new_zeros(*value.shape[:2], query.shape[-1], value.shape[-1]),
            torch.full_like(power, unseen),
            torch.full_like(power, unseen),
            value.new_zeros(*value.shape[:2], 1, value.shape[-1]),
        )
        largest = torch.maximum(largest, kept_largest.unsqueeze(-1))
        values = kept_values + value.cumsum(2)
        rows = (
            _factor(power, largest) * ops.causal_products(query, of_key, value)
            + _factor(kept_power, largest) * ops.sum_products(query, kept)
            + values * (weight * eps_of_sums(self.eps, self.projection)).unsqueeze(-1)
        )
        joint = torch.maximum(power, kept_power)
        total = _factor(power, joint.unsqueeze(-1)) * ops.outer_sums(of_key, value)
        total = total + _factor(kept_power, joint.unsqueeze(-1)) * kept
        return normalise(rows, 0.0, inputs.dtype), (
            total,
            joint,
            largest[:, :, -1],
            values[:, :, -1:],
        )


def _factor(power: Tensor, reference: Tensor) -> Tensor:
    """exp(power - reference) of (batch, heads) and (batch, heads, rows), for rows; 0 if both are
    -inf."""
    reference = reference.masked_fill(reference == float("-inf"), 0)
    return (power.unsqueeze(-1) - reference).clamp(max=LARGEST_POWER).exp().unsqueeze(-1)
