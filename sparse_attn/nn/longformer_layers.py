"""Longformer's encoder layer, and a stack of them (Beltagy et al. 2020, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_attn.functional._common import check_flag
from sparse_attn.nn._checks import check_dropout, check_number
from sparse_attn.nn.longformer import LongformerSelfAttention
from sparse_attn.patterns.arguments import index


class LongformerLayer(nn.Module):
    """Longformer's attention, its output projection and a feed-forward layer, each with dropout, a
    residual connection and a norm after it, as in BERT.

    Names of parameters and numbers are those of Hugging Face's `LongformerLayer`, whose
    `state_dict` it loads.

    Args:
        embed_dim: Size of the hidden states.
        num_heads: Number of heads; divides embed_dim.
        attention_window: Total size of the window, as in `LongformerSelfAttention`.
        feedforward_dim: Size between the two matrices of the feed-forward layer; 4 · embed_dim if
            None.
        dilation: Distance between neighboring keys of the window; one int, or one for each head.
        dropout: Dropout after the attention and after the feed-forward layer, in training.
        attention_dropout: Dropout of the attention probabilities, in training; dropout if None.
        activation: Between the two matrices: a function, "gelu" or "relu".
        layer_norm_eps: Added to the variance in the norms.
        causal: Keep only the left half of the window; global attention is causal too.
        recompute: In training, keep only the layer's input for the backward pass and compute the
            rest again.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: An argument is out of range, or embed_dim is not a multiple of num_heads.

    >>> layer = LongformerLayer(64, 4, attention_window=32, dilation=2, dropout=0.1)
    >>> (output,) = layer(torch.randn(2, 100, 64))
    >>> output.shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention_window: int,
        feedforward_dim: int | None = None,
        *,
        dilation: int | Iterable[int] = 1,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        activation: Callable[[Tensor], Tensor] | str = F.gelu,
        layer_norm_eps: float = 1e-12,
        causal: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        check_number("layer_norm_eps", layer_norm_eps, 0)
        check_flag("recompute", recompute)
        made = {"device": device, "dtype": dtype}
        attention = LongformerSelfAttention(
            embed_dim,
            num_heads,
            attention_window,
            dilation,
            dropout if attention_dropout is None else attention_dropout,
            causal,
            **made,
        )
        hidden = 4 * embed_dim
        if feedforward_dim is not None:
            hidden = index("feedforward_dim", feedforward_dim, 1)
        self.attention = nn.ModuleDict(
            {
                "self": attention,
                "output": _Residual(embed_dim, embed_dim, dropout, layer_norm_eps, made),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(embed_dim, hidden, **made)})
        self.output = _Residual(hidden, embed_dim, dropout, layer_norm_eps, made)
        self.activation = _function(activation)
        self.recompute = recompute

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Attend and transform.

        Args:
            hidden_states: (batch, length, embed_dim).
            attention_mask: (batch, length), 1 = token, 0 = padding.
            global_attention_mask: (batch, length), 1 = global.
            output_attentions: Also return the attention probabilities.

        Returns:
            As `LongformerSelfAttention`, with the layer's output in place of the attention's.

        Raises:
            ValueError: A shape does not fit.
        """
        given = hidden_states, attention_mask, global_attention_mask, output_attentions
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._transform, *given, use_reentrant=False)
        return self._transform(*given)

    def extra_repr(self) -> str:
        """What the parts do not show, in `print(module)`."""
        return f"recompute={self.recompute}"

    def _transform(self, hidden_states, attention_mask, global_attention_mask, output_attentions):
        attended, *attentions = self.attention["self"](
            hidden_states, attention_mask, global_attention_mask, output_attentions
        )
        attended = self.attention["output"](attended, hidden_states)
        hidden = self.activation(self.intermediate["dense"](attended))
        return (self.output(hidden, attended), *attentions)


class LongformerEncoderOutput(NamedTuple):
    """What `LongformerEncoder` returns; what was not asked for is None.

    Attributes:
        last_hidden_state: (batch, length, embed_dim).
        hidden_states: The input, and the output of each layer.
        attentions: Of each layer, as `LongformerSelfAttention` returns them.
        global_attentions: Of each layer.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


