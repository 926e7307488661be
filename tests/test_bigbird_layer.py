"""`BigBirdSelfAttention` against its dense definition, and against transformers' layer."""

import copy
import pickle

import cases
import numpy as np
import pytest
import torch
from cases import DEVICE
from torch import Tensor

from sparse_attn import BigBirdSelfAttention, Causal
from sparse_attn.nn._hugging_face_blocks import HuggingFaceBlocks

EMBED, HEADS, BLOCK = 32, 4, 4


def stream(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return cases.normal(batch, n, EMBED, seed=seed, dtype=dtype)


def make(*, dtype: torch.dtype = torch.float64, **options) -> BigBirdSelfAttention:
    torch.manual_seed(0)
    options = {"block": BLOCK, **options}
    return BigBirdSelfAttention(EMBED, HEADS, device=DEVICE, dtype=dtype, **options)


def padding(lengths: list[int], n: int) -> Tensor:
    return torch.arange(n, device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]


def project(layer: BigBirdSelfAttention, x: Tensor) -> list[Tensor]:
    projections = (layer.query, layer.key, layer.value)
    return [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in projections]


def dense(layer: BigBirdSelfAttention, x: Tensor, times: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over keys that count `times`, (heads, n, n); 0 for a query that sees none."""
    query, key, value = project(layer, x)
    times = times.to(x).expand(len(x), -1, -1, -1)
    if mask is not None:
        times = times * ~mask[:, None, None, :]
    logits = query @ key.mT / query.shape[-1] ** 0.5
    weights = times * logits.exp()
    heads = weights / weights.sum(-1, keepdim=True).clamp(1e-30) @ value
    if mask is not None and layer.compat is not None:
        heads = heads * ~mask[:, None, :, None]
    return layer.output(heads.transpose(1, 2).flatten(2))


def times_of(drawn: Tensor, n: int) -> Tensor:
    """transformers' multiset of blocks, written out: (heads, n, n)."""
    blocks = n // BLOCK
    times = torch.zeros(HEADS, blocks, blocks)
    for head in range(HEADS):
        for i in range(blocks):
            if i in (0, blocks - 1):
                seen = list(range(blocks))
            else:
                fixed = {0, i - 1, i, i + 1, blocks - 1}
                seen = [*fixed, *drawn[head % len(drawn), i - 1].tolist()]
            for j in seen:
                times[head, i, j] += 1
    return times.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).to(DEVICE)


def assert_same(layer: BigBirdSelfAttention, x: Tensor, calls) -> None:
    """The calls agree in the output and in the gradients of x and of all parameters."""
    results = []
    for call in calls:
        leaf = x.clone().requires_grad_()
        output = call(leaf)
        wanted = [leaf, *layer.parameters()]
        results.append((output, *torch.autograd.grad(output, wanted, stream(*x.shape[:2], seed=1))))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("n", [1, 3, 16, 67])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_dense_definition(n, causal, masked):
    sizes = {"random_blocks": 2, "window_blocks": 5, "global_blocks": 2}
    layer = make(seed=7, causal=causal, **sizes)
    expressions = [
        f"BigBird({BLOCK}, 2, 5, 2, seed={7 * HEADS + head}) {'& Causal()' if causal else ''}"
        for head in range(HEADS)
    ]
    allowed = torch.stack([cases.mask(one, n, heads=1)[0] for one in expressions]).to(DEVICE)
    mask = padding([n, n // 2, 0], n) if masked else None
    calls = [lambda x: layer(x, mask), lambda x: dense(layer, x, allowed, mask)]
    assert_same(layer, stream(3, n), calls)


def test_heads_and_layers_differ():
    masks = [make(seed=seed).pattern.mask(200, heads=HEADS) for seed in range(3)]
    heads = torch.cat(masks).flatten(1)
    assert len(heads.unique(dim=0)) == 3 * HEADS
    assert torch.equal(make(seed=1).pattern.mask(200, heads=HEADS), masks[1])
    assert make(causal=True).pattern.patterns[0] == make().pattern.patterns[0] & Causal()


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_every_seed_goes(seed):
    assert make(seed=seed)(stream(1, 50)).isfinite().all()


def test_training_and_evaluation_see_the_same():
    layer, x = make(), stream(2, 90)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_dropout_in_training_alone():
    layer, x = make(dropout=0.5), stream(2, 50)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), make()(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("random_blocks", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_compat_counts_blocks_as_often_as_they_are_drawn(training, random_blocks, masked):
    n = 16 * BLOCK
    options = {"random_blocks": random_blocks, "seed": 2}
    layer = make(compat="huggingface", **options).train(training)
    drawn = layer.blocks.drawn(n, training)
    if not training:
        assert not drawn.any()
    times = times_of(torch.from_numpy(drawn), n)
    mask = padding([n, n - 10, 0], n) if masked else None
    calls = [lambda x: layer(x, mask), lambda x: dense(layer, x, times, mask)]
    assert_same(layer, stream(3, n), calls)


def test_compat_gradcheck():
    layer = make(compat="huggingface", random_blocks=1).train()
    x = stream(1, 8 * BLOCK).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compat_in_other_dtypes(dtype):
    """The logarithms of the multiplicities do not lose digits: errors as those of dense code."""
    n = 16 * BLOCK
    exact = make(compat="huggingface", random_blocks=5).eval()
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())
    x = stream(2, n, dtype=dtype)
    times = times_of(torch.from_numpy(layer.blocks.drawn(n, False)), n)
    expected = dense(exact, x.double(), times, None)
    theirs = (dense(layer, x, times, None) - expected).abs().max()
    assert layer(x).dtype == dtype
    assert (layer(x) - expected).abs().max() <= 2 * theirs


@pytest.fixture
def big_bird():
    return pytest.importorskip(
        "transformers.models.big_bird.modeling_big_bird", reason="compares with transformers"
    )


def their_layer(big_bird, block: int, random_blocks: int, seed: int, max_length: int = 4096):
    config = big_bird.BigBirdConfig(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        block_size=block,
        num_random_blocks=random_blocks,
        max_position_embeddings=max_length,
    )
    torch.manual_seed(1)
    return big_bird.BigBirdBlockSparseAttention(config, seed=seed).to(DEVICE)


def their_draw(layer, n: int) -> np.ndarray | None:
    """What transformers draws in training; None where it fails."""
    block, count = layer.block_size, layer.num_random_blocks
    np.random.seed(layer.seed)
    try:
        if n in (1024, 3072, 4096):
            lengths = (layer.max_seqlen, layer.max_seqlen, block, block)
            drawn = [
                layer._bigbird_block_rand_mask(*lengths, count, last_idx=1024)[: n // block - 2]
                for _ in range(HEADS)
            ]
        else:
            plan = layer._get_rand_attn_plan(n, block, count)
            drawn = layer._bigbird_block_rand_mask_with_head(n, n, block, block, HEADS, *plan)
    except ValueError:
        return None
    return np.stack(drawn)


@pytest.mark.parametrize("random_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("block", [16, 64, 512])
def test_draws_what_transformers_draws(big_bird, block, random_blocks):
    lengths = {block * count for count in (*range(4, 17), 33)} | {1024, 3072, 4096}
    drawn = 0
    for n in sorted(n for n in lengths if n >= 4 * block):
        theirs = their_draw(their_layer(big_bird, block, random_blocks, n % 7).train(), n)
        blocks = HuggingFaceBlocks(block, random_blocks, HEADS, n % 7, 4096)
        if theirs is None:
            with pytest.raises(ValueError, match="longer sequence"):
                blocks.drawn(n, True)
            continue
        np.testing.assert_array_equal(blocks.drawn(n, True), theirs)
        drawn += 1
    assert drawn >= 3


@pytest.mark.parametrize("max_length", [1024, 2048])
def test_draws_for_models_of_other_lengths(big_bird, max_length):
    theirs = their_draw(their_layer(big_bird, 32, 3, 5, max_length).train(), 1024)
    blocks = HuggingFaceBlocks(32, 3, HEADS, 5, max_length)
    np.testing.assert_array_equal(blocks.drawn(1024, True), theirs)
    with pytest.raises(ValueError, match="at most"):
        blocks.drawn(3072, True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n", [64, 1024])
def test_compat_equals_transformers(big_bird, training, n):
    theirs = their_layer(big_bird, BLOCK, 3, seed=2).train(training)
    layer = make(compat="huggingface", seed=2, dtype=torch.float32).train(training)
    assert layer.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == []
    mask = padding([n, n - 11], n)
    tokens = (~mask).float()
    blocked, band, from_mask, to_mask = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(
        tokens, BLOCK
    )
    x = stream(2, n, dtype=torch.float32)
    expected = theirs(x, band, from_mask, to_mask, blocked, blocked)[0]
    torch.testing.assert_close(layer(x, mask), layer.output(expected), atol=1e-5, rtol=0)


def test_compat_leaves_numpys_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    make(compat="huggingface").train()(stream(1, 33 * BLOCK))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_compat_gives_padding_the_bias():
    layer, mask = make(compat="huggingface"), padding([64, 40], 64)
    output = layer(stream(2, 64), mask)
    torch.testing.assert_close(output[mask], layer.output.bias.expand_as(output[mask]))


def test_tables_serve_calls_of_every_mode():
    layer, x = make(compat="huggingface", seed=11), stream(2, 64)
    with torch.inference_mode():
        expected = layer(x)
    output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(output, expected.clone())
    assert not torch.equal(layer.eval()(x), output)
    torch.testing.assert_close(layer.train()(x), output)


@pytest.mark.parametrize("compat", [None, "huggingface"])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(compat, training):
    layer = make(compat=compat, dtype=torch.float32).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (64, 96):
        x, mask = stream(2, n, dtype=torch.float32), padding([n, 30], n)
        torch.testing.assert_close(compiled(x, mask), layer(x, mask))


def test_op_of_the_tables():
    op = torch.ops.sparse_attn._hugging_face_blocks.default
    for training in (False, True):
        torch.library.opcheck(op, (BLOCK, 3, HEADS, 0, 4096, 64, training, str(DEVICE)))
    first = op(BLOCK, 3, HEADS, 0, 4096, 64, True, str(DEVICE))
    expected = first.clone()
    first.zero_()  # a compiler may reuse what an op returns
    assert torch.equal(op(BLOCK, 3, HEADS, 0, 4096, 64, True, str(DEVICE)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compat", [None, "huggingface"])
def test_traces(compat):
    layer = make(compat=compat).eval()
    traced = torch.jit.trace(layer, stream(1, 64))
    assert torch.equal(traced(stream(2, 64)), layer(stream(2, 64)))


@pytest.mark.parametrize("compat", [None, "huggingface"])
def test_copies_and_pickles(compat):
    layer, x = make(compat=compat), stream(1, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert "block=4" in repr(layer) or "BigBird(4" in repr(layer)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compat": "tensorflow"}, ValueError, "compat"),
        ({"block": 0}, ValueError, "block"),
        ({"block": 2.5}, TypeError, "block"),
        ({"random_blocks": -1}, ValueError, "random_blocks"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"compat": "huggingface", "window_blocks": 5}, ValueError, "window_blocks=3"),
        ({"compat": "huggingface", "global_blocks": 0}, ValueError, "global_blocks=1"),
        ({"compat": "huggingface", "dropout": 0.1}, ValueError, "dropout=0"),
        ({"compat": "huggingface", "causal": True}, ValueError, "causal=False"),
        ({"compat": "huggingface", "seed": -1}, ValueError, "seed"),
        ({"compat": "huggingface", "max_length": 0}, ValueError, "max_length"),
    ],
)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=f"sparse_attn: expected .*{words}"):
        make(**options)


@pytest.mark.parametrize(("heads", "error"), [(0, ValueError), (3, ValueError), (2.5, TypeError)])
def test_wrong_heads(heads, error):
    with pytest.raises(error, match=r"sparse_attn: expected .*num_heads"):
        BigBirdSelfAttention(EMBED, heads, block=BLOCK)


@pytest.mark.parametrize("n", [0, 12, 65])
def test_compat_wants_whole_blocks(n):
    with pytest.raises(ValueError, match="sparse_attn: expected a length that is a multiple"):
        make(compat="huggingface")(stream(1, n))


@pytest.mark.parametrize("compat", [None, "huggingface"])
def test_wrong_inputs(compat):
    layer = make(compat=compat)
    with pytest.raises(ValueError, match="expected x"):
        layer(torch.zeros(64, EMBED, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="key_padding_mask"):
        layer(stream(2, 64), padding([3], 64))
    with pytest.raises(TypeError, match="key_padding_mask"):
        layer(stream(2, 64), torch.zeros(2, 64, device=DEVICE))
