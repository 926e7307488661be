"""Attention weights of the allowed pairs alone: a sparse matrix for each head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn import _longformer_layout
from sparse_attn._library import ops
from sparse_attn.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Sides of the picture that `plot` draws, at most; more queries or keys share a pixel.
_PIXELS = 512


@dataclass(eq=False, repr=False)
class SparseWeights:
    """What each query pays to each key that it sees, in memory linear in the pairs.

    `attention(…, return_weights=True)` makes it. The pairs of all heads stand in one list, in CSR
    form: those of query i of head h of example b are `values[first:last]`, with their keys
    `col_indices[first:last]` ascending, where `first, last = crow_indices[b, h, i : i + 2]`. Every
    method is differentiable in `values`, any number of times.

    Args:
        values: (pairs,); float32 for half types. After dropout; before it, the weights of a query
            sum to 1 (less the sink's share; 0 for a query without keys).
        crow_indices: (batch, heads, n_q + 1) int64, offsets into the list.
        col_indices: (pairs,) int64.
        n_k: Number of keys.
        pattern: Of the call, for `to_longformer`; as are the next two.
        key_padding_mask: (batch, n_k) bool.
        global_mask: (batch, n_k) bool.

    >>> import sparse_attn
    >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    >>> pattern = Window(8) | Global([0])
    >>> output, weights = sparse_attn.attention(query, key, value, pattern, return_weights=True)
    >>> weights
    SparseWeights((2, 4, 100, 100), 14480 pairs, torch.float32, Window(8) | Global([0]))
    >>> torch.allclose(weights @ value, output, atol=1e-6)
    True
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    n_k: int
    pattern: Pattern | None = None
    key_padding_mask: Tensor | None = None
    global_mask: Tensor | None = None

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", {self.device}"
        pattern = "" if self.pattern is None else f", {self.pattern}"
        pairs = self.col_indices.numel()
        return f"SparseWeights({tuple(self.shape)}, {pairs} pairs, {self.dtype}{device}{pattern})"

    @property
    def shape(self) -> torch.Size:
        """(batch, heads, n_q, n_k)."""
        batch, heads, rows = self.crow_indices.shape
        return torch.Size((batch, heads, rows - 1, self.n_k))

    @property
    def dtype(self) -> torch.dtype:
        """Of `values`."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.values.device

    def detach(self) -> SparseWeights:
        """The same weights without their history."""
        return replace(self, values=self.values.detach())

    def to(self, device: torch.device | str) -> SparseWeights:
        """The same weights on another device."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def __matmul__(self, value: Tensor) -> Tensor:
        """`weights @ value` is `weights.matmul(value)`."""
        return self.matmul(value) if isinstance(value, Tensor) else NotImplemented

    def matmul(self, value: Tensor) -> Tensor:
        """For each query the sum of the values that it sees, by their weights.

        Args:
            value: (batch, heads_kv, n_k, value_dim), where heads_kv divides heads.

        Returns:
            (batch, heads, n_q, value_dim), in value's dtype; half types are summed in float32.

        Raises:
            TypeError: value has another dtype (or, with float32 weights, no half type either).
            ValueError: Its shape or device does not fit.
        """
        batch, heads, _, n_k = self.shape
        self._check_factor(
            "value", value, f"({batch}, a divisor of {heads}, {n_k}, value_dim)", n_k
        )
        return ops.pair_sums(self.values, value, self.crow_indices, self.col_indices)

    def transposed_matmul(self, rows: Tensor) -> Tensor:
        """For each key the sum of the rows of the queries that see it, by their weights.

        Args:
            rows: (batch, heads, n_q, size), of the dtype that `@` takes.

        Returns:
            (batch, heads, n_k, size), in rows' dtype. Of ones it is what each key receives; of
            rows chosen from a unit matrix, these rows of the weights, which is how weights of
            several layers are multiplied without a dense matrix.

        Raises:
            TypeError: rows has another dtype.
            ValueError: Its shape or device does not fit.

        >>> import sparse_attn
        >>> query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
        >>> _, weights = sparse_attn.attention(
        ...     query, key, value, Window(8), return_weights=True)
        >>> weights.transposed_matmul(torch.ones(2, 4, 100, 1)).sum().round()
        tensor(800.)
        """
        batch, heads, n_q, n_k = self.shape
        self._check_factor("rows", rows, f"({batch}, {heads}, {n_q}, size)", n_q, heads)
        indices = self.crow_indices, self.col_indices
        return ops.pair_column_sums(self.values, rows, *indices, heads, n_k)

    def to_dense(self) -> Tensor:
        """(batch, heads, n_q, n_k): for short sequences, as its size is that of full attention."""
        return self._scattered(self._rows() * self.n_k + self.col_indices, self.shape)

    def to_csr(self) -> Tensor:
        """As one of torch's sparse CSR tensors.

        Returns:
            (batch, heads, n_q, n_k) if all heads have as many pairs, which torch's batches of
            sparse matrices need; else a matrix (batch · heads · n_q, n_k), the heads below one
            another.
        """
        batch, heads, n_q, n_k = self.shape
        local = self.crow_indices - self.crow_indices[..., :1]
        counts = local[..., -1].unique()
        if counts.numel() == 1:
            parts = (batch, heads, int(counts))
            crow, col, values = local, self.col_indices.view(parts), self.values.view(parts)
            size = self.shape
        else:
            crow, col, values = self._offsets(), self.col_indices, self.values
            size = (batch * heads * n_q, n_k)
        return torch.sparse_csr_tensor(crow, col, values, size, check_invariants=False)

    def to_longformer(self) -> Tensor:
        """In the layout of Hugging Face's Longformer.

        For each query the global keys of its example, ascending, then the window from the
        furthest key on the left to the furthest on the right. A key of both stands with the
        global ones alone. Rows of global queries, whose keys have no place, and of padded queries
        are 0.

        Returns:
            (batch, heads, n_q, G + 2 · side + 1): G is the largest number of global tokens of an
            example, those of the pattern and of global_mask less padding; side the larger one of
            the window. What has no key is 0.

        Raises:
            ValueError: The pattern does not hold exactly one finite `Window`, or a query sees keys
                that are neither global nor in the window.
        """
        return _longformer_layout.of_local_queries(self)

    def to_longformer_global(self) -> Tensor:
        """What the global queries pay, in the layout of Hugging Face's `global_attentions`.

        Returns:
            (batch, heads, n_k, G): for each key what each global query of its example pays to it,
            the queries ascending; 0 where an example has fewer than G of them.

        Raises:
            ValueError: The weights have no pattern, or n_q ≠ n_k.
        """
        return _longformer_layout.of_global_queries(self)

    def plot(self, batch: int = 0, head: int = 0, ax: Axes | None = None) -> Any:
        """Draw the weights of one head with matplotlib: queries down, keys across.

        Args:
            batch: The example.
            head: The head.
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes. Where there are more than 512 queries or keys, neighbors share a pixel, which
            shows the largest of their weights.

        Raises:
            IndexError: There is no such example or head.

        >>> import sparse_attn
        >>> query, key, value = (torch.randn(1, 4, 100, 32) for _ in range(3))
        >>> _, weights = sparse_attn.attention(
        ...     query, key, value, Window(8), return_weights=True)
        >>> weights.plot(head=2).get_ylabel()
        'query'
        """
        from matplotlib import pyplot

        batches, heads, n_q, n_k = self.shape
        for name, number, count in (("batch", batch, batches), ("head", head, heads)):
            if not -count <= number < count:
                raise IndexError(
                    f"sparse_attn: expected {name} in [{-count}, {count}), got {number}"
                )
        if ax is None:
            _, ax = pyplot.subplots()
        crow = self.crow_indices[batch, head].cpu()
        first, last = crow[0].item(), crow[-1].item()
        row = torch.repeat_interleave(crow.diff(), output_size=last - first)
        column = self.col_indices[first:last].cpu()
        size = [min(n, _PIXELS) for n in (n_q, n_k)]
        pixel = row * size[0] // max(1, n_q) * size[1] + column * size[1] // max(1, n_k)
        values = self.values.detach()[first:last].cpu()
        image = values.new_zeros(size[0] * size[1]).scatter_reduce(0, pixel, values, "amax")
        extent = (-0.5, n_k - 0.5, n_q - 0.5, -0.5)
        picture = image.view(size).numpy()
        drawn = ax.imshow(picture, cmap="Blues", vmin=0, extent=extent, interpolation="nearest")
        ax.figure.colorbar(drawn, ax=ax, label="weight")
        ax.set(title=f"example {batch}, head {head}", xlabel="key", ylabel="query")
        return ax

    def _check_factor(
        self, name: str, tensor: Tensor, shape: str, length: int, heads: int | None = None
    ) -> None:
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"sparse_attn: expected {name} to be a Tensor, got {kind}")
        batch, of_weights = self.shape[:2]
        sizes = tuple(tensor.shape)
        fits = tensor.dim() == 4 and sizes[0] == batch and sizes[2] == length
        divides = fits and (sizes[1] == of_weights or (sizes[1] and of_weights % sizes[1] == 0))
        if not divides or (heads is not None and sizes[1] != heads):
            raise ValueError(f"sparse_attn: expected {name} of shape {shape}, got {sizes}")
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if wide != self.dtype:
            half = " or a half type" if self.dtype == torch.float32 else ""
            raise TypeError(
                f"sparse_attn: expected {name} of dtype {self.dtype}{half}, as the weights, got "
                f"{tensor.dtype}"
            )

    def _offsets(self) -> Tensor:
        """Those of the rows of all heads, (batch · heads · n_q + 1,)."""
        return torch.nn.functional.pad(self.crow_indices[..., 1:].flatten(), (1, 0))

    def _rows(self) -> Tensor:
        """Of each pair the number of its row among those of all heads."""
        counts = self.crow_indices.diff().flatten()
        return torch.repeat_interleave(counts, output_size=self.col_indices.numel())

    def _distance(self, row: Tensor) -> Tensor:
        """Of each pair how far its key is to the right of its query."""
        n_q = self.shape[2]
        return self.col_indices - row % max(1, n_q) - (self.n_k - n_q)

    def _of_heads(self, numbers: list[int]) -> Tensor:
        """What a PerHead gives each of its patterns, for each head."""
        per_pattern = torch.tensor(numbers, device=self.device)
        return per_pattern.repeat_interleave(self.shape[1] // len(numbers))

    def _scattered(self, place: Tensor, shape: torch.Size, kept: Tensor | None = None) -> Tensor:
        """Zeros with the values, or those of the pairs `kept`, at their places."""
        values = self.values
        if kept is not None:
            values, place = values.index_select(0, kept), place[kept]
        return values.new_zeros(shape.numel()).scatter(0, place, values).view(shape)