class LongformerEncoder(nn.Module):
    """A stack of `LongformerLayer`s, whose windows and dilations may differ.

    Small windows below and large ones above, and dilation of a few heads in the upper layers, are
    what the paper found best (section 4.1). It loads the `state_dict` of Hugging Face's
    `LongformerEncoder`.

    Args:
        num_layers: Number of layers.
        embed_dim: Size of the hidden states.
        num_heads: Number of heads; divides embed_dim.
        attention_window: Total size of the window, or one for each layer.
        feedforward_dim: As in `LongformerLayer`.
        dilation: As in `LongformerLayer`, or a sequence with that for each layer: one int, or one
            for each head.
        **options: The others of `LongformerLayer`.

    Raises:
        ValueError: An argument is out of range, or there are not as many windows or dilations as
            layers.

    >>> encoder = LongformerEncoder(
    ...     2, 64, 4, attention_window=[16, 32], dilation=[1, (1, 1, 2, 4)], causal=True)
    >>> encoder(torch.randn(2, 100, 64)).last_hidden_state.shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        attention_window: int | Sequence[int],
        feedforward_dim: int | None = None,
        *,
        dilation: int | Sequence[int | Sequence[int]] = 1,
        **options,
    ) -> None:
        super().__init__()
        num_layers = index("num_layers", num_layers, 1)
        windows = _of_layers("attention_window", attention_window, num_layers)
        dilations = _of_layers("dilation", dilation, num_layers)
        self.layer = nn.ModuleList(
            LongformerLayer(
                embed_dim, num_heads, window, feedforward_dim, dilation=steps, **options
            )
            for window, steps in zip(windows, dilations, strict=True)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerEncoderOutput:
        """Go through all layers.

        Args:
            hidden_states: (batch, length, embed_dim).
            attention_mask: (batch, length), 1 = token, 0 = padding.
            global_attention_mask: (batch, length), 1 = global.
            output_attentions: Also return the attention probabilities of each layer.
            output_hidden_states: Also return the input and the output of each layer.

        Returns:
            A `LongformerEncoderOutput`.

        Raises:
            ValueError: A shape does not fit.
        """
        states, attentions = [hidden_states], []
        for layer in self.layer:
            output, *of_layer = layer(
                states[-1], attention_mask, global_attention_mask, output_attentions
            )
            states = [*states, output] if output_hidden_states else [output]
            attentions.append(of_layer)
        local, of_global = zip(*attentions, strict=True) if output_attentions else (None, None)
        return LongformerEncoderOutput(
            states[-1], tuple(states) if output_hidden_states else None, local, of_global
        )


class _Residual(nn.Module):
    """norm(x + dropout(projection(hidden)))."""

    def __init__(self, hidden_dim: int, embed_dim: int, dropout: float, eps: float, made: dict):
        super().__init__()
        self.dense = nn.Linear(hidden_dim, embed_dim, **made)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(hidden)))


def _function(activation: Callable[[Tensor], Tensor] | str) -> Callable[[Tensor], Tensor]:
    named = {"gelu": F.gelu, "relu": F.relu}
    found = named.get(activation) if isinstance(activation, str) else activation
    if not callable(found):
        raise ValueError(
            'sparse_attn: expected activation to be a function, "gelu" or "relu", got '
            f"{activation!r}"
        )
    return found


def _of_layers(name: str, given, num_layers: int) -> list:
    if not isinstance(given, Iterable):
        return [given] * num_layers
    given = list(given)
    if len(given) != num_layers:
        raise ValueError(
            f"sparse_attn: expected {name} to be one for all or one for each of the {num_layers} "
            f"layers, got {given}"
        )
    return given
