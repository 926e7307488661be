"""`LongformerSelfAttention` against Hugging Face's, and against its dense definition."""

import cases
import numpy as np
import pytest
import reference
import torch
from cases import DEVICE
from torch import Tensor

from sparse_attn import LongformerSelfAttention

PROJECTIONS = ["query", "key", "value", "query_global", "key_global", "value_global"]
EMBED, HEADS, WINDOW = 32, 4, 8
MASKED, GLOBAL = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max


def hidden_states(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.normal(batch, n, EMBED, seed=seed, dtype=dtype)


def module(window: int = WINDOW, **options) -> LongformerSelfAttention:
    torch.manual_seed(0)
    return LongformerSelfAttention(EMBED, HEADS, window, device=DEVICE, **options)


def token_mask(lengths: list[int], n: int) -> Tensor:
    return (torch.arange(n, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]).long()


def marks(tokens: list[list[int]], n: int) -> Tensor:
    mask = torch.zeros(len(tokens), n, dtype=torch.long)
    for row, chosen in zip(mask, tokens, strict=True):
        row[chosen] = 1
    return mask.to(DEVICE)


@pytest.fixture
def hugging_face():
    longformer = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer", reason="compares with transformers"
    )
    config = longformer.LongformerConfig(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        attention_window=[WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    theirs = longformer.LongformerSelfAttention(config, layer_id=0).eval().to(DEVICE)

    def forward(x: Tensor, attention_mask: Tensor, global_attention_mask: Tensor, **options):
        """What LongformerModel does with 0/1 masks before it calls its layers."""
        merged = attention_mask * (global_attention_mask + 1)
        numbers = torch.tensor([MASKED, 0.0, GLOBAL], device=DEVICE)[merged]
        is_global = numbers > 0
        return theirs(
            x,
            attention_mask=numbers,
            is_index_masked=numbers < 0,
            is_index_global_attn=is_global,
            is_global_attn=bool(is_global.any()),
            **options,
        )

    return theirs, forward


@pytest.mark.parametrize(
    ("n", "lengths", "tokens"),
    [
        (32, [32, 32, 32], [[], [], []]),
        (32, [32, 20, 7], [[], [], []]),
        (32, [32, 32, 32], [[0], [0], [0]]),
        (32, [32, 32, 32], [[0, 5, 31], [16], []]),
        (64, [64, 41, 9], [[0], [0, 1, 2, 30, 40], [3, 8]]),
        (64, [64, 41, 9], [[10], [50, 0], [9, 63]]),  # some are padding: masked wins
        (16, [16, 16, 16], [list(range(16)), [0], [1, 2]]),
    ],
)
def test_equals_hugging_face(hugging_face, n, lengths, tokens):
    theirs, forward = hugging_face
    ours = module()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    attention_mask, global_mask = token_mask(lengths, n), marks(tokens, n)
    grad_output = hidden_states(3, n, seed=1)

    results = []
    for layer, call in ((ours, ours), (theirs, forward)):
        layer.zero_grad()
        x = hidden_states(3, n).requires_grad_()
        (output,) = call(x, attention_mask, global_mask)
        output.backward(grad_output)
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((output.detach(), x.grad, gradients))
    (output, grad_x, grads), (expected, expected_grad_x, expected_grads) = results

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, expected_grad_x, rtol=1e-5, atol=1e-5)
    assert set(grads) == {f"{p}.{kind}" for p in PROJECTIONS for kind in ("weight", "bias")}
    for name, gradient in grads.items():
        other = expected_grads[name]
        other = torch.zeros_like(gradient) if other is None else other
        # Sums over all tokens: 1e-5 of their largest entry.
        limit = 1e-5 * max(1, other.abs().max().item())
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=limit, msg=name)
    padded = attention_mask == 0
    assert torch.equal(output[padded], torch.zeros_like(output[padded]))


def test_state_dicts_are_exchanged_both_ways(hugging_face):
    theirs, _ = hugging_face
    theirs.load_state_dict(module().state_dict(), strict=True)
    assert list(module().state_dict()) == list(theirs.state_dict())


