"""`Pattern.from_deepspeed`: exactly the blocks of DeepSpeed's layouts."""

from types import SimpleNamespace

import cases
import deepspeed_layouts as deepspeed
import numpy as np
import pytest
import reference
import torch
from cases import DEVICE, Shape
from test_errors import refuses

from sparse_attn import Causal, Full, Pattern, Window, attention

HEADS = 4
CONFIGS = {
    "dense": deepspeed.DenseSparsityConfig(num_heads=HEADS),
    "fixed": deepspeed.FixedSparsityConfig(num_heads=HEADS, block=8),
    "fixed_one_way": deepspeed.FixedSparsityConfig(
        num_heads=HEADS, block=8, num_local_blocks=4, attention="unidirectional"
    ),
    "fixed_horizontal": deepspeed.FixedSparsityConfig(
        num_heads=HEADS,
        num_local_blocks=3,
        horizontal_global_attention=True,
    ),
    "fixed_per_head": deepspeed.FixedSparsityConfig(
        num_heads=HEADS,
        block=7,
        different_layout_per_head=True,
        num_local_blocks=8,
        num_global_blocks=2,
        num_different_global_patterns=4,
        attention="unidirectional",
    ),
    "variable": deepspeed.VariableSparsityConfig(
        num_heads=HEADS,
        block=5,
        num_random_blocks=2,
        local_window_blocks=[1, 4, 2],
        global_block_indices=[0, 5],
        global_block_end_indices=[1, 7],
    ),
    "variable_one_way": deepspeed.VariableSparsityConfig(
        num_heads=HEADS,
        different_layout_per_head=True,
        num_random_blocks=1,
        local_window_blocks=[2],
        global_block_indices=[0, 3],
        attention="unidirectional",
    ),
    "variable_horizontal": deepspeed.VariableSparsityConfig(
        num_heads=HEADS, horizontal_global_attention=True
    ),
    "bigbird": deepspeed.BigBirdSparsityConfig(num_heads=HEADS, different_layout_per_head=True),
    "bigbird_one_way": deepspeed.BigBirdSparsityConfig(
        num_heads=HEADS, block=6, num_random_blocks=3, attention="unidirectional"
    ),
    "longformer": deepspeed.BSLongformerSparsityConfig(num_heads=HEADS, block=32),
    "longformer_spans": deepspeed.BSLongformerSparsityConfig(
        num_heads=HEADS,
        block=4,
        num_sliding_window_blocks=5,
        global_block_indices=[0, 8],
        global_block_end_indices=[2, 9],
        attention="unidirectional",
    ),
    "window": deepspeed.LocalSlidingWindowSparsityConfig(num_heads=HEADS, block=9),
    "window_both_ways": deepspeed.LocalSlidingWindowSparsityConfig(
        num_heads=HEADS, num_sliding_window_blocks=4, attention="bidirectional"
    ),
}


# Fixed, segments of 3 blocks, 8 blocks; the second of two patterns takes the block before the last.
DRAWN = {
    "bidirectional": (
        ["xxx..x.x", "xxx..x.x", "xxx..x.x", "..xxxx.x", "..xxxx.x", "..xxxx.x", "..x..xxx"],
        ["xxx.x..x", "xxx.x..x", "xxx.x..x", ".x.xxx.x", ".x.xxx.x", ".x.xxx.x", ".x..x.xx"],
    ),
    "unidirectional": (
        ["x.......", "xx......", "xxx.....", "..xx....", "..xxx...", "..xxxx..", "..x..xx."],
        ["x.......", "xx......", "xxx.....", ".x.x....", ".x.xx...", ".x.xxx..", ".x..x.x."],
    ),
}


@pytest.mark.parametrize("direction", DRAWN)
def test_the_fixed_layout_as_drawn_by_hand(direction):
    config = deepspeed.FixedSparsityConfig(
        num_heads=2,
        block=16,
        different_layout_per_head=True,
        num_local_blocks=3,
        num_different_global_patterns=2,
        attention=direction,
    )
    layout = config.make_layout(8 * 16).bool().tolist()
    for head, rows in zip(layout, DRAWN[direction], strict=True):
        drawn = [[letter == "x" for letter in row] for row in rows]
        assert head[: len(drawn)] == drawn


