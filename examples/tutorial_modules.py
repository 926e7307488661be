"""The three `SparseAttention` modules that tutorials print, each in a few lines of this library.

Two of them draw a random mask in every call, one that drops a share of the pairs and one that keeps
a share of them; the third looks at k neighbors on each side. Each is run forward and backward on a
batch of (32, 1000, 256). What is printed there computes all pairs and throws most away, and a query
whose keys are all masked becomes NaN; here only the pairs of the pattern are computed, and such a
query gets the bias of the output projection.
"""

import argparse
import time

import torch
from torch import Tensor

from sparse_attn import RandomTokens, SparseSelfAttention, Window


class DroppingAttention(SparseSelfAttention):
    """`SparseAttention(d_model, num_heads, sparsity_ratio)`: a share of all pairs is dropped."""

    def __init__(self, d_model: int, num_heads: int, sparsity_ratio: float):
        pattern = RandomTokens(1 - sparsity_ratio)
        super().__init__(d_model, num_heads, pattern=pattern, redraw=True)


class NeighborAttention(SparseSelfAttention):
    """`SparseAttention(embed_size, heads, k)`: a query sees k keys on each side, and its own."""

    def __init__(self, embed_size: int, heads: int, k: int):
        super().__init__(embed_size, heads, pattern=Window(k))


class KeepingAttention(SparseSelfAttention):
    """`SparseAttention(d_model, n_heads, sparsity)`: a share of all pairs is kept."""

    def __init__(self, d_model: int, n_heads: int, sparsity: float):
        super().__init__(d_model, n_heads, pattern=RandomTokens(sparsity), redraw=True)


def run(layer: SparseSelfAttention, x: Tensor) -> str:
    """One call forward and backward, and a second one to compare with, in words."""
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    output = layer(x)
    middle = time.perf_counter()
    output.square().mean().backward()
    end = time.perf_counter()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    finite = all(tensor.isfinite().all() for tensor in (output, *gradients))
    with torch.no_grad():
        again = (layer(x) - output).abs().max().item()
    share = layer.pattern.cost(x.shape[1]).pairs / x.shape[1] ** 2
    return (
        f"  {100 * share:.1f} % of the pairs: output {tuple(output.shape)}, "
        f"{'all finite' if finite else 'NOT FINITE'}\n"
        f"  forward {1e3 * (middle - start):.0f} ms, backward {1e3 * (end - middle):.0f} ms, "
        f"a second call differs by up to {again:.2g}"
    )


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return value


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=32, help="examples")
    add("--length", type=int, default=1000, help="tokens of each")
    add("--width", type=int, default=256, help="channels of a token")
    add("--heads", type=int, default=8, help="attention heads")
    add("--kept", type=share, default=0.1, help="share of the pairs that the random ones keep")
    add("--k", type=int, default=10, help="neighbors on each side")
    add("--seed", type=int, default=0, help="of weights, input and masks")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    try:
        layers = {
            f"SparseAttention(d_model, num_heads, sparsity_ratio={1 - args.kept:g})": (
                DroppingAttention(args.width, args.heads, 1 - args.kept)
            ),
            f"SparseAttention(embed_size, heads, k={args.k})": (
                NeighborAttention(args.width, args.heads, args.k)
            ),
            f"SparseAttention(d_model, n_heads, sparsity={args.kept:g})": (
                KeepingAttention(args.width, args.heads, args.kept)
            ),
        }
        x = torch.randn(args.batch, args.length, args.width)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for name, layer in layers.items():
        print(f"{name}\n{run(layer, x)}\n", flush=True)


if __name__ == "__main__":
    main()
