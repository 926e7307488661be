"""The definition that the tests hold the library to: NumPy masks and dense attention.

Nothing here asks the library. A pattern is written once, as an expression such as
`Window(4, 0) | Global([0])`, and read twice: with the names of `sparse_attn`, and with the names of
this module (`cases.library` and `cases.definition`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Rule:
    """Who sees whom: `allows(i, j, n_k)` for positions i and keys j of one head."""

    allows: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    causal: bool = False

    def __or__(self, other: Rule) -> Rule:
        return Rule(
            lambda i, j, n: self.allows(i, j, n) | other.allows(i, j, n),
            self.causal and other.causal,
        )

    def __and__(self, other: Rule) -> Rule:
        return Rule(
            lambda i, j, n: self.allows(i, j, n) & other.allows(i, j, n),
            self.causal or other.causal,
        )

    def mask(self, n_q: int, n_k: int | None = None, heads: int = 1) -> np.ndarray:
        """The (heads, n_q, n_k) mask; query i stands at position i + n_k - n_q."""
        n_k = n_q if n_k is None else n_k
        position = np.arange(n_q)[:, None] + (n_k - n_q)
        allowed = self.allows(position, np.arange(n_k)[None, :], n_k)
        return np.broadcast_to(allowed, (heads, n_q, n_k))


@dataclass(frozen=True)
class HeadRules:
    """One rule per head, or per equal group of heads."""

    rules: Sequence[Rule]

    @property
    def causal(self) -> bool:
        return all(rule.causal for rule in self.rules)

    def mask(self, n_q: int, n_k: int | None = None, heads: int | None = None) -> np.ndarray:
        heads = len(self.rules) if heads is None else heads
        masks = [rule.mask(n_q, n_k, heads // len(self.rules)) for rule in self.rules]
        return np.concatenate(masks)


def _among(position: np.ndarray, tokens: Sequence[int], n_k: int) -> np.ndarray:
    return np.isin(position, [token + n_k if token < 0 else token for token in tokens])


def Window(left: float, right: float | None = None, dilation: int = 1) -> Rule:
    right = left if right is None else right

    def allows(i: np.ndarray, j: np.ndarray, n_k: int) -> np.ndarray:
        step, rest = (j - i) // dilation, (j - i) % dilation
        return (rest == 0) & (-left <= step) & (step <= right)

    return Rule(allows, causal=right == 0)


def GlobalKeys(tokens: Sequence[int]) -> Rule:
    return Rule(lambda i, j, n: _among(j, tokens, n) & np.full_like(i, True, dtype=bool))


def GlobalQueries(tokens: Sequence[int]) -> Rule:
    return Rule(lambda i, j, n: _among(i, tokens, n) & np.full_like(j, True, dtype=bool))


def Global(tokens: Sequence[int]) -> Rule:
    return GlobalKeys(tokens) | GlobalQueries(tokens)


def Full() -> Rule:
    return Rule(lambda i, j, n: np.full(np.broadcast_shapes(i.shape, j.shape), True))


def Causal() -> Rule:
    return Rule(lambda i, j, n: j <= i, causal=True)


def PerHead(rules: Sequence[Rule]) -> HeadRules:
    return HeadRules(tuple(rules))


def allowed_pairs(
    rule: Rule | HeadRules,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
) -> Tensor:
    """The (B or 1, Hq, Nq, Nk) mask of one call: pattern, global tokens, then padding."""
    heads, n_q, n_k = query.shape[1], query.shape[2], key.shape[2]
    allowed = torch.from_numpy(rule.mask(n_q, n_k, heads).copy())[None]
    if global_mask is not None:
        position = torch.arange(n_q) + n_k - n_q
        rows = global_mask[:, position.clamp(min=0)] & (position >= 0)
        allowed = allowed | global_mask[:, None, None, :] | rows[:, None, :, None]
        if rule.causal:
            allowed = allowed & (torch.arange(n_k) <= position[:, None])
    if key_padding_mask is not None:
        allowed = allowed & ~key_padding_mask[:, None, None, :]
    return allowed


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, composed of torch ops in the inputs' own dtype, differentiable.

    A query without keys gives output 0, log-sum-exp -inf and gradient 0. Heads of key and value
    are repeated as often as the query has heads for them.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (scale * query @ key.mT).masked_fill(~allowed, -math.inf)
    empty = ~allowed.any(-1, keepdim=True).expand(*logits.shape[:-1], 1)
    largest = logits.detach().amax(-1, keepdim=True).masked_fill(empty, 0)
    weights = torch.exp(logits - largest)
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    output = weights @ value / total
    logsumexp = (largest + total.log()).masked_fill(empty, -math.inf)
    return output, logsumexp.squeeze(-1)


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` in the same dtype, and the log-sum-exp of `torch_dense`."""
    empty = ~allowed.any(-1, keepdim=True)
    gqa = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=allowed | empty, scale=scale, enable_gqa=gqa
    ).masked_fill(empty, 0)
    return output, torch_dense(query, key, value, allowed, scale)[1]


