"""`replace_attention` on BigBird and BigBirdPegasus: the numbers of the models, and no more.

With transformers 4.57 in front of PYTHONPATH the tests hold for it too.
"""

import copy
import io
import subprocess
import sys

import cases
import numpy as np
import pytest
import torch
from cases import DEVICE
from torch import Tensor, nn

from sparse_attn.huggingface import replace_attention

transformers = pytest.importorskip("transformers", reason="its models are what is replaced")
bigbird = pytest.importorskip("sparse_attn.huggingface.bigbird", reason="needs these models")

BLOCK, HEADS, VOCABULARY = 4, 4, 70
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "block_size": BLOCK,
    "num_random_blocks": 2,
}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
}
# The switch to full attention is at (5 + 2 · 2) blocks.
SHORT, LONG = 9 * BLOCK, 16 * BLOCK
ALWAYS_RETURNS_ATTENTIONS = not bigbird._ON_DEMAND


def make(name: str = "BigBirdModel", **options) -> nn.Module:
    kind = getattr(transformers, name)
    sizes = SEQ2SEQ if "Pegasus" in name else ENCODER
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SHARED, **sizes, **options}))
    with torch.no_grad():  # logits that tell keys apart
        for module in model.modules():
            if type(module).__name__.endswith("BlockSparseAttention"):
                module.query.weight.mul_(30)
    return model.to(DEVICE)


def pair(name: str = "BigBirdModel", training: bool = False, **options) -> list[nn.Module]:
    theirs = make(name, **options).train(training)
    return [theirs, replace_attention(copy.deepcopy(theirs))]


def ids(n: int, batch: int = 2) -> Tensor:
    return cases.random(batch, n).mul(VOCABULARY - 5).long() + 5


def tokens(n: int) -> Tensor:
    """Padding on both sides of the second example."""
    mask = torch.ones(2, n, dtype=torch.long, device=DEVICE)
    mask[1, n - 2 * BLOCK - 1 :] = 0
    mask[1, : BLOCK + 1] = 0
    return mask


def flat(output) -> dict[str, Tensor]:
    """Every tensor of a model's output, by name."""
    named = {}
    for key, value in output.items():
        parts = value if isinstance(value, tuple) else (value,)
        named |= {f"{key}.{i}": part for i, part in enumerate(parts) if isinstance(part, Tensor)}
    return named


def assert_equal_outputs(models: list[nn.Module], gradients: bool = True, **inputs) -> dict:
    theirs, ours = (flat(model(**inputs)) for model in models)
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=0, msg=name)
    if not gradients:
        return ours
    results = []
    for model, output in zip(models, (theirs, ours), strict=True):
        wanted = [x for x in output.values() if x.requires_grad and x.is_floating_point()]
        loss = sum((x * cases.normal(*x.shape, seed=x.dim(), dtype=x.dtype)).sum() for x in wanted)
        results.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for expected, gradient in zip(*results, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            scale = expected.abs().max().clamp(1.0)
            torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-5, rtol=0)
    return ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["BigBirdModel", "BigBirdPegasusModel"])
@pytest.mark.parametrize("n", [LONG, LONG + 13])
def test_outputs_states_attentions_and_gradients(name, training, n):
    wants = {"output_attentions": True, "output_hidden_states": True}
    ours = assert_equal_outputs(
        pair(name, training), input_ids=ids(n), attention_mask=tokens(n), **wants
    )
    attentions = [x for key, x in ours.items() if key.endswith("attentions.1")]
    padded = -(-n // BLOCK) * BLOCK
    assert attentions[0].shape == (2, HEADS, padded, padded)
    assert sum("hidden_states" in key for key in ours) >= 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("block", "random_blocks", "n"), [(32, 3, 1024), (16, 1, 250), (3, 5, 61)])
