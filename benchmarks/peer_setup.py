"""What a peer is, what it may use to prepare itself, and the task that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from workload import AnyCase, Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """A peer has no such case; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What a peer may use to prepare itself."""

    case: AnyCase
    inputs: tuple[Tensor, ...]  # query, key, value, gradient, (batch, heads, length, head size)
    backward: bool
    dense_up_to: int = 16384

    def window(self) -> Case:
        """The case, if it is a window."""
        if not isinstance(self.case, Case):
            raise Unsupported("none: windows only")
        return self.case


@dataclass(frozen=True)
class Peer:
    """A way to compute attention; `to_native` and back are layouts, changed outside the timing."""

    prepare: Callable[[Setup], Attention | tuple[Attention, str]]
    to_native: Callable[[Tensor], Tensor] = lambda x: x
    from_native: Callable[[Tensor, int], Tensor] = lambda x, heads: x
    dense: bool = False
    compiles: bool = False  # in the first call


def step(run: Attention, leaves: tuple[Tensor, ...], grad: Tensor, backward: bool) -> Callable:
    """The task that is timed: one forward in inference mode, or one forward and backward."""

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (run(*leaves),)

    def forward_backward() -> tuple[Tensor, ...]:
        output = run(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return forward_backward if backward else forward


def make_task(peer: Peer, setup: Setup) -> tuple[Callable[[], tuple[Tensor, ...]], str]:
    """The task of a peer, and a note on what it chose."""
    prepared = peer.prepare(setup)
    run, note = prepared if isinstance(prepared, tuple) else (prepared, "")
    query, key, value, grad = (peer.to_native(x).detach() for x in setup.inputs)
    leaves = tuple(x.requires_grad_(setup.backward) for x in (query, key, value))
    return step(run, leaves, grad, setup.backward), note


def by_residue(case: Case, attention: Attention) -> Attention:
    """A dilated window by an undilated one: tokens c, c + d, c + 2d ... become a head."""
    dilation = case.dilation
    if dilation == 1:
        return attention
    if case.length % dilation:
        raise Unsupported("none: the length is not a multiple of the dilation")

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, dilation)).movedim(3, 2).flatten(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attention(split(q), split(k), split(v))
        return output.unflatten(1, (-1, dilation)).movedim(2, 3).flatten(2, 3)

    return run
