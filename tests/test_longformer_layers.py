"""`LongformerLayer` and `LongformerEncoder` against Hugging Face's, and what these lack."""

import cases
import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from sparse_attn import LongformerEncoder, LongformerLayer

EMBED, HEADS, LAYERS, FEEDFORWARD = 32, 4, 3, 48
WINDOWS = [4, 8, 4]


def states(batch: int, n: int) -> Tensor:
    return cases.normal(batch, n, EMBED, dtype=torch.float32)


def encoder(**options) -> LongformerEncoder:
    torch.manual_seed(0)
    given = {"attention_window": WINDOWS, "feedforward_dim": FEEDFORWARD, "device": DEVICE}
    return LongformerEncoder(LAYERS, EMBED, HEADS, **{**given, **options})


@pytest.fixture
def hugging_face() -> nn.Module:
    longformer = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer", reason="compares with transformers"
    )
    config = longformer.LongformerConfig(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=FEEDFORWARD,
        attention_window=WINDOWS,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(1)
    return longformer.LongformerEncoder(config).to(DEVICE).eval()


@pytest.mark.parametrize("attentions", [False, True])
def test_equals_hugging_face(hugging_face, attentions):
    ours = encoder()
    ours.load_state_dict(hugging_face.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(hugging_face.state_dict())
    attention_mask = torch.ones(2, 24, dtype=torch.long, device=DEVICE)
    attention_mask[1, 15:] = 0
    global_mask = torch.zeros_like(attention_mask)
    global_mask[:, [0, 9]] = 1
    numeric = torch.where(attention_mask == 0, -1e4, 1e4 * global_mask)

    results, gradients = [], []
    for call in (
        lambda x: ours(x, attention_mask, global_mask, attentions, output_hidden_states=True),
        lambda x: hugging_face(
            x, numeric, output_attentions=attentions, output_hidden_states=True, return_dict=False
        ),
    ):
        x = states(2, 24).requires_grad_()
        found = [part for part in call(x) if part is not None]
        assert len(found) == (4 if attentions else 2)
        found[0].square().sum().backward()
        flat = [t for part in found for t in (part if isinstance(part, tuple) else (part,))]
        results.append(flat)
        gradients.append(x.grad)
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
    theirs = dict(hugging_face.named_parameters())
    for name, parameter in ours.named_parameters():
        limit = 1e-5 * max(1, theirs[name].grad.abs().max().item())
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=limit)


def test_fields_of_the_output():
    x = states(2, 17)
    output = encoder()(x)
    assert output.last_hidden_state.shape == (2, 17, EMBED)
    assert output.hidden_states is output.attentions is output.global_attentions is None
    output = encoder()(x, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert output.hidden_states[0] is x
    assert output.hidden_states[-1] is output.last_hidden_state
    assert [a.shape[-1] for a in output.attentions] == [w + 1 for w in WINDOWS]
    assert [a.shape[-1] for a in output.global_attentions] == [0] * LAYERS


def test_dilation_of_layers_and_heads():
    """Reach of three layers: sides 2, 4, 2 times the largest dilation of each."""
    model = encoder(dilation=[1, 2, (1, 1, 1, 3)], causal=True)
    x = states(1, 40).requires_grad_()
    model(x).last_hidden_state[0, 30].sum().backward()
    touched = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched[0] == 30 - (2 * 1 + 4 * 2 + 2 * 3)
    assert touched[-1] == 30


def test_recomputation_changes_nothing():
    x, results = states(2, 21), []
    for recompute in (False, True):
        model = encoder(recompute=recompute, dropout=0.2).train()
        torch.manual_seed(3)
        model(x).last_hidden_state.square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_acts_in_training_alone():
    layer = LongformerLayer(EMBED, HEADS, 8, dropout=0.5, attention_dropout=0.0, device=DEVICE)
    x = states(2, 21)
    assert layer.attention["self"].dropout == 0.0
    assert not torch.equal(layer.train()(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_activation_by_name():
    x = states(2, 21)
    outputs = [encoder(activation=a)(x)[0] for a in ("relu", torch.relu, "gelu")]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_compiles_whole():
    torch._dynamo.reset()
    model = encoder(dilation=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones(2, 21, device=DEVICE)
    result = compiled(states(2, 21), mask, mask)
    torch.testing.assert_close(result[0], model(states(2, 21), mask, mask)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_window": [4, 8]}, ["attention_window", "3", "[4, 8]"]),
        ({"dilation": [1, 2]}, ["dilation", "3", "[1, 2]"]),
        ({"feedforward_dim": 0}, ["feedforward_dim", "0"]),
        ({"dropout": 2.0}, ["dropout", "2.0"]),
        ({"attention_dropout": -1.0}, ["dropout", "-1.0"]),
        ({"activation": "swish"}, ["activation", "swish"]),
        ({"activation": None}, ["activation", "None"]),
    ],
)
def test_wrong_input(options, words):
    with pytest.raises(ValueError, match="sparse_attn: expected") as caught:
        encoder(**options)
    assert all(word in str(caught.value) for word in words), caught.value