def dense_longformer(
    layer: LongformerSelfAttention,
    x: Tensor,
    attention_mask: Tensor,
    global_mask: Tensor,
    dilations: list[int],
    causal: bool,
) -> Tensor:
    """The definition: two dense attentions, and global rows taken from the second."""
    n, masked = x.shape[1], attention_mask == 0
    is_global = (global_mask == 1) & ~masked
    side = layer.attention_window // 2
    rules = [reference.Window(side, 0 if causal else side, d) for d in dilations]
    local = torch.from_numpy(reference.PerHead(rules).mask(n, heads=HEADS)).to(DEVICE)
    local = local | is_global[:, None, None, :]
    every = np.tri(n, dtype=bool) if causal else np.ones((n, n), dtype=bool)
    visible = torch.from_numpy(every).to(DEVICE) & ~masked[:, None, None, :]

    def attend(suffix: str, allowed: Tensor) -> Tensor:
        q, k, v = (
            getattr(layer, name + suffix)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return reference.dense_attention(q, k, v, allowed)[0].transpose(1, 2).flatten(2)

    output = torch.where(
        is_global[..., None], attend("_global", visible), attend("", local & visible)
    )
    return output.masked_fill(masked[..., None], 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("dilation", [1, 3, [1, 2, 3, 8]], ids=str)
@pytest.mark.parametrize("n", [1, 37])
def test_equals_the_definition(n, dilation, window, causal):
    layer = module(window, dilation=dilation, causal=causal).double()
    dilations = [dilation] * HEADS if isinstance(dilation, int) else dilation
    attention_mask = token_mask([n, (n + 1) // 2, 1], n)
    global_mask = marks([[0], [0, n // 2, n - 1], []], n)
    grad_output = hidden_states(3, n, seed=1, dtype=torch.float64)

    results = []
    for call in (
        lambda x: layer(x, attention_mask, global_mask)[0],
        lambda x: dense_longformer(layer, x, attention_mask, global_mask, dilations, causal),
    ):
        x = hidden_states(3, n, dtype=torch.float64).requires_grad_()
        output = call(x)
        results.append(
            (output, *torch.autograd.grad(output, [x, *layer.parameters()], grad_output))
        )
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_future_tokens_do_not_reach_the_past():
    layer = module(causal=True, dilation=[1, 2, 3, 4])
    global_mask = marks([[0, 20]], 50)
    x = hidden_states(1, 50)
    changed = x.clone()
    changed[:, 30:] += 1
    before, after = (layer(y, None, global_mask)[0] for y in (x, changed))
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("n", [1, 2, 5, 67, 131])
@pytest.mark.parametrize("window", [1, 3, 512])
def test_any_length_and_any_window(n, window):
    (output,) = module(window)(hidden_states(2, n))
    assert output.shape == (2, n, EMBED)
    assert output.isfinite().all()


@pytest.mark.parametrize("global_mask", [None, marks([[], []], 20)], ids=str)
def test_without_global_tokens_their_gradients_are_zero(global_mask):
    layer = module()
    layer(hidden_states(2, 20), None, global_mask)[0].square().sum().backward()
    for name in PROJECTIONS:
        for parameter in getattr(layer, name).parameters():
            assert parameter.grad is not None
            if name.endswith("_global"):
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert layer.query.weight.grad.abs().max() > 0


def test_no_mask_is_a_mask_of_ones():
    layer, x = module(), hidden_states(2, 20)
    ones, none = torch.ones(2, 20, device=DEVICE), torch.zeros(2, 20, device=DEVICE)
    assert torch.equal(layer(x)[0], layer(x, ones, none)[0])
    assert torch.equal(layer(x)[0], layer(x, ones.bool(), none.bool())[0])


def test_an_example_without_tokens_is_zero():
    (output,) = module()(hidden_states(2, 20), token_mask([20, 0], 20), marks([[0], [0]], 20))
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert output[0].abs().max() > 0


def test_returns_a_tuple_of_one():
    result = module()(hidden_states(2, 20))
    assert isinstance(result, tuple)
    assert len(result) == 1


def test_attentions_equal_hugging_face(hugging_face):
    theirs, forward = hugging_face
    ours = module()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, attention_mask = hidden_states(3, 32), token_mask([32, 20, 9], 32)
    for tokens in ([[0, 5, 31], [16, 17, 18], [2, 3, 4]], [[], [], []]):
        global_mask = marks(tokens, 32)
        _, attentions, of_global = ours(x, attention_mask, global_mask, output_attentions=True)
        _, expected, *expected_global = forward(
            x, attention_mask, global_mask, output_attentions=True
        )
        torch.testing.assert_close(attentions, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
        if expected_global:
            expected = expected_global[0].mT
            torch.testing.assert_close(of_global, expected, rtol=1e-5, atol=1e-6)
        else:
            assert of_global.shape == (3, HEADS, 32, 0)


def dense_attentions(allowed: Tensor, logits: Tensor) -> Tensor:
    """Softmax over the allowed pairs; 0 where a row has none."""
    weights = torch.softmax(logits.masked_fill(~allowed, -torch.inf), -1)
    return weights.masked_fill(~allowed, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 7, 8])
@pytest.mark.parametrize("dilation", [1, [1, 2, 3, 8]], ids=str)
def test_attentions_by_definition(window, dilation, causal):
    """Column by column: global tokens, then the window; a token of both is the global one's."""
    n, tokens = 19, [[0, 7, 18], [4], []]
    layer = module(window, dilation=dilation, causal=causal).double()
    x, attention_mask = hidden_states(3, n, dtype=torch.float64), token_mask([n, 12, 1], n)
    global_mask = marks(tokens, n)
    _, attentions, of_global = layer(x, attention_mask, global_mask, output_attentions=True)
    side = window // 2
    assert attentions.shape == (3, HEADS, n, 3 + 2 * side + 1)
    assert of_global.shape == (3, HEADS, n, 3)

    def logits(suffix: str) -> Tensor:
        q, k = (
            getattr(layer, name + suffix)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key")
        )
        return q @ k.mT / (EMBED // HEADS) ** 0.5

    real = (attention_mask == 1)[:, None, None, :]
    is_global = (global_mask == 1)[:, None, None, :] & real
    i, j = torch.arange(n, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)
    past = j <= i if causal else torch.ones_like(j <= i)
    steps = torch.tensor(dilation if isinstance(dilation, list) else [dilation] * HEADS)
    steps = steps.to(DEVICE)[:, None, None]
    near = ((j - i) % steps == 0) & ((j - i).abs() <= side * steps)
    dense = dense_attentions((near | is_global) & past & real, logits(""))
    dense_global = dense_attentions(past & real, logits("_global"))
    for b, marked in enumerate(tokens):
        for h, step in enumerate(steps.flatten().tolist()):
            for q in range(n):
                expected = torch.zeros(3 + 2 * side + 1, dtype=torch.float64, device=DEVICE)
                if attention_mask[b, q] and q not in marked:
                    for rank, token in enumerate(marked):
                        expected[rank] = dense[b, h, q, token]
                    for slot in range(-side, side + 1):
                        key = q + slot * step
                        if 0 <= key < n and key not in marked:
                            expected[3 + side + slot] = dense[b, h, q, key]
                torch.testing.assert_close(attentions[b, h, q], expected)
        for rank in range(3):
            expected = torch.zeros(HEADS, n, dtype=torch.float64, device=DEVICE)
            if rank < len(marked):
                expected = dense_global[b, :, marked[rank]]
            torch.testing.assert_close(of_global[b, :, :, rank], expected)


def test_attentions_are_differentiable():
    layer = module().double()
    x = hidden_states(1, 9, dtype=torch.float64).requires_grad_()

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return layer(x, None, marks([[2, 8]], 9), output_attentions=True)

    torch.autograd.gradcheck(both, (x,), fast_mode=True)


def test_attentions_are_those_of_the_dropout():
    """In training the output is the attentions' product with the values, dropout included."""
    layer = module(window=8, dropout=0.4).train()
    x = hidden_states(2, 20)
    output, attentions, _ = layer(x, output_attentions=True)
    value = layer.value(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    padded = torch.nn.functional.pad(value, (0, 0, 4, 4)).unfold(2, 9, 1)
    expected = (attentions[..., None, :] * padded).sum(-1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert 0.2 < (attentions == 0).float().mean() < 0.7


def test_dropout():
    layer, states = module(dropout=0.5), hidden_states(2, 20)
    is_global = marks([[0], [3]], 20)
    torch.manual_seed(1)
    (first,), (other,) = (layer.train()(states, None, is_global) for _ in range(2))
    torch.manual_seed(1)
    (again,) = layer(states, None, is_global)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = layer.eval()(states, None, is_global)[0]
    assert torch.equal(kept, module()(states, None, is_global)[0])
    # What is dropped is made up for on average.
    layer.train()
    mean = torch.stack([layer(states, None, is_global)[0] for _ in range(400)]).mean(0)
    assert (mean - kept).abs().max() < 0.25 * kept.abs().max()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dtype_of_the_constructor(dtype):
    layer = module(dtype=dtype)
    (output,) = layer(hidden_states(2, 20, dtype=dtype), None, marks([[0], [3]], 20))
    assert output.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_compiles_with_masks():
    torch._dynamo.reset()
    layer = module(causal=True, dilation=[1, 2, 2, 4])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (20, 33):
        given = hidden_states(2, n), token_mask([n, 11], n), marks([[0, 4], []], n)
        torch.testing.assert_close(compiled(*given)[0], layer(*given)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda: LongformerSelfAttention(30, 4, 8), ValueError, ["embed_dim", "30", "4"]),
        (lambda: LongformerSelfAttention(32, 0, 8), ValueError, ["num_heads", "0"]),
        (lambda: module(-8), ValueError, ["attention_window", "-8"]),
        (lambda: module(dilation=0), ValueError, ["dilation", "0"]),
        (lambda: module(dilation=[1, 2, 3]), ValueError, ["dilation", "3", "4"]),
        (lambda: module(dropout=1.5), ValueError, ["dropout", "1.5"]),
        (lambda: module()(hidden_states(1, 20)[0]), ValueError, ["hidden_states", "20, 32"]),
        (
            lambda: module()(hidden_states(2, 20)[..., 1:]),
            ValueError,
            ["hidden_states", "2, 20, 31"],
        ),
        (
            lambda: module()(hidden_states(2, 20), token_mask([19, 19], 19)),
            ValueError,
            ["attention_mask", "2, 20", "2, 19"],
        ),
        (
            lambda: module()(hidden_states(2, 20), None, token_mask([20], 20)),
            ValueError,
            ["global_attention_mask", "2, 20", "1, 20"],
        ),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_wrong_input(call, exception, words, mode):
    with mode(), pytest.raises(exception) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