def torch_dense(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`dense_attention` in the same dtype; half types in float32 inside, as torch's kernels do."""
    wide = torch.promote_types(query.dtype, torch.float32)
    output, logsumexp = dense_attention(*(x.to(wide) for x in (query, key, value)), allowed, scale)
    return output.to(query.dtype), logsumexp


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    cotangents: tuple[Tensor, Tensor | None],
) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradients of query, key and value, by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output, logsumexp = function(*leaves)
    loss = (output.double() * cotangents[0].double()).sum()
    if cotangents[1] is not None:
        finite = torch.where(logsumexp.isinf(), 0, logsumexp)
        loss = loss + (finite.double() * cotangents[1].double()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    names = ("grad_query", "grad_key", "grad_value")
    results = {"output": output, "logsumexp": logsumexp, **dict(zip(names, gradients, strict=True))}
    return {name: result.detach() for name, result in results.items()}


# The error, in eps of the largest magnitude, that is allowed where torch happens to have none: half
# types round the result alone, float32 also sums in another order, and the float64 reference rounds
# as much as what is held against it (about 10 eps measured in both).
FLOOR = {torch.float64: 32, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def assert_within_budget(name: str, ours: Tensor, torchs: Sequence[Tensor], exact: Tensor) -> None:
    """Our error is at most twice that of torch in the same dtype, both against float64."""
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    assert ours.dtype == torchs[0].dtype, f"{name}: {ours.dtype}, expected {torchs[0].dtype}"
    infinite = exact.isinf()
    assert torch.equal(ours.isinf(), infinite), f"{name}: infinities in other places"
    assert not ours.isnan().any(), f"{name}: NaN"
    if exact.numel() == 0:
        return

    def error(tensor: Tensor) -> float:
        return (tensor.double() - exact).masked_fill(infinite, 0).abs().max().item()

    magnitude = exact.masked_fill(infinite, 0).abs().max().item()
    floor = FLOOR[ours.dtype] * torch.finfo(ours.dtype).eps * magnitude
    budget = 2 * max(map(error, torchs)) + floor
    assert error(ours) <= budget, f"{name}: error {error(ours):.3g}, budget {budget:.3g}"


def check(
    ours: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    allowed: Tensor,
    scale: float | None = None,
    lse_gradient: bool = True,
) -> dict[str, Tensor]:
    """Hold output, log-sum-exp and all gradients of `ours(query, key, value)` to the budget."""
    query, _, value = inputs
    generator = torch.Generator().manual_seed(1)
    shape = (*query.shape[:3], value.shape[-1])
    # Drawn in the inputs' dtype, so that every side is given the same cotangent.
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(query.dtype)
    grad_lse = torch.randn(shape[:3], generator=generator) if lse_gradient else None

    def run(function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Tensor]) -> dict:
        return with_gradients(
            lambda *leaves: function(*leaves, allowed, scale), tensors, (grad_output, grad_lse)
        )

    exact = run(dense_attention, [x.double() for x in inputs])
    # Two yardsticks: where a row has one key, or the value another size, the fused kernel of torch
    # gives way to one whose softmax backward cancels exactly; the composed form shows the rounding
    # that any recomputing backward has.
    torchs = [run(function, inputs) for function in (torch_attention, torch_dense)]
    results = with_gradients(ours, inputs, (grad_output, grad_lse))
    for name, result in results.items():
        assert_within_budget(name, result, [x[name] for x in torchs], exact[name])
    return results
