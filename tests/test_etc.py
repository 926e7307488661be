"""ETC's attention against its definition, dense and in one softmax for each side."""

import math

import cases
import pytest
import torch
from cases import normal
from torch.autograd import gradcheck, gradgradcheck

from sparse_attn import ETCSelfAttention, RelativePositionGenerator

BATCH, LENGTH, TOKENS, EMBED, HEADS, RADIUS = 2, 37, 5, 12, 3, 4

# The parts of each side: name, and whether its keys are long.
SIDES = {"long": [("l2l", True), ("l2g", False)], "global": [("g2g", False), ("g2l", True)]}
SHAPES = {
    "l2l": (LENGTH, 2 * RADIUS + 1),
    "l2g": (LENGTH, TOKENS),
    "g2g": (TOKENS, TOKENS),
    "g2l": (TOKENS, LENGTH),
}
SHARES = [
    {},
    {"share_kv_projections": True},
    {"share_qkv_projections": True},
    {"share_att_output_projection": True},
]


def make(**options):
    torch.manual_seed(0)
    layer = ETCSelfAttention(
        EMBED, HEADS, radius=RADIUS, dtype=torch.float64, device=cases.DEVICE, **options
    )
    for parameter in layer.parameters():  # biases and tables that are not 0
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs():
    return normal(BATCH, LENGTH, EMBED), normal(BATCH, TOKENS, EMBED, seed=1)


def masks(batch=BATCH):
    """Among their rows are ones without any key, in one part or in both of a side."""
    drawn = {part: cases.bits(batch, *shape).int() for part, shape in SHAPES.items()}
    drawn["l2l"][:, 3:6] = 0
    drawn["l2g"][:, 5:8] = 0
    drawn["g2g"][:, 0] = drawn["g2l"][:, 0] = drawn["g2l"][:, 1] = 0
    return {f"{part}_mask": mask for part, mask in drawn.items()}


def ids(below, batch=BATCH):
    return {
        f"{part}_ids": cases.numbers(batch, *shape, below=below) for part, shape in SHAPES.items()
    }


def spread(slots, radius, length):
    """(B, L, 2r + 1) by slot to (B, L, L) by key, −1 outside the window."""
    table = slots.new_full((slots.shape[0], length, length), -1)
    for i in range(length):
        for j in range(max(0, i - radius), min(length, i + radius + 1)):
            table[:, i, j] = slots[:, i, j - i + radius]
    return table


def dense(layer, x_long, x_global, given):
    """The definition: for each side the logits of both parts side by side, one softmax."""
    dim = EMBED // HEADS

    def heads(x):
        return x.view(*x.shape[:2], HEADS, dim)

    outputs = []
    for side, parts in SIDES.items():
        x = x_long if side == "long" else x_global
        query = heads(getattr(layer, f"{side}_query")(x))
        logits, values = [], []
        for part, of_long in parts:
            source = x_long if of_long else x_global
            key = heads(getattr(layer, f"{part}_key")(source))
            values.append(heads(getattr(layer, f"{part}_value")(source)))
            score = torch.einsum("bihd,bjhd->bhij", query, key)
            mask, index = given.get(f"{part}_mask"), given.get(f"{part}_ids")
            if part == "l2l":
                inside = torch.ones(1, *SHAPES["l2l"], dtype=torch.long, device=x.device)
                mask = spread(inside if mask is None else mask, RADIUS, LENGTH) == 1
                index = None if index is None else spread(index, RADIUS, LENGTH).clamp(min=0)
            if index is not None:
                embeddings = getattr(layer, f"{side}_relative_emb_table")[index]
                biases = getattr(layer, f"{side}_relative_bias_table")[index]
                score = score + torch.einsum(
                    "bihd,bijhd->bhij", query, embeddings.expand(len(x), -1, -1, -1, -1)
                )
                score = score + biases.permute(0, 3, 1, 2)
            score = score / math.sqrt(dim)
            if mask is not None:
                score = score.masked_fill(mask[:, None] == 0, -math.inf)
            logits.append(score)
        logits = torch.cat(logits, -1)
        empty = logits.isinf().all(-1, keepdim=True)
        weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        joined = torch.einsum("bhij,bjhd->bihd", weights, torch.cat(values, 1))
        outputs.append(getattr(layer, f"{side}_output")(joined.flatten(2)))
    return outputs


def assert_is_the_definition(layer, given, expected=None):
    xs = [x.requires_grad_() for x in inputs()]
    leaves = [*xs, *layer.parameters()]
    weights = normal(BATCH, LENGTH, EMBED, seed=2), normal(BATCH, TOKENS, EMBED, seed=3)
    results = []
    for outputs in (
        layer(*xs, **given),
        dense(layer, *xs, given if expected is None else expected),
    ):
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([*outputs, *gradients])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_four_parts(share):
    assert_is_the_definition(make(**share), {})


@pytest.mark.parametrize("batch", [BATCH, 1])
def test_masks(batch):
    assert_is_the_definition(make(), masks(batch))


@pytest.mark.parametrize("batch", [BATCH, 1])
def test_relative_ids(batch):
    assert_is_the_definition(make(relative_vocab_size=6), ids(6, batch))


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_relative_ids_and_masks(share):
    assert_is_the_definition(make(relative_vocab_size=6, **share), ids(6) | masks())


