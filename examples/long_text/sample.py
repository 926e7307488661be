"""Text from the model, byte by byte."""

import torch
from torch import nn

CONTEXT = 512  # trailing bytes that the model rereads for each new one


@torch.no_grad()
def generate(
    model: nn.Module, prompt: bytes, count: int, seed: int, temperature=0.8, top_p=0.95
) -> bytes:
    """`count` bytes that go on from `prompt`, drawn from the likeliest bytes (nucleus sampling)."""
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt or b"\n")
    start = len(text)
    for _ in range(count):
        logits = model(torch.tensor([text[-CONTEXT:]]))[0, -1]
        probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        choice = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)
        text.append(int(order[choice]))
    return bytes(text[start:])
