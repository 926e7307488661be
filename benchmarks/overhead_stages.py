"""The stages of a small call, as differences between calls that go ever further.

One thread, one head. A call without queries returns after the checks, one of a single query and key
does everything but arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import interleave

import sparse_attn
from sparse_attn import Window

CALLS = 10  # of one sample

#: A stage is what the second call takes beyond the first.
FORWARD = (
    ("Python's call of an op", None, "no-op"),
    ("dispatch, checks, outputs", "no-op", "no queries"),
    ("plan, workspace, kernel's start", "no queries", "one pair"),
    ("arithmetic", "one pair", "op"),
    ("checks in Python", "op", "function"),
)
BACKWARD = (
    ("autograd's node", "function", "recorded"),
    ("autograd's engine", "add, recorded", "add, both"),
    ("backward: dispatch, checks, gradients", "no-op", "backward, no queries"),
    ("backward: plan, workspace, start", "backward, no queries", "backward, one pair"),
    ("backward: arithmetic", "backward, one pair", "backward"),
)


def _calls(args: argparse.Namespace) -> dict[str, tuple[bool, Callable[[], object]]]:
    """Each call, and whether autograd records it."""
    ops, pattern = torch.ops.sparse_attn, Window(args.window)
    words = pattern.encode()
    shape = (1, 1, args.length, args.head_dim)
    q, k, v = (torch.randn(shape) for _ in range(3))
    tracked = tuple(torch.randn(shape, requires_grad=True) for _ in range(3))
    one = torch.randn(1, 1, 1, args.head_dim)
    none = one[:, :, :0]

    def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
        output, lse = ops.attention(q, k, v, words)
        grad = torch.randn_like(output)
        return lambda: ops.attention_backward(grad, None, q, k, v, output, lse, words)

    return {
        "no-op": (False, ops._plan_cache_size),
        "no queries": (False, lambda: ops.attention(none, one, one, words)),
        "one pair": (False, lambda: ops.attention(one, one, one, words)),
        "op": (False, lambda: ops.attention(q, k, v, words)),
        "function": (False, lambda: sparse_attn.attention(q, k, v, pattern)),
        "recorded": (True, lambda: sparse_attn.attention(*tracked, pattern)),
        "add, recorded": (True, lambda: tracked[0] + tracked[1]),
        "add, both": (True, lambda: torch.autograd.grad(tracked[0] + tracked[1], tracked[:2], q)),
        "backward, no queries": (False, backward(none, one, one)),
        "backward, one pair": (False, backward(one, one, one)),
        "backward": (False, backward(q, k, v)),
    }


def measure(args: argparse.Namespace) -> list[dict]:
    """Microseconds of each stage, by the least times."""

    def sample(recorded: bool, call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(not recorded):
                for _ in range(CALLS):
                    call()

        return run

    tasks = {name: sample(*call) for name, call in _calls(args).items()}
    found = interleave(tasks, args.rounds, args.seconds, args.seed)
    us = {name: 1e6 * min(samples.seconds) / CALLS for name, samples in found.items()}
    return [
        {"stage": stage, "us": us[after] - (us[before] if before else 0.0)}
        for stage, before, after in (*FORWARD, *BACKWARD)
    ]
