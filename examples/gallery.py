"""Draw every pattern, with the call that makes it, into one picture.

The picture in the README is `python examples/gallery.py --out docs/gallery.png`.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

import sparse_attn

CALLS = (
    "Full()",
    "Causal()",
    "Window(5)",
    "Window(8, 0)",
    "Window(4, dilation=3)",
    "Window(4) | Global([0, 24])",
    "GlobalKeys([0, 1, 24])",
    "GlobalQueries([0, 1, 24])",
    "FirstLast(4, 2)",
    "Strided(8)",
    "Fixed(8, 2)",
    "LocalBlocks(8)",
    "Checkerboard(4)",
    "RandomBlocks(3, 4)",
    "BigBird(4, random_blocks=2)",
    "RandomTokens(0.1)",
    "Radial(4)",
    "(Window(6) | Global([0])) & Causal()",
    "Window(14) & Checkerboard(2)",
    "Window(3, 0) | FirstLast(2, 0) & Causal()",
    "BlockLayout(layout, 4)",
    "Mask(mask)",
    "KeyLists(indices)",
    "KeyLists(indices) & Causal() | Window(3, 0)",
)
COLUMNS, TOKENS = 6, 48


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Data for the patterns that are data: a random layout, a disc, random lists of keys."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(TOKENS) - TOKENS / 2 + 0.5
    return {
        "layout": torch.rand(TOKENS // 4, TOKENS // 4, generator=generator) < 0.2,
        "mask": position[:, None] ** 2 + position**2 < (0.45 * TOKENS) ** 2,
        "indices": torch.randint(TOKENS, (TOKENS, 5), generator=generator),
    }


def draw(seed: int) -> plt.Figure:
    """A panel for each call."""
    names = {**vars(sparse_attn), **tensors(seed)}
    rows = -(-len(CALLS) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.1 * COLUMNS, 2.5 * rows))
    for ax, call in zip(axes.flat, CALLS, strict=True):
        mask = eval(call, names).mask(TOKENS)
        ax.imshow(mask.numpy(), cmap=ListedColormap(["#f2f4f7", "#1f4e8c"]), vmin=0, vmax=1)
        ax.set_xlabel("\n".join(textwrap.wrap(call, 26)), fontsize=8, family="monospace")
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_color("#c4cad3")
    figure.tight_layout()
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gallery.png"), help="picture to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random tensors")
    parser.add_argument("--dpi", type=int, default=110, help="dots per inch")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(args.seed).savefig(args.out, dpi=args.dpi)
    print(args.out)


if __name__ == "__main__":
    main()
