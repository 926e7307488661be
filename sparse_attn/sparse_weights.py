"""Attention weights of the allowed pairs alone: a sparse matrix for each head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn._library import ops
from sparse_attn.patterns import Global, GlobalKeys, GlobalQueries, Pattern, PerHead
from sparse_attn.patterns.base import Intersection, Union
from sparse_attn.tables import slot_windows

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
        if self.pattern is None:
            raise ValueError("sparse_attn: expected weights with a pattern for to_longformer()")
        batch, heads, n_q, n_k = self.shape
        sides = slot_windows("to_longformer()", self.pattern)
        side = max(max(left, right) for left, right, _ in sides)
        dilation = self._of_heads([step for _, _, step in sides])
        is_key, is_query = self._global_tokens()
        number = is_key.sum(-1).amax().item() if is_key.numel() else 0
        width = number + 2 * side + 1

        row = self._rows()
        head, distance = row // max(1, n_q), self._distance(row)
        step = dilation[head % max(1, heads)]
        column = head * n_k + self.col_indices
        is_global = is_key.flatten()[column]
        in_window = (distance % step == 0) & (distance.abs() <= side * step)
        kept = ~self._row_mask(is_query).flatten()[row]
        if (kept & ~is_global & ~in_window).any():
            raise ValueError(
                "sparse_attn: expected a pattern of one window and global tokens for "
                f"to_longformer(), got {self.pattern!r}"
            )
        rank = (is_key.cumsum(-1) - 1).flatten()[column]
        place = torch.where(is_global, rank, number + side + distance // step)
        shape = torch.Size((batch, heads, n_q, width))
        return self._scattered(row * width + place, shape, kept.nonzero().squeeze(1))

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

    def _global_tokens(self) -> tuple[Tensor, Tensor]:
        """(batch, heads, n_k) masks: keys that all see, queries that see all or are padding."""
        batch, heads, _, n_k = self.shape
        patterns = self.pattern.patterns if isinstance(self.pattern, PerHead) else [self.pattern]
        masks = torch.zeros(2, len(patterns), n_k, dtype=torch.bool)
        for number, pattern in enumerate(patterns):
            for part in _token_parts(pattern):
                if not isinstance(part, GlobalQueries):
                    masks[0, number, list(part.tokens)] = True
                if not isinstance(part, GlobalKeys):
                    masks[1, number, list(part.tokens)] = True
        group = heads // len(patterns)
        masks = masks.to(self.device).repeat_interleave(group, 1)[:, None]
        is_key, is_query = masks.expand(2, batch, heads, n_k)
        if self.global_mask is not None:
            is_key, is_query = (x | self.global_mask[:, None] for x in (is_key, is_query))
        if self.key_padding_mask is not None:
            is_key = is_key & ~self.key_padding_mask[:, None]
            is_query = is_query | self.key_padding_mask[:, None]
        return is_key, is_query

    def _row_mask(self, of_tokens: Tensor) -> Tensor:
        """A mask of tokens for the queries that stand at their positions."""
        n_q, n_k = self.shape[2:]
        return torch.nn.functional.pad(of_tokens, (max(0, n_q - n_k), 0))[..., -n_q or n_k :]


def _token_parts(pattern: Pattern) -> Iterator[Global | GlobalKeys | GlobalQueries]:
    if isinstance(pattern, (Global, GlobalKeys, GlobalQueries)):
        yield pattern
    elif isinstance(pattern, (Union, Intersection)):
        for part in pattern.parts:
            yield from _token_parts(part)