@pytest.mark.parametrize("part", SHAPES)
def test_ids_of_one_part(part):
    name = f"{part}_ids"
    assert_is_the_definition(make(relative_vocab_size=6), {name: ids(6)[name]})


def test_ids_by_distance():
    positions = RelativePositionGenerator(3)
    expected = {
        "l2l_ids": positions.make_local_relative_att_ids(LENGTH, RADIUS, cases.DEVICE),
        "g2g_ids": positions.make_relative_att_ids(TOKENS, cases.DEVICE),
    }
    layer = make(max_distance=3)
    assert layer.relative_vocab_size == 7
    assert_is_the_definition(layer, {}, expected)
    own = ids(7)
    wider = make(max_distance=3, relative_vocab_size=9)
    given = {"g2l_ids": own["g2l_ids"], "g2g_ids": own["g2g_ids"]}
    assert_is_the_definition(wider, given, expected | given)


def test_ids_of_positions():
    positions = RelativePositionGenerator(2)
    assert (
        positions.make_local_relative_att_ids(3, 4)[0].tolist() == [[4, 4, 4, 3, 0, 1, 2, 2, 2]] * 3
    )
    assert positions.make_relative_att_ids(4)[0].tolist() == [
        [0, 1, 2, 2],
        [3, 0, 1, 2],
        [4, 3, 0, 1],
        [4, 4, 3, 0],
    ]
    assert positions.relative_vocab_size == 5
    distance = RelativePositionGenerator(2, ignore_direction=True)
    assert distance.make_relative_att_ids(4)[0, 3].tolist() == [2, 2, 1, 0]
    assert distance.relative_vocab_size == 3
    assert RelativePositionGenerator(0).make_relative_att_ids(2).eq(0).all()


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradcheck(check):
    layer = ETCSelfAttention(
        4, 2, radius=1, max_distance=1, dtype=torch.float64, device=cases.DEVICE
    )
    mask = cases.bits(1, 6, 3).int()
    assert check(
        lambda *xs: layer(*xs, l2l_mask=mask),
        [x.requires_grad_() for x in (normal(1, 6, 4), normal(1, 2, 4, seed=1))],
    )


def test_projections_are_shared():
    def count(**share):
        return sum(p.numel() for p in make(**share).parameters()) // (EMBED * (EMBED + 1))

    assert [count(**share) for share in SHARES] == [12, 8, 5, 11]


def test_compiles():
    """For any length, once a second one has been seen."""
    layer, xs = make(max_distance=3), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length, stance in ((37, "default"), (30, "default"), (21, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            ours = compiled(xs[0][:, :length], xs[1])
        for output, expected in zip(ours, layer(xs[0][:, :length], xs[1]), strict=True):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    layer, given = make(relative_vocab_size=6), ids(6) | masks()
    xs = [x.to(dtype) for x in inputs()]
    exact = layer(*(x.double() for x in xs), **given)
    for output, expected in zip(layer.to(dtype)(*xs, **given), exact, strict=True):
        assert output.dtype == dtype
        size = expected.abs().max().item()
        torch.testing.assert_close(
            output.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps * size
        )


def test_dropout():
    """In training alone; with probability 1 nothing but the output's bias is left."""
    layer, xs = make(dropout=1.0), inputs()
    for output, exact in zip(layer.eval()(*xs), dense(layer, *xs, {}), strict=True):
        torch.testing.assert_close(output, exact, rtol=0, atol=1e-11)
    long, of_global = layer.train()(*xs)
    torch.testing.assert_close(long, layer.long_output.bias.expand_as(long))
    torch.testing.assert_close(of_global, layer.global_output.bias.expand_as(of_global))


def test_errors():
    layer, xs = make(relative_vocab_size=6), inputs()
    for name, given, error, words in [
        (
            "l2l_mask",
            cases.bits(BATCH, LENGTH, LENGTH),
            ValueError,
            r"l2l_mask of shape \(2, 37, 9",
        ),
        ("l2g_mask", normal(BATCH, LENGTH, TOKENS), TypeError, "l2g_mask to be a Tensor of ints"),
        ("g2g_ids", cases.bits(TOKENS, TOKENS), ValueError, "g2g_ids of shape"),
        ("g2l_ids", cases.numbers(BATCH, TOKENS, LENGTH, below=7) + 3, ValueError, r"in \[0, 6\)"),
        ("g2g_mask", -masks()["g2g_mask"], ValueError, r"g2g_mask in \[0, 2\)"),
    ]:
        with pytest.raises(error, match=words):
            layer(*xs, **{name: given})
    with pytest.raises(ValueError, match="no l2l_ids in a layer without"):
        make()(*xs, l2l_ids=ids(6)["l2l_ids"])
    with pytest.raises(ValueError, match="x_global of shape"):
        layer(xs[0], xs[1][0])
    with pytest.raises(ValueError, match="x_global of batch 2, as x_long, got 1"):
        layer(xs[0], xs[1][:1])
    for options, error in [
        ({"radius": -1}, ValueError),
        ({"max_distance": 1.5}, TypeError),
        ({"max_distance": 4, "relative_vocab_size": 8}, ValueError),
        ({"relative_vocab_size": 0}, ValueError),
        ({"dropout": 2}, ValueError),
    ]:
        with pytest.raises(error, match="sparse_attn: expected"):
            ETCSelfAttention(EMBED, HEADS, **{"radius": 1} | options)
