"""Self-attention layers of linear cost: linear attention and Performer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn._uncompiled import uncompiled
from sparse_attn.functional._features import FeatureMap, check_eps, default_num_features
from sparse_attn.functional.linear import (
    check_kernel,
    linear_attention,
    orthogonal_features,
    performer_attention,
)
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns.arguments import index as integer
from sparse_attn.patterns.arguments import seed as check_seed
from sparse_attn.patterns.arguments import wrap_seed


class LinearSelfAttention(ProjectedSelfAttention):
    """Self-attention by `linear_attention` (Katharopoulos et al. 2020).

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        feature_map: φ, row by row; elu(x) + 1 if None. A module becomes a submodule.
        eps: Added to the normaliser.
        dropout: In training, of what the heads give: there are no probabilities to drop.
        bias: Whether the projections have biases.
        causal: Whether a token sees only itself and what stands before it.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    >>> import torch
    >>> layer = LinearSelfAttention(64, 4, causal=True)
    >>> layer(torch.randn(2, 1000, 64)).shape
    torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        feature_map: FeatureMap | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        if feature_map is not None and not callable(feature_map):
            raise TypeError(
                f"sparse_attn: expected feature_map to be callable, got {feature_map!r}"
            )
        self.feature_map = feature_map
        self.eps = check_eps(eps)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        heads = linear_attention(
            query,
            key,
            value,
            feature_map=self.feature_map,
            eps=self.eps,
            key_padding_mask=key_padding_mask,
            is_causal=self.causal,
        )
        return F.dropout(heads, self.dropout_p)


class PerformerSelfAttention(ProjectedSelfAttention):
    """Self-attention by `performer_attention` (Choromanski et al. 2021).

    The projection, the same for all heads, is a buffer. With `redraw_interval` it is drawn anew
    after as many calls in training (section 4.2 of the paper), from the seed and the number of
    calls, which the state_dict holds: processes that train together, and a training that goes on,
    draw the same. Under torch.compile that counting breaks the graph in training.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        num_features: Random features of a head; int(head_dim ln head_dim) if None.
        kernel: "softmax" or "relu", see `performer_attention`.
        redraw_interval: Calls in training after which the projection is drawn anew; never if None.
        seed: Of the projections.
        eps: Added to features; that of `performer_attention` if None.
        dropout: In training, of what the heads give: there are no probabilities to drop.
        bias: Whether the projections of query, key, value and output have biases.
        causal: Whether a token sees only itself and what stands before it.
        device: Device of parameters and buffers.
        dtype: Data type of the parameters. The projection is at least float32.

    >>> import torch
    >>> layer = PerformerSelfAttention(64, 4, num_features=128, redraw_interval=1000)
    >>> layer(torch.randn(2, 1000, 64)).shape
    torch.Size([2, 1000, 64])
    """

    projection: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_features: int | None = None,
        kernel: str = "softmax",
        redraw_interval: int | None = None,
        seed: int = 0,
        eps: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        self.kernel, self.eps = check_kernel(kernel, eps)
        count = (
            default_num_features(embed_dim // num_heads) if num_features is None else num_features
        )
        self.num_features = integer("num_features", count, 1)
        self.redraw_interval = (
            None if redraw_interval is None else integer("redraw_interval", redraw_interval, 1)
        )
        self.seed = check_seed(seed)
        self.calls = 0
        wide = torch.promote_types(self.query.weight.dtype, torch.float32)
        self.register_buffer("projection", self._draw(0).to(self.query.weight.device, wide))

    def redraw(self) -> None:
        """Draw the projection of the next interval now."""
        interval = self.redraw_interval or 1
        self.calls = (self.calls // interval + 1) * interval
        self._replace_projection()

    def fix_projection(self) -> None:
        """Keep the projection from now on."""
        self.redraw_interval = None

    def get_extra_state(self) -> Tensor:
        """The number of calls in training, for the state_dict."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a state_dict."""
        self.calls = int(state)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        if self.training and self.redraw_interval is not None:
            self._count()
        heads = performer_attention(
            query,
            key,
            value,
            projection=self.projection,
            kernel=self.kernel,
            eps=self.eps,
            key_padding_mask=key_padding_mask,
            is_causal=self.causal,
        )
        return F.dropout(heads, self.dropout_p)

    @uncompiled
    def _count(self) -> None:
        if self.calls and self.calls % self.redraw_interval == 0:
            self._replace_projection()
        self.calls += 1

    def _replace_projection(self) -> None:
        """Another tensor: the graph of a call before may still need the old one."""
        number = self.calls // (self.redraw_interval or 1)
        self.projection = self._draw(number).to(self.projection)

    def _draw(self, number: int) -> Tensor:
        seed = wrap_seed(self.seed + number * _STRIDE)
        head_dim = self.embed_dim // self.num_heads
        return orthogonal_features(
            self.num_features, head_dim, seed=seed, dtype=torch.float64, device="cpu"
        )


#: Between the seeds of draws: 2⁶⁴ / golden ratio, so that draws of nearby seeds do not coincide.
_STRIDE = 0x9E3779B97F4A7C15
