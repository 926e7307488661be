"""Reading the samples that patterns are fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_attn.analysis._exact import Exact, make_problem, reference_of
from sparse_attn.functional._common import check_inputs

_TENSORS = ("query", "key", "value", "grad_output")
_NAMES = (*_TENSORS, "key_padding_mask", "query_padding_mask", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Sample:
    """One call of attention, and the gradient that reached its output if it was asked for."""

    exact: Exact
    grad_output: Tensor | None = None


def read_samples(
    samples: Iterable[object],
    is_causal: bool | None,
    scale: float | None,
    enable_gqa: bool,
    gradients: bool = False,
) -> Iterator[Sample]:
    """The samples with a query and a key, one by one."""
    if isinstance(samples, (Tensor, Mapping)) or not isinstance(samples, Iterable):
        raise TypeError(
            "sparse_attn: expected samples to be an iterable of (query, key) or dicts, got "
            f"{type(samples).__name__}"
        )
    number = 0
    for given in samples:
        fields = _named(given)
        if fields["query"].numel() and fields["key"].numel():
            number += 1
            yield _sample(fields, is_causal, scale, enable_gqa, gradients)
    if number == 0:
        raise ValueError("sparse_attn: expected samples with a query and a key, got none")


def _named(given: object) -> dict[str, Any]:
    """The tensors and options of a sample by name."""
    if isinstance(given, Mapping):
        fields = dict(given)
    elif isinstance(given, Sequence) and 2 <= len(given) <= len(_TENSORS):
        fields = dict(zip(_TENSORS, given, strict=False))
    else:
        raise TypeError(
            "sparse_attn: expected a sample to be (query, key), with value and grad_output or "
            f"not, or a dict, got {type(given).__name__}"
        )
    if unknown := [name for name in fields if name not in _NAMES]:
        raise ValueError(
            f"sparse_attn: expected a sample with {', '.join(_NAMES)}, got {unknown[0]}"
        )
    for name in ("query", "key"):
        if not isinstance(fields.get(name), Tensor):
            got = type(fields.get(name)).__name__
            raise TypeError(f"sparse_attn: expected {name} of a sample to be a Tensor, got {got}")
    return fields


def _sample(
    fields: dict[str, Any],
    is_causal: bool | None,
    scale: float | None,
    enable_gqa: bool,
    gradients: bool,
) -> Sample:
    query, key, value = (fields.get(name) for name in _TENSORS[:3])
    enable_gqa = enable_gqa or fields.get("enable_gqa", False)
    if value is not None:
        check_inputs(query, key, value, enable_gqa=enable_gqa)
    grad_output = _gradient(query, value, fields.get("grad_output")) if gradients else None
    if not gradients or value is None:
        value = key[..., :0]  # weights need none
    problem = make_problem(
        query,
        key,
        value,
        key_padding_mask=fields.get("key_padding_mask"),
        query_padding_mask=fields.get("query_padding_mask"),
        scale=fields.get("scale") if scale is None else scale,
        enable_gqa=enable_gqa,
    )
    told = fields.get("is_causal")
    if told is not None and is_causal is not None and told != is_causal:
        raise ValueError(
            f"sparse_attn: expected samples with is_causal={is_causal}, got one with {told}"
        )
    exact = Exact.of(problem, reference_of(told if is_causal is None else is_causal, None))
    if grad_output is not None:
        grad_output = grad_output.detach().to(problem.query.dtype)
        grad_output = grad_output.masked_fill(~exact.counted[..., None], 0)
    return Sample(exact, grad_output)


def _gradient(query: Tensor, value: Tensor | None, grad_output: object) -> Tensor:
    """grad_output, if it fits query and value."""
    for name, tensor in (("value", value), ("grad_output", grad_output)):
        if tensor is None:
            raise ValueError(f"sparse_attn: expected samples with {name}, got one without")
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
            raise TypeError(f"sparse_attn: expected {name} of a sample to be a Tensor, got {got}")
    expected = (*query.shape[:3], value.shape[3])
    if tuple(grad_output.shape) != expected or grad_output.device != query.device:
        raise ValueError(
            f"sparse_attn: expected grad_output of shape {expected} on {query.device}, got "
            f"{tuple(grad_output.shape)} on {grad_output.device}"
        )
    return grad_output