class Recorder:
    """A configuration that remembers its layouts: those with random blocks differ each time."""

    def __init__(self, name: str):
        self.config, self.made = CONFIGS[name], {}
        self.block, self.num_heads = self.config.block, HEADS

    def make_layout(self, seq_len: int) -> torch.Tensor:
        assert seq_len not in self.made
        self.made[seq_len] = self.config.make_layout(seq_len).to(DEVICE)
        return self.made[seq_len]

    def mask(self, n: int) -> torch.Tensor:
        """The layout of the next multiple of the block, in tokens, cropped."""
        layout = self.made[-(-n // self.block) * self.block]
        tokens = np.kron(layout.cpu().numpy(), np.ones((self.block, self.block))) != 0
        return torch.from_numpy(tokens[:, :n, :n])


@pytest.mark.parametrize("name", CONFIGS)
def test_mask_is_the_layout(name):
    recorder = Recorder(name)
    pattern = Pattern.from_deepspeed(recorder)
    assert pattern.heads == HEADS
    for n in (1, 16, 64, 150, 257):
        mask = pattern.mask(n, heads=HEADS)
        assert torch.equal(mask, recorder.mask(n))
        assert torch.equal(mask, pattern.mask(n, heads=HEADS))
        assert pattern.cost(n).pairs == mask.sum()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_dense_attention_under_the_layout(name, causal):
    n, recorder = 150, Recorder(name)
    pattern = Pattern.from_deepspeed(recorder)
    pattern = pattern & Causal() if causal else pattern
    assert pattern.causal is causal

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        return attention(query, key, value, pattern, return_lse=True)

    tensors = cases.inputs(Shape(n_q=n, head_dim=16))
    ours(*tensors)
    allowed = recorder.mask(n)[None].to(DEVICE)
    reference.check(ours, tensors, allowed.tril() if causal else allowed)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (1, 3, 3), (HEADS, 3, 3)])
def test_a_layout_itself(size, dtype):
    layout = (5 * cases.bits(*size)).to(dtype)
    pattern = Pattern.from_deepspeed(SimpleNamespace(block=16, layout=layout))
    expected = (layout != 0).repeat_interleave(16, -2).repeat_interleave(16, -1)
    expected = expected[..., :40, :40].expand(HEADS, 40, 40)
    assert torch.equal(pattern.mask(40, heads=HEADS), expected.cpu())


def test_it_joins_other_patterns():
    pattern = Pattern.from_deepspeed(CONFIGS["window"])
    assert torch.equal((pattern | Full()).mask(50, heads=HEADS), Full().mask(50, heads=HEADS))
    near = (pattern & Window(2)).mask(50, heads=HEADS)
    assert torch.equal(near, pattern.mask(50, heads=HEADS) & Window(2).mask(50))


WRONG = {
    "nothing": (object(), TypeError, ["config", "object"]),
    "no block": (SimpleNamespace(layout=torch.ones(2, 2)), TypeError, ["block"]),
    "neither": (SimpleNamespace(block=16), TypeError, ["make_layout", "layout"]),
    "block of text": (SimpleNamespace(block="16", layout=torch.ones(2, 2)), TypeError, ["block"]),
    "block 0": (SimpleNamespace(block=0, layout=torch.ones(2, 2)), ValueError, ["block", "0"]),
    "rank 1": (SimpleNamespace(block=16, layout=torch.ones(2)), ValueError, ["layout", "[2]"]),
    "rank 5": (
        SimpleNamespace(block=16, layout=torch.ones(1, 1, 1, 2, 2)),
        ValueError,
        ["layout", "[1, 1, 1, 2, 2]"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_configurations_that_are_none(name):
    config, exception, words = WRONG[name]
    refuses(
        lambda: Pattern.from_deepspeed(config), exception, ["sparse_attn: expected", "got", *words]
    )


def test_layouts_that_do_not_fit():
    fixed = Pattern.from_deepspeed(SimpleNamespace(block=16, layout=torch.ones(2, 2)))
    refuses(lambda: fixed.mask(40), ValueError, ["layout", "[2, 2]"])
    made = Pattern.from_deepspeed(CONFIGS["dense"])
    refuses(lambda: made.mask(40, 50, heads=HEADS), ValueError, ["40", "50"])
    short = SimpleNamespace(block=16, make_layout=lambda seq_len: torch.ones(1, 1))
    refuses(lambda: Pattern.from_deepspeed(short).mask(40), ValueError, ["layout", "[1, 1]"])
