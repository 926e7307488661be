"""What the functions of this folder share: the checks of their inputs and options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_attn.patterns import Causal, Full, Pattern

# Options of `attention` that leave the logits alone: functions that choose keys by them pass these.
_OPTIONS = ("dropout_p", "dropout_seed", "enable_gqa", "return_lse", "return_weights", "sink")


def visible(is_causal: bool) -> Pattern:
    """The pattern of what a query may see before its content decides."""
    check_flag("is_causal", is_causal)
    return Causal() if is_causal else Full()


def check_options(
    function: str, options: dict[str, Any], known: tuple[str, ...] = _OPTIONS
) -> None:
    """Raise TypeError, as Python does, for options that a function does not pass to `attention`."""
    for name in options:
        if name not in known:
            raise TypeError(
                f"sparse_attn: expected the options of {function} to be among "
                f"{', '.join(known)}, got {name}"
            )


def in_autocast_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast, cast the tensors as the ops do (float64 stays), and run without it.

    What is computed in a wider type on purpose stays wide.
    """

    @functools.wraps(function)
    def cast_and_run(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        kind = tensors[0].device.type if tensors else "cpu"
        if not autocast_is_on(kind):
            return function(*args, **kwargs)
        cast = functools.partial(as_autocast, dtype=torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

    return cast_and_run


def as_autocast(x: Any, dtype: torch.dtype) -> Any:
    """What the ops make of an argument under autocast: float64 stays, and what is no Tensor."""
    narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if narrow else x


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a type of device; torch does not answer for "meta"."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """What is computed in a wider type on purpose stays wide."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()


def scale_of(scale: float | None, head_dim: int) -> float:
    """The factor of the products: 1 / √head_dim if None."""
    if scale is None:
        return 1 / math.sqrt(max(head_dim, 1))
    if isinstance(scale, Tensor) or not hasattr(scale, "__float__"):
        raise TypeError(f"sparse_attn: expected scale to be a number, got {scale!r}")
    if isinstance(scale, int):
        check_int("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"sparse_attn: expected scale to be finite, got {scale}")
    return float(scale)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    enable_gqa: bool = False,
) -> None:
    """Raise TypeError or ValueError unless the tensors fit each other as in `attention`."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"sparse_attn: expected {name} to be a Tensor, got {type(tensor).__name__}"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"sparse_attn: expected {name} of shape (batch, heads, length, size), got "
                f"{tuple(tensor.shape)}"
            )
        # Under autocast the ops cast what they get.
        alike = tensor.dtype == query.dtype or autocast_is_on(query.device.type)
        if not tensor.is_floating_point() or not alike:
            wanted = "a floating-point dtype" if name == "query" else f"dtype {query.dtype}"
            raise TypeError(f"sparse_attn: expected {name} of {wanted}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"sparse_attn: expected {name} to be a dense Tensor, got {tensor.layout}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"sparse_attn: expected {name} on device {query.device}, got {tensor.device}"
            )
    batch, heads, _, size = query.shape
    heads_kv = key.shape[1] if enable_gqa else heads
    if enable_gqa and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(
            f"sparse_attn: expected key with heads that divide query's {heads}, got {heads_kv}"
        )
    if size == 0:
        raise ValueError("sparse_attn: expected query with a size of at least 1, got 0")
    _check_shape("key", key, (batch, heads_kv, key.shape[2], size))
    _check_shape("value", value, (batch, heads_kv, key.shape[2], value.shape[3]))
    if key_padding_mask is not None:
        check_padding(key_padding_mask, key)


def check_int(name: str, number: int) -> None:
    """Raise TypeError or ValueError unless an int in the place of a number is one that floats
    reach.
    """
    if isinstance(number, bool):
        raise TypeError(f"sparse_attn: expected {name} to be a number, got {number}")
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"sparse_attn: expected {name} to be finite, got {number}") from None


def check_numbers(**arguments: object) -> None:
    """Raise TypeError or ValueError unless the arguments are numbers, symbolic ones or None."""
    for name, argument in arguments.items():
        if argument is None or isinstance(argument, float):
            continue
        if isinstance(argument, int):
            check_int(name, argument)
            continue
        if isinstance(argument, Tensor) and (argument.requires_grad or argument.dim() > 0):
            raise TypeError(
                f"sparse_attn: expected {name} to be a number, which no gradient reaches, got a "
                f"Tensor of shape {tuple(argument.shape)}; multiply query by what is learned"
            )
        # A module's float may be symbolic under torch.compile.
        symbolic = isinstance(argument, (torch.SymFloat, torch.SymInt))
        if not symbolic and not hasattr(argument, "__float__"):
            raise TypeError(f"sparse_attn: expected {name} to be a number, got {argument!r}")


def check_flag(name: str, flag: object) -> None:
    """Raise TypeError unless flag is a bool."""
    if not isinstance(flag, bool):
        raise TypeError(f"sparse_attn: expected {name} to be True or False, got {flag!r}")


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless a floating tensor can have this data type, or that is left open."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"sparse_attn: expected dtype to be a floating-point dtype, got {dtype!r}")


def check_padding(mask: object, x: Tensor, name: str = "key_padding_mask") -> None:
    """Raise TypeError or ValueError unless the mask is (batch, length of x) bool, on its device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"sparse_attn: expected {name} to be a bool Tensor, got {what}")
    _check_shape(name, mask, (x.shape[0], x.shape[2]))
    if mask.device != x.device:
        raise ValueError(f"sparse_attn: expected {name} on device {x.device}, got {mask.device}")


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """(batch, heads, length, size) with 0 for padded rows, whatever they hold."""
    return x if padding is None else x.masked_fill(padding[:, None, :, None], 0)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, heads_kv, …) to (batch, heads, …): heads of keys that several query heads share, once
    for each; no copy where there is nothing to repeat."""
    times = heads // max(x.shape[1], 1)
    return x if times == 1 else x.repeat_interleave(times, 1)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"sparse_attn: expected {name} of shape {shape}, got {tuple(tensor.shape)}"
        )
