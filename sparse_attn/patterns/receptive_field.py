"""How far information travels through stacked layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparse_attn.patterns.base import Pattern


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Which tokens reach which (see `Pattern.receptive_field`).

    Attributes:
        first_layer: (n, n) int: the number of layers after which query i has information of key j;
            0 if it has none after all of them.
        distance: For each number of layers from 1 on, the largest |i − j| that is reached.
        share: For each number of layers from 1 on, the share of all pairs that is connected.
        layers_to_connect: After how many layers every pair is connected; None if not after all.
    """

    first_layer: Tensor
    distance: tuple[int, ...]
    share: tuple[float, ...]
    layers_to_connect: int | None

    def mask(self, layers: int | None = None) -> Tensor:
        """The (n, n) bool tensor of what is reached after so many layers; after all if None.

        >>> from sparse_attn import Window
        >>> Window(1, 0).receptive_field(4, 2).mask().int()[3].tolist()
        [0, 1, 1, 1]
        """
        layers = len(self.share) if layers is None else layers
        return (self.first_layer > 0) & (self.first_layer <= layers)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw with matplotlib after how many layers each pair is connected.

        >>> from sparse_attn import Window
        >>> Window(4).receptive_field(32, 4).plot().get_ylabel()
        'query'
        """
        from matplotlib import pyplot

        if ax is None:
            _, ax = pyplot.subplots()
        layers = len(self.share)
        reached = self.first_layer.float().masked_fill(self.first_layer == 0, torch.nan)
        colors = pyplot.get_cmap("viridis_r", layers)
        image = ax.imshow(reached.numpy(), cmap=colors, vmin=0.5, vmax=layers + 0.5)
        ticks = range(1, layers + 1, -(-layers // 10))
        ax.figure.colorbar(image, ax=ax, label="layers", ticks=list(ticks))
        end = f"all pairs after {self.layers_to_connect}"
        if self.layers_to_connect is None:
            end = f"{self.share[-1]:.0%} of the pairs after {layers}"
        ax.set(title=end, xlabel="key", ylabel="query")
        return ax


def trace(patterns: Sequence[Pattern], n: int) -> ReceptiveField:
    """The receptive field of layers with these patterns, from the first one up."""
    reached = torch.eye(n, dtype=torch.bool)
    first_layer = torch.zeros(n, n, dtype=torch.int32)
    position = torch.arange(n)
    apart = (position[:, None] - position).abs()
    distance, share = [], []
    for layer, pattern in enumerate(patterns, start=1):
        sees = pattern.mask(n, heads=pattern.heads).flatten(0, -3).any(0)
        reached = reached | ((sees.float() @ reached.float()) > 0)
        first_layer[reached & (first_layer == 0)] = layer
        distance.append(int(apart[reached].max()))
        share.append(reached.sum().item() / n**2)
    connected = int(first_layer.max()) if bool(reached.all()) else None
    return ReceptiveField(first_layer, tuple(distance), tuple(share), connected)
