"""ETC's attention over a long and a global sequence (Ainslie et al. 2020, sections 3.1 and 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_attn.functional import attention
from sparse_attn.functional._common import check_dtype, check_flag
from sparse_attn.merging import merge
from sparse_attn.nn._checks import check_dropout, check_heads, check_sequence
from sparse_attn.patterns import Full, Pattern, Window
from sparse_attn.patterns.arguments import index
from sparse_attn.tables import SlotBias

_PARTS = ("l2l", "l2g", "g2g", "g2l")


class RelativePositionGenerator:
    """Ids of relative positions, by direction and clipped distance (Shaw et al. 2018, section 3.2).

    0 is the token itself, 1 … m are those at 1 … m and more on the right, m + 1 … 2m those on the
    left. With `ignore_direction` the left ones have the ids of the right ones.

    Args:
        max_distance: m, at least 0: tokens further away share one id.
        ignore_direction: Whether the ids are those of the distance alone.

    Raises:
        TypeError: max_distance is no int.
        ValueError: max_distance is negative.

    >>> RelativePositionGenerator(2).ids(torch.arange(-3, 4))
    tensor([4, 4, 3, 0, 1, 2, 2])
    >>> RelativePositionGenerator(2).relative_vocab_size
    5
    """

    def __init__(self, max_distance: int, ignore_direction: bool = False) -> None:
        self.max_distance = index("max_distance", max_distance, 0)
        self.ignore_direction = ignore_direction

    @property
    def relative_vocab_size(self) -> int:
        """2m + 1, or m + 1 without directions."""
        return (1 if self.ignore_direction else 2) * self.max_distance + 1

    def ids(self, distance: Tensor) -> Tensor:
        """The ids of distances.

        Args:
            distance: Key − query, ints of any shape.

        Returns:
            As distance.
        """
        clipped = distance.abs().clamp(max=self.max_distance)
        if self.ignore_direction:
            return clipped
        return torch.where(distance < 0, clipped + self.max_distance, clipped)

    def make_local_relative_att_ids(
        self, seq_len: int, local_radius: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Ids of the slots of a window, (1, seq_len, 2 · local_radius + 1), centered.

        >>> RelativePositionGenerator(1).make_local_relative_att_ids(1, 2).tolist()
        [[[2, 2, 0, 1, 1]]]
        """
        ids = self.ids(torch.arange(-local_radius, local_radius + 1, device=device))
        return ids.expand(1, seq_len, -1)

    def make_relative_att_ids(
        self, seq_len: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Ids of all pairs, (1, seq_len, seq_len).

        >>> RelativePositionGenerator(1).make_relative_att_ids(2).tolist()
        [[[0, 1], [2, 0]]]
        """
        position = torch.arange(seq_len, device=device)
        return self.ids(position - position[:, None])[None]


class ETCSelfAttention(nn.Module):
    """Attention of two sequences, a long and a global one, to themselves and each other.

    Long tokens see the long ones within `radius` (l2l) and all global ones (l2g) in one softmax;
    global tokens see all global (g2g) and all long ones (g2l) in another. Logits are
    (q · k + q · E[id] + b[id]) / √d, with the tables E and b of relative positions; long and
    global queries have tables of their own. Memory is O(long · (2 · radius + 1 + global)).

    Args:
        embed_dim: Channels of both sequences.
        num_heads: Number of heads; divides embed_dim.
        radius: Long tokens seen on each side, at least 0.
        relative_vocab_size: Number of ids of relative positions; without it and max_distance there
            are none.
        max_distance: Makes ids for l2l and g2g where none are given, those of
            `RelativePositionGenerator(max_distance)`; relative_vocab_size, if None, is theirs.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        share_kv_projections: l2l and l2g share keys' and values' projections, and so do g2g and
            g2l.
        share_qkv_projections: All four parts share the projections of query, key and value.
        share_att_output_projection: Long and global output share the projection.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: embed_dim is not a multiple of num_heads, or another argument is out of range.

    >>> layer = ETCSelfAttention(64, 4, radius=16, max_distance=12)
    >>> long, globals = layer(torch.randn(2, 100, 64), torch.randn(2, 8, 64))
    >>> long.shape, globals.shape
    (torch.Size([2, 100, 64]), torch.Size([2, 8, 64]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        radius: int,
        relative_vocab_size: int | None = None,
        max_distance: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        share_kv_projections: bool = False,
        share_qkv_projections: bool = False,
        share_att_output_projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_dropout(dropout)
        flags = {
            "bias": bias,
            "share_kv_projections": share_kv_projections,
            "share_qkv_projections": share_qkv_projections,
            "share_att_output_projection": share_att_output_projection,
        }
        for name, flag in flags.items():
            check_flag(name, flag)
        check_dtype(dtype)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.radius = index("radius", radius, 0)
        self.dropout = dropout
        self.positions = None if max_distance is None else RelativePositionGenerator(max_distance)
        self.relative_vocab_size = self._vocab_size(relative_vocab_size)

        def linear() -> nn.Linear:
            return nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

        self.long_query = linear()
        self.global_query = self.long_query if share_qkv_projections else linear()
        for name in ("key", "value"):
            of_part = {"l2l": linear()}
            shared = share_kv_projections or share_qkv_projections
            of_part["l2g"] = of_part["l2l"] if shared else linear()
            of_part["g2g"] = of_part["l2l"] if share_qkv_projections else linear()
            of_part["g2l"] = of_part["g2g"] if shared else linear()
            for part, projection in of_part.items():
                self.add_module(f"{part}_{name}", projection)
        self.long_output = linear()
        self.global_output = self.long_output if share_att_output_projection else linear()
        for side in ("long", "global"):
            self._add_relative_tables(side, device, dtype)

    def forward(
        self,
        x_long: Tensor,
        x_global: Tensor,
        *,
        l2l_mask: Tensor | None = None,
        l2g_mask: Tensor | None = None,
        g2g_mask: Tensor | None = None,
        g2l_mask: Tensor | None = None,
        l2l_ids: Tensor | None = None,
        l2g_ids: Tensor | None = None,
        g2g_ids: Tensor | None = None,
        g2l_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Masks are int or bool, 1 = allowed, 0 = excluded; None = all allowed. Ids are int64 or
        int32 in [0, relative_vocab_size); None = by distance for l2l and g2g if the layer has a
        max_distance, else no relative term.

        Args:
            x_long: (batch, length, embed_dim).
            x_global: (batch, globals, embed_dim).
            l2l_mask: (batch or 1, length, 2 · radius + 1): slot m is the token at m − radius.
            l2g_mask: (batch or 1, length, globals).
            g2g_mask: (batch or 1, globals, globals).
            g2l_mask: (batch or 1, globals, length).
            l2l_ids: As l2l_mask.
            l2g_ids: As l2g_mask.
            g2g_ids: As g2g_mask.
            g2l_ids: As g2l_mask.

        Returns:
            The long output (batch, length, embed_dim) and the global one (batch, globals,
            embed_dim). A query that sees no key gets the bias of the output projection.

        Raises:
            TypeError: A mask or ids are no ints.
            ValueError: A shape does not fit, or ids are given to a layer without relative
                positions.
        """
        check_sequence("x_long", x_long, self.embed_dim)
        check_sequence("x_global", x_global, self.embed_dim)
        if x_global.shape[0] != x_long.shape[0]:
            raise ValueError(
                f"sparse_attn: expected x_global of batch {x_long.shape[0]}, as x_long, got "
                f"{x_global.shape[0]}"
            )
        length, tokens = x_long.shape[1], x_global.shape[1]
        shapes = {
            "l2l": (length, 2 * self.radius + 1),
            "l2g": (length, tokens),
            "g2g": (tokens, tokens),
            "g2l": (tokens, length),
        }
        masks = dict(zip(_PARTS, (l2l_mask, l2g_mask, g2g_mask, g2l_mask), strict=True))
        ids = dict(zip(_PARTS, (l2l_ids, l2g_ids, g2g_ids, g2l_ids), strict=True))
        for part, shape in shapes.items():
            batched = (x_long.shape[0], *shape)
            _check_ints(f"{part}_mask", masks[part], batched, 2)
            if ids[part] is not None and self.relative_vocab_size is None:
                raise ValueError(
                    f"sparse_attn: expected no {part}_ids in a layer without relative_vocab_size "
                    "or max_distance"
                )
            _check_ints(f"{part}_ids", ids[part], batched, self.relative_vocab_size)
        if self.positions is not None:
            if l2l_ids is None:
                ids["l2l"] = self.positions.make_local_relative_att_ids(
                    length, self.radius, x_long.device
                )
            if g2g_ids is None:
                ids["g2g"] = self.positions.make_relative_att_ids(tokens, x_long.device)

        def of_side(side: str, x: Tensor, *parts: tuple[str, Tensor]) -> Tensor:
            query = self._split(getattr(self, f"{side}_query")(x))
            relative = self._relative(side, query)
            states = [
                self._attend(part, query, keys, relative, ids[part], masks[part])
                for part, keys in parts
            ]
            heads, _ = merge(*states[0], *states[1])
            return getattr(self, f"{side}_output")(heads.transpose(1, 2).flatten(2))

        return (
            of_side("long", x_long, ("l2l", x_long), ("l2g", x_global)),
            of_side("global", x_global, ("g2g", x_global), ("g2l", x_long)),
        )

    def extra_repr(self) -> str:
        """The sizes, in `print(module)`."""
        return (
            f"{self.embed_dim}, {self.num_heads}, radius={self.radius}, "
            f"relative_vocab_size={self.relative_vocab_size}"
        )

    def _attend(
        self,
        part: str,
        query: Tensor,
        keys: Tensor,
        relative: Tensor | None,
        ids: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of one of the four parts."""
        table = _bias(relative, ids, mask, query)
        pattern: Pattern = Full()
        if part == "l2l":
            pattern = Window(self.radius)
            table = None if table is None else SlotBias(table)
        return attention(
            query,
            self._split(getattr(self, f"{part}_key")(keys)),
            self._split(getattr(self, f"{part}_value")(keys)),
            pattern,
            bias=table,
            dropout_p=self.dropout if self.training else 0.0,
            return_lse=True,
        )

    def _relative(self, side: str, query: Tensor) -> Tensor | None:
        """(batch, heads, n_q, ids): what each id adds to the logits of each query."""
        if self.relative_vocab_size is None:
            return None
        embeddings = getattr(self, f"{side}_relative_emb_table")
        biases = getattr(self, f"{side}_relative_bias_table")
        scores = query @ embeddings.permute(1, 2, 0) + biases.T[:, None]
        return scores / math.sqrt(query.shape[-1])

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, embed_dim) to (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _add_relative_tables(self, side: str, device, dtype) -> None:
        if self.relative_vocab_size is None:
            return
        sizes = self.relative_vocab_size, self.num_heads, self.embed_dim // self.num_heads
        embeddings = torch.empty(*sizes, device=device, dtype=dtype)
        biases = torch.zeros(*sizes[:2], device=device, dtype=dtype)
        nn.init.normal_(embeddings, std=0.02)
        self.register_parameter(f"{side}_relative_emb_table", nn.Parameter(embeddings))
        self.register_parameter(f"{side}_relative_bias_table", nn.Parameter(biases))

    def _vocab_size(self, given: int | None) -> int | None:
        least = 1 if self.positions is None else self.positions.relative_vocab_size
        if given is None:
            return None if self.positions is None else least
        return index("relative_vocab_size", given, least)


def _bias(
    relative: Tensor | None, ids: Tensor | None, mask: Tensor | None, query: Tensor
) -> Tensor | None:
    """(batch or 1, heads, n_q, slots or keys): the relative term, −inf where the mask excludes."""
    table = None
    if ids is not None:
        table = relative.gather(-1, ids.long()[:, None].expand(*relative.shape[:3], -1))
    if mask is not None:
        if table is None:
            table = query.new_zeros(()).expand(mask.shape[0], query.shape[1], *mask.shape[1:])
        table = table.masked_fill(mask[:, None] == 0, -math.inf)
    return table


def _check_ints(name: str, given: Tensor | None, shape: tuple[int, ...], below: int) -> None:
    """A mask, or ids, of ints in [0, below)."""
    if given is None:
        return
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"sparse_attn: expected {name} to be a Tensor of ints, got {got}")
    if given.dim() != 3 or given.shape[0] not in (1, shape[0]) or given.shape[1:] != shape[1:]:
        raise ValueError(
            f"sparse_attn: expected {name} of shape {shape}, the batch maybe 1, got "
            f"{tuple(given.shape)}"
        )
    # Elsewhere it would wait for the device; there, gather checks.
    here = given.device.type == "cpu" and not torch.compiler.is_compiling()
    if here and ((given < 0) | (given >= below)).any():
        raise ValueError(f"sparse_attn: expected {name} in [0, {below})")