def test_other_blocks(training, block, random_blocks, n):
    options = {"block_size": block, "num_random_blocks": random_blocks}
    models = pair(training=training, max_position_embeddings=1024, num_hidden_layers=1, **options)
    assert_equal_outputs(models, input_ids=ids(n), attention_mask=tokens(n))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("BigBirdForMaskedLM", {"labels": ids(LONG)}),
        ("BigBirdForSequenceClassification", {"labels": torch.tensor([0, 1], device=DEVICE)}),
        ("BigBirdForTokenClassification", {"labels": ids(LONG) % 2}),
        ("BigBirdForQuestionAnswering", {}),
        (
            "BigBirdForPreTraining",
            {
                "labels": ids(LONG),
                "next_sentence_label": torch.tensor([0, 1], device=DEVICE),
            },
        ),
        ("BigBirdPegasusForConditionalGeneration", {"labels": ids(7)}),
    ],
)
def test_heads(name, labels):
    models = pair(name, training=True, classifier_dropout=0.0)
    if name == "BigBirdForQuestionAnswering":  # it takes a question of its inputs as given
        labels = {"question_lengths": torch.tensor([[5], [6]], device=DEVICE)}
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert_equal_outputs(models, input_ids=ids(LONG), **labels)


def test_parameters_stay_the_same_objects():
    model = make("BigBirdForMaskedLM").train()
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    assert replace_attention(model) is model
    assert replace_attention(model) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert dict(model.named_modules()).keys() == modules.keys()
    layer = model.bert.encoder.layer[0].attention.self
    assert isinstance(layer, bigbird.BigBirdBlockSparseAttention)
    assert isinstance(layer, bigbird.big_bird.BigBirdBlockSparseAttention)
    assert layer.training


def test_modes_of_submodules_stay():
    model = make().train()
    model.encoder.layer[0].attention.output.eval()
    replace_attention(model)
    assert not model.encoder.layer[0].attention.output.dropout.training


def test_short_inputs_switch_to_full_attention_and_back():
    models = pair()
    for model in models:
        model(ids(SHORT))
    assert_equal_outputs(models, input_ids=ids(LONG), output_attentions=True)
    full = models[1].encoder.layer[1].attention.self
    assert type(full) is bigbird.big_bird.BigBirdSelfAttention
    weight = full.query.weight
    for model in models:
        model.set_attention_type("block_sparse")
    layer = models[1].encoder.layer[1].attention.self
    assert type(layer) is bigbird.BigBirdBlockSparseAttention
    assert layer.query.weight is weight
    assert not layer.training
    assert_equal_outputs(models, input_ids=ids(LONG))


def test_a_model_that_is_full_now():
    models = pair(attention_type="original_full")
    assert_equal_outputs(models, input_ids=ids(LONG))
    for model in models:
        model.set_attention_type("block_sparse")
    assert type(models[1].encoder.layer[0].attention.self) is bigbird.BigBirdBlockSparseAttention
    assert_equal_outputs(models, input_ids=ids(LONG))


def test_training_and_evaluation_switch_plans():
    models, x = pair(), {"input_ids": ids(LONG)}
    results = []
    for training in (False, True, False):
        for model in models:
            model.train(training)
        results.append(assert_equal_outputs(models, gradients=False, **x)["last_hidden_state.0"])
    assert torch.equal(results[0], results[2])
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_gradient_checkpointing(reentrant, in_config, wanted):
    """What is computed again for the backward pass is what was computed."""
    models = pair("BigBirdForMaskedLM", training=True, attention_probs_dropout_prob=0.0)
    option = {} if wanted is None else {"output_attentions": wanted}
    gradients = []
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.config.output_attentions = in_config
        output = model(ids(LONG), labels=ids(LONG), **option)
        assert bool(output.attentions) == (in_config if wanted is None else wanted)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


def test_attentions_are_computed_for_who_asks(monkeypatch):
    calls = []
    theirs = bigbird.dense_attentions
    monkeypatch.setattr(
        bigbird, "dense_attentions", lambda *args: calls.append(args) or theirs(*args)
    )
    model = replace_attention(make())
    model(ids(LONG))
    model(ids(LONG), output_attentions=False)
    assert calls == []
    model(ids(LONG), output_attentions=True)
    assert len(calls) == 2
    model(ids(LONG))
    assert len(calls) == 2


@pytest.mark.parametrize("option", [{}, {"output_attentions": True}])
def test_the_module_alone_returns_what_theirs_returns(option):
    models = pair()
    x, mask = cases.normal(2, LONG, 32, dtype=torch.float32), tokens(LONG).float()
    blocked, *masks = models[0].create_masks_for_block_sparse_attn(mask, BLOCK)
    theirs, ours = (
        model.encoder.layer[1].attention.self(x, *masks, blocked, blocked, **option)
        for model in models
    )
    assert len(theirs) == len(ours) == 2
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
    assert (theirs[1] is not None) == (ALWAYS_RETURNS_ATTENTIONS or bool(option))
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=0)


