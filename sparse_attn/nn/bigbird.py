"""BigBird's attention layer (Zaheer et al. 2020, section 2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn.nn._checks import check_heads, check_sequence, through
from sparse_attn.nn._hugging_face_blocks import HuggingFaceBlocks
from sparse_attn.nn.sparse_self_attention import SparseSelfAttention
from sparse_attn.patterns import BigBird, PerHead
from sparse_attn.patterns.arguments import index, wrap_seed


class BigBirdSelfAttention(SparseSelfAttention):
    """Multi-head attention of blocks of tokens to the blocks around them, to random ones, and to
    the first and last ones, which see everything, with projections of query, key, value and output.

    Each head has random blocks of its own: head h is `BigBird(…, seed=seed · num_heads + h)`, so
    layers with the seeds 0, 1, 2, … all differ. They are the same in training and evaluation, and
    a block that is drawn although the window or the global blocks hold it counts once. Any length
    goes.

    With `compat="huggingface"` the layer gives the numbers of BigBirdBlockSparseAttention in
    transformers, with the same query, key and value, for weights that were trained there:

    * Random blocks are drawn in training only, by its rules and with its numbers, from `seed`,
      which is the index of the layer there. In evaluation all of them are block 0.
    * A block that is drawn twice, or that the window or the global blocks hold, counts as often in
      the softmax.
    * Padded queries give 0, before the output projection, and there is no attention dropout.
    * The length is a multiple of the block. NumPy's global generator, which transformers seeds at
      each training step, is left alone.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        block: Tokens of a block.
        random_blocks: Random blocks of keys for each block of queries and head.
        window_blocks: Blocks of the window: ⌊window_blocks / 2⌋ on each side, and the block itself.
        global_blocks: Blocks at each end of the sequence that are global.
        seed: Another int gives other random blocks.
        compat: None, or "huggingface".
        max_length: With `compat="huggingface"`, the `max_position_embeddings` of the model, on
            which the draw for 1024, 3072 and 4096 tokens depends.
        dropout: Dropout of the attention probabilities in training.
        bias: Whether the projections have biases.
        causal: Intersect the pattern with `Causal()`.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: embed_dim is not a multiple of num_heads, an argument is out of range, or
            `compat="huggingface"` meets what transformers does not have: other windows, other
            global blocks, dropout, causal.

    >>> layer = BigBirdSelfAttention(64, 4, block=16)
    >>> layer(torch.randn(2, 300, 64)).shape
    torch.Size([2, 300, 64])
    >>> layer.pattern.mask(300, heads=4).float().mean().item() < 0.6
    True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        block: int,
        random_blocks: int = 3,
        window_blocks: int = 3,
        global_blocks: int = 1,
        seed: int = 0,
        compat: str | None = None,
        max_length: int = 4096,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_heads(embed_dim, num_heads)
        max_length = index("max_length", max_length, 1)
        whole = BigBird(block, random_blocks, window_blocks, global_blocks, seed)
        super().__init__(
            embed_dim,
            num_heads,
            pattern=PerHead([_of_head(whole, head, num_heads) for head in range(num_heads)]),
            dropout=dropout,
            bias=bias,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        self.compat = compat
        if compat is None:
            return
        if compat != "huggingface":
            raise ValueError(
                f'sparse_attn: expected compat to be None or "huggingface", got {compat!r}'
            )
        fixed = (("window_blocks", window_blocks, 3), ("global_blocks", global_blocks, 1))
        for name, given, theirs in (*fixed, ("dropout", dropout, 0), ("causal", causal, False)):
            if given != theirs:
                raise ValueError(
                    f'sparse_attn: expected {name}={theirs} with compat="huggingface", got {given}'
                )
        self.pattern = None
        self.blocks = HuggingFaceBlocks(
            whole.block,
            whole.random_blocks,
            num_heads,
            index("seed", seed, 0, 2**32 - 1),
            max_length,
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, length, embed_dim).
            key_padding_mask: (batch, length) bool, True = ignore this key.

        Returns:
            (batch, length, embed_dim). A query that sees no key gets the bias of the output
            projection.

        Raises:
            TypeError: An argument has the wrong type or dtype.
            ValueError: A shape does not fit; with `compat="huggingface"`, the length is no multiple
                of the block, or too short to draw from.
        """
        check_sequence("x", x, self.embed_dim)
        if self.compat is None:
            return super().forward(x, key_padding_mask=key_padding_mask)
        projections = (self.query, self.key, self.value)
        query, key, value = (self._split(through(project, "x", x)) for project in projections)
        heads = self.blocks.attend(query, key, value, key_padding_mask, self.training)
        if key_padding_mask is not None:
            heads = heads.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        return self.output(heads.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The pattern, in `print(module)`."""
        what = self.pattern if self.compat is None else self.blocks
        return f"{self.embed_dim}, {self.num_heads}, {what}"


def _of_head(whole: BigBird, head: int, num_heads: int) -> BigBird:
    return replace(whole, seed=wrap_seed(whole.seed * num_heads + head))
