"""The blocks that BigBird sees in Hugging Face's models: a multiset, drawn as they draw it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.functional import attention
from sparse_attn.patterns import BlockLayout
from sparse_attn.tables import BlockBias

if TYPE_CHECKING:
    import numpy as np

#: Lengths of the paper's models: they draw for the longest one, among the tokens of the shortest.
_PAPER_LENGTHS = (1024, 3072, 4096)


@dataclasses.dataclass(frozen=True)
class HuggingFaceBlocks:
    """Who sees whom in a BigBird layer of transformers, and how often.

    The first and the last block see all and are seen by all; every other block sees itself, its two
    neighbors and `random_blocks` more. A block that is drawn twice, or that is visible anyway,
    counts as often in the softmax. Training draws from `seed`; in evaluation all drawn blocks are
    block 0.
    """

    block: int
    random_blocks: int
    num_heads: int
    seed: int
    max_length: int

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        training: bool,
    ) -> Tensor:
        """The output of the heads, (batch, heads, length, head_dim)."""
        arguments = dataclasses.astuple(self)
        times = _times(*arguments, query.shape[-2], training, str(query.device))
        logarithms = times.to(torch.promote_types(query.dtype, torch.float32)).clamp(1).log()
        return attention(
            query,
            key,
            value,
            BlockLayout(times > 0, self.block),
            key_padding_mask=key_padding_mask,
            bias=BlockBias(logarithms[None], self.block),
        )

    def drawn(self, length: int, training: bool) -> np.ndarray:
        """(heads or 1, blocks − 2, random_blocks): what all but the first and last block draw.

        Raises:
            ValueError: length is no multiple of the block, or has too few blocks to draw from.
        """
        import numpy as np

        if length % self.block or length < 4 * self.block:
            raise ValueError(
                "sparse_attn: expected a length that is a multiple of the block, "
                f"{self.block}, and at least 4 of them, got {length}"
            )
        blocks = length // self.block
        if not training or self.random_blocks == 0:
            return np.zeros((1, blocks - 2, self.random_blocks), dtype=np.int64)
        # NumPy's global generator, which transformers seeds anew each time, stays as it is.
        generator = np.random.RandomState(self.seed)
        draw = self._draw_for_paper if length in _PAPER_LENGTHS else self._draw_in_parts
        return draw(generator, blocks)

    def _draw_for_paper(self, generator: np.random.RandomState, blocks: int) -> np.ndarray:
        """Among the blocks of the first 1024 tokens, always for max_length tokens."""
        import numpy as np

        rows = self.max_length // self.block
        if rows < blocks:
            raise ValueError(
                f"sparse_attn: expected a length of at most {self.max_length}, got "
                f"{blocks * self.block}"
            )
        last = min(1024 // self.block - 1, rows - 2) if self.block < 512 else rows - 2
        choices = [
            # The last two rows do not leave out what they see anyway.
            [j for j in range(1, last + 1) if abs(i - j) > 1 or (i > 2 and i >= rows - 3)]
            for i in range(1, rows - 1)
        ]
        drawn = np.zeros((self.num_heads, rows - 2, self.random_blocks), dtype=np.int64)
        for head in drawn:
            for row, choice in zip(head, choices, strict=True):
                row[:] = _first(generator.permutation(choice), self.random_blocks)
        return drawn[:, : blocks - 2]

    def _draw_in_parts(self, generator: np.random.RandomState, blocks: int) -> np.ndarray:
        """From each part of the sequence as many blocks as are planned for it."""
        import numpy as np

        parts = list(self._parts(blocks))
        drawn = np.zeros((self.num_heads, blocks, self.random_blocks), dtype=np.int64)
        for rows, _ in parts:
            for source, places in parts:
                for i in rows if places else ():
                    for head in drawn if i else ():
                        order = generator.permutation(source)
                        legal = [j for j in order if _is_legal(i, j, source.stop)]
                        head[i, places] = _first(legal, len(places))
        return drawn[:, 1:-1]

    def _parts(self, blocks: int) -> Iterator[tuple[range, range]]:
        """The blocks of each part, and which of the drawn ones come from it."""
        count = self.random_blocks
        if 2 * count + 5 < blocks:
            edge, first = 2 * count + 5, count
        elif count + 5 < blocks:
            edge, first = count + 5, count // 2
        else:
            edge, first = blocks, count
        yield range(edge), range(first)
        yield range(edge, blocks), range(first, count)


def _is_legal(i: int, j: int, end: int) -> bool:
    """Whether block i may draw j of a part that ends before `end`."""
    seen = {0, end - 1, i - 1, i, i + 1}
    return j not in seen and (i, j) not in {(1, end - 2), (end - 2, 1)}


def _first(legal: Sequence[int], count: int) -> Sequence[int]:
    """As many of them; a single one is repeated."""
    if len(legal) < count and len(legal) != 1:
        raise ValueError(
            f"sparse_attn: expected a longer sequence or smaller blocks, got {len(legal)} blocks "
            f"to draw {count} from"
        )
    return legal[:count]


@functools.lru_cache(maxsize=256)
def _counted(
    blocks: HuggingFaceBlocks, length: int, training: bool, device: torch.device
) -> Tensor:
    import numpy as np

    drawn = blocks.drawn(length, training)
    number = drawn.shape[1] + 2
    places = np.arange(number)
    times = (np.abs(places[:, None] - places) <= 1).astype(np.float32)
    times[[0, -1]] = times[:, [0, -1]] = 1
    times = times[None].repeat(len(drawn), 0)
    heads, rows, _ = np.ogrid[: len(drawn), 1 : number - 1, :1]
    np.add.at(times, (heads, rows, drawn), 1)
    with torch.inference_mode(False):  # kept for calls that need gradients too
        return torch.from_numpy(times).to(device)


@torch.library.custom_op("sparse_attn::_hugging_face_blocks", mutates_args=())
def _times(
    block: int,
    random_blocks: int,
    num_heads: int,
    seed: int,
    max_length: int,
    length: int,
    training: bool,
    device: str,
) -> Tensor:
    """How often each block sees each, (heads or 1, blocks, blocks) float32.

    An op, so that what compilers and exporters trace holds for any length. `torch.jit.trace` knows
    no device among its arguments, but strings.
    """
    blocks = HuggingFaceBlocks(block, random_blocks, num_heads, seed, max_length)
    return _counted(blocks, length, training, torch.device(device)).clone()


@_times.register_fake
def _(block, random_blocks, num_heads, seed, max_length, length, training, device):
    heads = num_heads if training and random_blocks > 0 else 1
    return torch.empty(heads, length // block, length // block, device=device)
