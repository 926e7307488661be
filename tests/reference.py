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
from philox import distinct, philox, seed_key
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Grid:
    """Everything a rule may ask about one call; the arrays broadcast to (n_q, n_k)."""

    n_q: int
    n_k: int

    @property
    def row(self) -> np.ndarray:
        """The queries as they are stored, (n_q, 1)."""
        return np.arange(self.n_q)[:, None]

    @property
    def i(self) -> np.ndarray:
        """The position of each query, (n_q, 1): the ends are aligned."""
        return self.row + (self.n_k - self.n_q)

    @property
    def j(self) -> np.ndarray:
        """The keys, (1, n_k)."""
        return np.arange(self.n_k)[None, :]


@dataclass(frozen=True)
class Rule:
    """Who sees whom: `allows(grid)` broadcasts to (n_q, n_k), (H, ...) or (B, H, ...)."""

    allows: Callable[[Grid], np.ndarray]
    causal: bool = False

    def __or__(self, other: Rule) -> Rule:
        return Rule(lambda at: self.allows(at) | other.allows(at), self.causal and other.causal)

    def __and__(self, other: Rule) -> Rule:
        return Rule(lambda at: self.allows(at) & other.allows(at), self.causal or other.causal)

    def mask(self, n_q: int, n_k: int | None = None, heads: int = 1) -> np.ndarray:
        """The (heads, n_q, n_k) mask, with a batch in front if the rule tells examples apart."""
        n_k = n_q if n_k is None else n_k
        allowed = self.allows(Grid(n_q, n_k))
        return np.broadcast_to(allowed, (*allowed.shape[:-3], heads, n_q, n_k))


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
        return np.concatenate(np.broadcast_arrays(*masks), axis=-3)


def _among(position: np.ndarray, tokens: Sequence[int], n_k: int) -> np.ndarray:
    return np.isin(position, [token + n_k if token < 0 else token for token in tokens])


def Window(left: float, right: float | None = None, dilation: int = 1) -> Rule:
    right = left if right is None else right

    def allows(at: Grid) -> np.ndarray:
        step, rest = (at.j - at.i) // dilation, (at.j - at.i) % dilation
        return (rest == 0) & (-left <= step) & (step <= right)

    return Rule(allows, causal=right == 0)


def GlobalKeys(tokens: Sequence[int]) -> Rule:
    return Rule(lambda at: _among(at.j, tokens, at.n_k))


def GlobalQueries(tokens: Sequence[int]) -> Rule:
    return Rule(lambda at: _among(at.i, tokens, at.n_k))


def Global(tokens: Sequence[int]) -> Rule:
    return GlobalKeys(tokens) | GlobalQueries(tokens)


def Full() -> Rule:
    return Rule(lambda at: np.array(True))


def Causal() -> Rule:
    return Rule(lambda at: at.j <= at.i, causal=True)


def Strided(stride: int) -> Rule:
    def allows(at: Grid) -> np.ndarray:
        return (at.j > at.i - stride) | ((at.i - at.j) % stride == 0)

    return Rule(allows) & Causal()


def Fixed(stride: int, summary: int) -> Rule:
    def allows(at: Grid) -> np.ndarray:
        return (at.j // stride == at.i // stride) | (at.j % stride >= stride - summary)

    return Rule(allows) & Causal()


def _in_a_block(rule: Callable[[np.ndarray, np.ndarray, int], np.ndarray], block: int) -> Rule:
    """`rule(query block, key block, blocks)`; a negative position belongs to no block."""

    def allows(at: Grid) -> np.ndarray:
        own = np.maximum(at.i, 0) // block
        return (at.i >= 0) & rule(own, at.j // block, math.ceil(at.n_k / block))

    return Rule(allows)


def LocalBlocks(block: int) -> Rule:
    return _in_a_block(lambda own, other, _: own == other, block)


def Checkerboard(block: int = 1) -> Rule:
    return _in_a_block(lambda own, other, _: (own + other) % 2 == 0, block)


def RandomBlocks(blocks_per_row: int, block: int, seed: int = 0) -> Rule:
    def drawn(own: np.ndarray, other: np.ndarray, blocks: int) -> np.ndarray:
        table = np.zeros((blocks, blocks), bool)
        for row in np.unique(own).tolist():
            table[row, list(distinct(blocks_per_row, blocks, row, seed))] = True
        return table[own, other]

    return _in_a_block(drawn, block)


def BigBird(
    block: int,
    random_blocks: int = 3,
    window_blocks: int = 3,
    global_blocks: int = 1,
    seed: int = 0,
) -> Rule:
    def at_an_end(number: np.ndarray, blocks: int) -> np.ndarray:
        return (number < global_blocks) | (number >= blocks - global_blocks)

    window = _in_a_block(lambda own, other, _: abs(own - other) <= window_blocks // 2, block)
    rows = _in_a_block(lambda own, other, blocks: at_an_end(own, blocks), block)
    columns = Rule(lambda at: at_an_end(at.j // block, math.ceil(at.n_k / block)))
    return window | RandomBlocks(random_blocks, block, seed) | rows | columns


def RandomTokens(keep_prob: float, seed: int = 0) -> Rule:
    threshold = max(round(keep_prob * 2**32), int(keep_prob > 0))

    def allows(at: Grid) -> np.ndarray:
        words = philox((at.j >> 2, at.i, 0, 1), seed_key(seed))
        return np.choose(at.j & 3, words) < threshold

    return Rule(allows)


def Radial(radius: int) -> Rule:
    def allows(at: Grid) -> np.ndarray:
        distance = abs(at.i - at.j)
        allowed, reach, step = distance <= radius, radius, 1
        while 0 < reach < distance.max(initial=0):
            step *= 2
            allowed |= (reach < distance) & (distance <= 2 * reach) & (distance % step == 0)
            reach *= 2
        return allowed

    return Rule(allows)


def FirstLast(first: int, last: int) -> Rule:
    return Rule(lambda at: (at.j < first) | (at.j >= at.n_k - last))


def BlockLayout(layout: Tensor, block: int) -> Rule:
    table = layout.cpu().numpy()
    return Rule(lambda at: table[..., at.row // block, at.j // block])


def Mask(mask: Tensor) -> Rule:
    return BlockLayout(mask, 1)


def KeyLists(indices: Tensor, counts: Tensor | None = None) -> Rule:
    lists = indices.cpu().numpy()[..., None]
    places = np.arange(lists.shape[-2])[:, None]
    held = places < (lists.shape[-2] if counts is None else counts.cpu().numpy()[..., None, None])
    return Rule(lambda at: ((lists == at.j) & held).any(-2))


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
    allowed = torch.from_numpy(rule.mask(n_q, n_k, heads).copy()).to(query.device)
    if allowed.ndim == 3:
        allowed = allowed[None]
    if global_mask is not None:
        position = torch.arange(n_q, device=query.device) + n_k - n_q
        rows = global_mask[:, position.clamp(min=0)] & (position >= 0)
        allowed = allowed | global_mask[:, None, None, :] | rows[:, None, :, None]
        if rule.causal:
            allowed = allowed & (torch.arange(n_k, device=query.device) <= position[:, None])
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
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64).to(query)
    grad_lse = None
    if lse_gradient:
        grad_lse = torch.randn(shape[:3], generator=generator).to(query.device)

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
