"""The chunked attention of Reformer against LSHSelfAttention of transformers."""

import inspect

import pytest
import torch
from cases import DEVICE

from sparse_attn import BlockLayout, Causal, LocalBlocks, ReformerSelfAttention, attention
from sparse_attn.functional import chunked_lsh_attention

transformers = pytest.importorskip("transformers")
from transformers.models.reformer import modeling_reformer  # noqa: E402

HEADS, SIZE = 3, 16
EMBED = HEADS * SIZE


def config(**options):
    return transformers.ReformerConfig(
        num_attention_heads=HEADS,
        attention_head_size=SIZE,
        hidden_size=EMBED,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        max_position_embeddings=4096,
        axial_pos_embds=False,
        hash_seed=5,
        **options,
    )


def make(name, options):
    torch.manual_seed(0)
    layer = getattr(modeling_reformer, name)
    extra = {"layer_idx": 0} if "layer_idx" in inspect.signature(layer).parameters else {}
    return layer(config(**options), **extra)


def drawn_in_float32(monkeypatch):
    """Let float64 layers draw the rotations of float32."""
    randn = torch.randn

    def narrow(*shape, dtype=None, **options):
        return randn(*shape, **options).to(dtype or torch.float32)

    monkeypatch.setattr(modeling_reformer.torch, "randn", narrow)


def example(length, hidden, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, EMBED, generator=generator, dtype=torch.float64).to(dtype)
    if not hidden:
        return x.requires_grad_(), None
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, -hidden:] = 0
    mask[1, 3:7] = 0
    return x.requires_grad_(), mask


# length, causal, rounds, buckets, chunk, before, after, hidden tokens
CASES = [
    (64, False, 1, 8, 16, 1, 0, 0),
    (64, True, 1, 8, 16, 1, 0, 0),
    (64, True, 2, 8, 16, 1, 0, 5),
    (64, False, 3, [2, 4], 16, 1, 1, 9),
    (32, False, 1, 4, 16, 1, 1, 0),
    (128, True, 2, None, 16, 0, 0, 20),
    (48, True, 1, 4, 16, 2, 1, 7),
    (16, True, 2, 4, 16, 1, 0, 3),
    (10, False, 2, 4, 16, 1, 0, 3),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_layer(case, training, monkeypatch):
    """In float64: float32 rounds −10⁵ + log 2 there, the sum of two rounds in which a token sees
    none but itself, and its value comes out 0.2 % less."""
    length, causal, rounds, buckets, chunk, before, after, hidden = case
    theirs = make(
        "LSHSelfAttention",
        {
            "attn_layers": ["lsh"],
            "num_hashes": rounds,
            "num_buckets": buckets,
            "lsh_attn_chunk_length": chunk,
            "lsh_num_chunks_before": before,
            "lsh_num_chunks_after": after,
            "is_decoder": causal,
        },
    ).double()
    drawn_in_float32(monkeypatch)
    ours = ReformerSelfAttention(
        EMBED,
        HEADS,
        num_buckets=buckets,
        num_hashes=rounds,
        chunk_length=chunk,
        chunks_before=before,
        chunks_after=after,
        seed=5,
        max_length=4096,
        causal=causal,
        device=DEVICE,
        dtype=torch.float64,
    )
    ours.query_key.weight.data.copy_(theirs.query_key.weight.data)
    ours.value.weight.data.copy_(theirs.value.weight.data)
    ours.output.weight.data.copy_(torch.eye(EMBED))
    theirs.train(training)
    ours.train(training)
    x, mask = example(length, hidden, torch.float64)
    expected = theirs(x, attention_mask=mask).hidden_states
    of_ours = x.detach().to(DEVICE).requires_grad_()
    output = ours(of_ours, None if mask is None else (mask == 0).to(DEVICE))
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-8, atol=1e-8)
    weight = torch.randn_like(expected)
    expected = torch.autograd.grad(
        (expected * weight).sum(), [x, theirs.query_key.weight, theirs.value.weight]
    )
    gradients = torch.autograd.grad(
        (output * weight.to(DEVICE)).sum(), [of_ours, ours.query_key.weight, ours.value.weight]
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.cpu(), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [17, 29, 61, 64, 130])
def test_buckets_are_those_of_a_sequence_filled_up(length, monkeypatch):
    """The model fills sequences up before its layers choose a number of buckets."""
    options = {"attn_layers": ["lsh"], "num_buckets": None, "lsh_attn_chunk_length": 8}
    theirs = make("LSHSelfAttention", options).double().eval()
    drawn_in_float32(monkeypatch)
    ours = ReformerSelfAttention(
        EMBED, HEADS, chunk_length=8, seed=5, max_length=4096, device=DEVICE, dtype=torch.float64
    )
    ours.query_key.weight.data.copy_(theirs.query_key.weight.data)
    ours.value.weight.data.copy_(theirs.value.weight.data)
    ours.output.weight.data.copy_(torch.eye(EMBED))
    x = example(length, 0, torch.float64)[0].detach()
    filling = -length % 8
    mask = torch.ones(2, length + filling, dtype=torch.int64)
    mask[:, length:] = 0
    filled = torch.nn.functional.pad(x, (0, 0, 0, filling))
    expected = theirs(filled, attention_mask=mask).hidden_states[:, :length]
    torch.testing.assert_close(ours(x.to(DEVICE)).cpu(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_rotations_are_those_of_the_hash_seed(causal):
    """Nothing patched, float32."""
    rounds = 1 if causal else 2  # two, alone: see test_layer
    options = {"attn_layers": ["lsh"], "num_buckets": 8, "lsh_attn_chunk_length": 16}
    theirs = make("LSHSelfAttention", {**options, "num_hashes": rounds, "is_decoder": causal})
    theirs.eval()
    x, _ = example(96, 0, torch.float32)
    expected = theirs(x).hidden_states
    query_key, value = (
        layer(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2).to(DEVICE)
        for layer in (theirs.query_key, theirs.value)
    )
    output = chunked_lsh_attention(
        query_key,
        value,
        num_buckets=8,
        num_hashes=rounds,
        chunk_length=16,
        seed=5,
        is_causal=causal,
    )
    output = output.transpose(1, 2).flatten(2).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_local_layer_is_a_pattern(causal):
    chunk, length = 16, 80
    options = {"attn_layers": ["local"], "local_attn_chunk_length": chunk, "is_decoder": True}
    theirs = make("LocalSelfAttention", options).eval()
    x, _ = example(length, 0, torch.float32)
    if not causal:
        theirs.is_decoder, theirs.num_chunks_before = False, 0
    expected = theirs(x).hidden_states
    query, key, value = (
        layer(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2).to(DEVICE)
        for layer in (theirs.query, theirs.key, theirs.value)
    )
    chunks = torch.arange(length // chunk, device=DEVICE)
    before = BlockLayout(chunks[:, None] - 1 == chunks, chunk)
    near = Causal() & (LocalBlocks(chunk) | before)
    output = attention(query, key, value, near if causal else LocalBlocks(chunk))
    output = output.transpose(1, 2).flatten(2).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
