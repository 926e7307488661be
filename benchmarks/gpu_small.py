"""A few small calls in both directions, against the same calls on the CPU: for compute-sanitizer.

All dtypes, odd sizes, padding, other numbers of queries and of key heads, per-example global
tokens, and patterns that take the different ways through the engine.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/gpu_small.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from sparse_attn import (
    BigBird,
    BlockLayout,
    Causal,
    Global,
    KeyLists,
    Pattern,
    PerHead,
    RandomTokens,
    Strided,
    Window,
    attention,
)

# In units of the largest element.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-2,  # TF32 keeps 10 bits
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


def calls(device: str) -> list[tuple[Pattern, dict]]:
    """Patterns, and what is unusual about their call."""
    generator = torch.Generator().manual_seed(0)
    lists = torch.randint(97, (1, 1, 97, 9), generator=generator).to(device)
    layout = (torch.rand(4, 7, 7, generator=generator) < 0.4).to(device)
    return [
        (Window(20), {}),
        (Window(9, 0, dilation=3), {"head_dim": 40, "value_dim": 24, "padded": True}),
        (Window(16) | Global([0, -1]), {"n_q": 70, "head_dim": 128, "kv_heads": 2}),
        (Window(7) & Causal(), {"padded": True, "global_tokens": True, "head_dim": 33}),
        (BigBird(16), {"n_q": 131, "n_k": 131}),
        (Strided(10), {"head_dim": 96}),
        (PerHead([Window(8), Window(4, dilation=5)]), {"kv_heads": 2}),
        (KeyLists(lists) | RandomTokens(0.05), {"head_dim": 80}),
        (BlockLayout(layout, 14), {"head_dim": 256}),
    ]


def inputs(
    n_q: int, n_k: int, head_dim: int, value_dim: int, kv_heads: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n_q, head_dim), (2, kv_heads, n_k, head_dim), (2, kv_heads, n_k, value_dim)]
    shapes.append((2, 4, n_q, value_dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(pattern: Pattern, tensors: list[Tensor], device: str, options: dict) -> list[Tensor]:
    """Output, log-sum-exp and gradients, on the CPU."""
    *leaves, grad = (x.detach().to(device) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    masks = {name: mask.to(device) for name, mask in options.items()}
    output, lse = attention(*leaves, pattern, return_lse=True, enable_gqa=True, **masks)
    return [x.detach().cpu() for x in (output, lse, *torch.autograd.grad(output, leaves, grad))]


def check(device: str, number: int, dtype: torch.dtype) -> float:
    """The largest error of one call, in units of the tolerance."""
    pattern, unusual = calls(device)[number]
    expected_pattern, _ = calls("cpu")[number]
    n_q, head_dim = unusual.get("n_q", 97), unusual.get("head_dim", 64)
    n_k = unusual.get("n_k", 97)
    value_dim, kv_heads = unusual.get("value_dim", head_dim), unusual.get("kv_heads", 4)
    tensors = inputs(n_q, n_k, head_dim, value_dim, kv_heads, dtype)
    options = {}
    if unusual.get("padded"):
        options["key_padding_mask"] = torch.arange(n_k) >= torch.tensor([[n_k - 11], [n_k]])
    if unusual.get("global_tokens"):
        options["global_mask"] = torch.arange(n_k) % 40 == torch.tensor([[3], [5]])
    ours = run(pattern, tensors, device, options)
    expected = run(expected_pattern, tensors, "cpu", options)
    worst = 0.0
    for result, exact in zip(ours, expected, strict=True):
        finite = exact.isfinite()
        if not torch.equal(result.isfinite(), finite):
            return float("inf")
        result, exact = result[finite].double(), exact[finite].double()
        scale = TOLERANCES[dtype] * max(1.0, exact.abs().max().item())
        worst = max(worst, (result - exact).abs().max().item() / scale)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    names = [str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA device")
    failed = 0
    for number, (pattern, _) in enumerate(calls("cpu")):
        for name in args.dtypes:
            error = check(args.device, number, getattr(torch, name))
            failed += not error <= 1
            print(f"{name:<9} {error:8.1e} of the tolerance  {pattern!r}"[:100], flush=True)
    if failed:
        raise SystemExit(f"{failed} calls differ from those on the CPU")


if __name__ == "__main__":
    main()
