"""Fine-tuning one model, with either attention."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from long_text.measure import peak_memory
from long_text.training import learning_rate
from torch import nn
from tqdm import tqdm

import sparse_attn
from finetune.data import CLS, KINDS, PAD, VOCABULARY, Documents

ATTENTIONS = ("original", "replaced")


@dataclass
class Settings:
    """What decides the numbers of a run."""

    length: int = 2048
    window: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 4
    batch: int = 2
    steps: int = 120
    learning_rate: float = 1e-3
    seed: int = 0


def build_model(settings: Settings) -> nn.Module:
    """A small Longformer with random weights. Without dropout: its draws would differ."""
    from transformers import LongformerConfig, LongformerForSequenceClassification

    torch.manual_seed(settings.seed)
    return LongformerForSequenceClassification(
        LongformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=2 * settings.width,
            attention_window=settings.window,
            max_position_embeddings=settings.length + PAD + 1,
            pad_token_id=PAD,
            num_labels=len(KINDS),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes: [CLS] is global, padding is masked."""
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != PAD).long(),
        "global_attention_mask": (tokens == CLS).long(),
    }


def losses(
    model: nn.Module, documents: Documents, settings: Settings
) -> Iterator[tuple[float, float]]:
    """The loss of each step, and its seconds."""
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(settings.steps):
        tokens, labels = documents.batch(settings.batch, step, settings.seed)
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        start = time.perf_counter()
        loss = model(**inputs(tokens), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, documents: Documents) -> float:
    """The share of documents whose kind the model tells."""
    model.eval()
    found = [model(**inputs(tokens)).logits.argmax(-1) for tokens in documents.tokens.split(4)]
    return (torch.cat(found) == documents.labels).double().mean().item()


def measure(attention: str, train: Documents, held_out: Documents, settings: Settings) -> dict:
    """Train with one of ATTENTIONS: losses, seconds of the steps, memory, and accuracy."""
    model = build_model(settings).train()
    if attention == "replaced":
        sparse_attn.huggingface.replace_attention(model)
    before, took = peak_memory(), []
    bar = tqdm(losses(model, train, settings), desc=attention, total=settings.steps, unit="step")
    for loss, seconds in bar:
        took.append((loss, seconds))
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return {
        "losses": [loss for loss, _ in took],
        "seconds": [seconds for _, seconds in took],
        "training_memory": peak_memory() - before,
        "accuracy": accuracy(model, held_out),
    }