def test_without_masks_all_tokens_count():
    theirs, ours = (model.encoder.layer[0].attention.self for model in pair())
    x = cases.normal(1, LONG, 32, dtype=torch.float32)
    mask = torch.ones(1, LONG, device=DEVICE)
    blocked, *masks = transformers.BigBirdModel.create_masks_for_block_sparse_attn(mask, BLOCK)
    expected = theirs(x, *masks, blocked, blocked)[0]
    torch.testing.assert_close(ours(x, output_attentions=True)[0], expected, atol=1e-5, rtol=0)


def test_a_layer_without_a_seed_draws_anew():
    config = make().config
    layer = (
        replace_attention(bigbird.big_bird.BigBirdBlockSparseAttention(config)).to(DEVICE).train()
    )
    x = cases.normal(1, LONG, 32, dtype=torch.float32)
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_padding_alone_is_zero_and_has_no_gradient():
    """An example of nothing but padding beside one of tokens."""
    models = pair(training=True)
    mask = tokens(LONG)
    mask[1] = 0
    assert_equal_outputs(models, input_ids=ids(LONG), attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    exact, ours = pair()
    ours.to(dtype)
    expected = exact.double()(ids(LONG), attention_mask=tokens(LONG)).last_hidden_state
    theirs = copy.deepcopy(exact).to(dtype)(ids(LONG), attention_mask=tokens(LONG))
    output = ours(ids(LONG), attention_mask=tokens(LONG)).last_hidden_state
    assert output.dtype == dtype
    budget = 2 * (theirs.last_hidden_state - expected).abs().max()
    assert (output - expected).abs().max() <= budget.clamp(1e-12)


def test_autocast():
    """Attentions too, which transformers 5 cannot compute under autocast."""
    model = replace_attention(make()).train()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        output = model(ids(LONG), output_attentions=True)
    expected = model(ids(LONG), output_attentions=True)
    for name, value in flat(output).items():
        torch.testing.assert_close(value.float(), flat(expected)[name], atol=0.1, rtol=0)
    output.last_hidden_state.sum().backward()


def test_no_random_blocks():
    """transformers fails with none."""
    model = replace_attention(make(num_random_blocks=0)).train()
    output = model(ids(LONG), output_attentions=True)
    weights = output.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_numpys_generator_stays_as_it_is():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    replace_attention(make()).train()(ids(LONG))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_save_and_load(tmp_path):
    theirs, ours = pair("BigBirdForMaskedLM")
    expected = theirs(ids(LONG)).logits
    ours.save_pretrained(tmp_path)
    loaded = transformers.BigBirdForMaskedLM.from_pretrained(tmp_path).to(DEVICE).eval()
    assert torch.equal(loaded(ids(LONG)).logits, expected)
    torch.testing.assert_close(
        replace_attention(loaded)(ids(LONG)).logits, expected, atol=1e-5, rtol=0
    )
    ours.load_state_dict(theirs.state_dict())
    assert theirs.state_dict().keys() == ours.state_dict().keys()


def test_copies_and_pickles():
    _, ours = pair()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(other(ids(LONG))[0], ours(ids(LONG))[0])


def test_compiles():
    _, ours = pair(training=True)
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(ids(LONG))[0], ours(ids(LONG))[0])


# Beyond the peak after a short call, in a fresh process; Linux counts it in /proc.
PROBE = """
import sys, torch
from transformers import BigBirdConfig, BigBirdModel
from sparse_attn.huggingface import replace_attention

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
config = BigBirdConfig(
    vocab_size=10, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=8192, hidden_dropout_prob=0.0)
model = replace_attention(BigBirdModel(config)).train()
model(torch.ones(1, 1024, dtype=torch.long))[0].sum().backward()
before = peak()
model(torch.ones(1, 8192, dtype=torch.long))[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="/proc knows no memory of a GPU")
def test_memory_is_linear():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The attentions alone would be 1 GiB; the states, 2 MiB each, are some 30.
    assert int(result.stdout.split()[-1]) <= 150 * 2**20
