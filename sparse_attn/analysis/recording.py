"""Recording the calls of attention in a model, as samples that patterns are fitted to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparse_attn._library import ops

Samples = dict[str, list[dict[str, Any]]]

# What changes the weights in ways that samples do not hold.
_UNKNOWN = ("bias", "gate", "softcap", "sink")


@contextlib.contextmanager
def record_attention(model: nn.Module | None = None) -> Iterator[Samples]:
    """Record query, key, value and the gradient of the output of every call of attention.

    It sees the calls of `sparse_attn.attention` and of torch's `scaled_dot_product_attention`, so
    any layer of this package, `nn.MultiheadAttention` (with `need_weights=False`) and models of
    transformers with the attention "sdpa" or "sparse_attn" are recorded as they are; patterns
    of the calls are not. Everything is kept on its device until the dict is dropped.

    Args:
        model: Samples are sorted by the names of its submodules, the innermost one that made the
            call. If None, all have the name "".

    Yields:
        A dict that fills during the `with`: names to lists of samples, one for each call, as
        `fit_pattern` and `gradient_pattern` take them: dicts with `query`, `key`, `value`,
        `scale`, `is_causal`, `enable_gqa`, `key_padding_mask` if there is one, and after a
        backward pass (in the `with` or later) `grad_output`, summed if there are several.

    Raises:
        TypeError: model is no nn.Module.
        NotImplementedError: A call has what samples do not hold: a bias, gate, soft cap, sink, or a
            mask that is not of keys alone or causal.

    >>> layer = SparseSelfAttention(16, 2, pattern=Full())
    >>> with record_attention(layer) as samples:
    ...     for _ in range(4):
    ...         layer(torch.randn(2, 32, 16)).square().mean().backward()
    >>> pattern = gradient_pattern(samples[""], block=4, density=0.5)
    >>> SparseSelfAttention(16, 2, pattern=pattern)(torch.randn(2, 32, 16)).shape
    torch.Size([2, 32, 16])
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"sparse_attn: expected model to be an nn.Module, got {type(model).__name__}"
        )
    inside: list[str] = []
    hooks = []
    for name, module in model.named_modules() if model is not None else ():
        hooks.append(module.register_forward_pre_hook(partial(_enter, inside, name)))
        hooks.append(module.register_forward_hook(partial(_leave, inside), always_call=True))
    samples: Samples = {}
    try:
        with _Recorder(samples, inside):
            yield samples
    finally:
        for hook in hooks:
            hook.remove()


def _enter(inside: list[str], name: str, module: nn.Module, inputs: tuple) -> None:
    inside.append(name)


def _leave(inside: list[str], module: nn.Module, inputs: tuple, output: object) -> None:
    inside.pop()


class _Recorder(TorchFunctionMode):
    """Looks at every call of torch and keeps those of attention."""

    def __init__(self, samples: Samples, inside: Sequence[str]) -> None:
        super().__init__()
        self.samples, self.inside = samples, inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.multi_head_attention_forward:
            # What it calls passes this mode by.
            own = partial(self._recorded, functional.scaled_dot_product_attention)
            with mock.patch.object(functional, "scaled_dot_product_attention", own):
                return func(*args, **(kwargs or {}))
        return self._recorded(func, *args, **(kwargs or {}))

    def _recorded(self, func, *args, **kwargs):
        output = func(*args, **kwargs)
        if func in _READERS:
            sample = _READERS[func](*args, **kwargs)
            name = self.inside[-1] if self.inside else ""
            self.samples.setdefault(name, []).append(sample)
            result = output if isinstance(output, Tensor) else output[0]
            if result.requires_grad:
                result.register_hook(partial(_keep_gradient, sample))
        return output


def _keep_gradient(sample: dict[str, Any], gradient: Tensor) -> None:
    known = sample.get("grad_output")
    gradient = gradient.detach()
    sample["grad_output"] = gradient.clone() if known is None else known + gradient


def _read_ours(query, key, value, pattern, pattern_tensors=None, **options) -> dict[str, Any]:
    """A call of the op `attention`."""
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise NotImplementedError(
                f"sparse_attn: expected calls of attention without {name} to record, got one"
            )
    return _sample(
        query,
        key,
        value,
        options.get("key_padding_mask"),
        ops._pattern_causal(pattern),
        options.get("scale"),
    )


def _read_torch(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
) -> dict[str, Any]:
    """A call of torch's scaled_dot_product_attention."""
    n_q, n_k = query.shape[-2], key.shape[-2]
    if query.dim() != 4 or (is_causal and n_q != n_k):
        raise NotImplementedError(
            "sparse_attn: expected calls with 4 dimensions, if causal with as many queries as keys,"
            f" to record, got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    padding = None
    if attn_mask is not None:
        padding, is_causal = _read_mask(attn_mask, query.shape[0], n_q, n_k)
    return _sample(query, key, value, padding, is_causal, scale)


def _read_mask(mask: Tensor, batch: int, n_q: int, n_k: int) -> tuple[Tensor, bool]:
    """The padding that a mask of pairs means, and whether it is causal besides."""
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    plain = mask.dtype == torch.bool or not mask.masked_fill(hidden, 0).any()
    hidden = hidden.broadcast_to(torch.broadcast_shapes(hidden.shape, (batch, 1, n_q, n_k)))
    padding = hidden.flatten(1, 2).all(1)
    of_keys = padding[:, None, None].expand_as(hidden)
    future = torch.ones(n_q, n_k, dtype=torch.bool, device=mask.device).triu(1 + n_k - n_q)
    for is_causal, expected in ((False, of_keys), (True, of_keys | future)):
        if plain and torch.equal(hidden, expected):
            return padding, is_causal
    raise NotImplementedError(
        "sparse_attn: expected calls whose mask hides keys from all queries alike, and later keys, "
        f"to record, got another attn_mask of shape {tuple(mask.shape)}"
    )


def _sample(query, key, value, padding, is_causal, scale) -> dict[str, Any]:
    sample = {
        "query": query.detach(),
        "key": key.detach(),
        "value": value.detach(),
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if padding is not None:
        sample["key_padding_mask"] = padding
    return sample


_READERS = {
    ops.attention: _read_ours,
    functional.scaled_dot_product_attention: _read_torch,
}
