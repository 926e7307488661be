"""Text from the model, byte by byte."""

from collections.abc import Callable

import torch

from long_text.model import ByteModel, Memory

CONTEXT = 512  # trailing bytes that a model without a memory rereads for each new one


def reader(model: ByteModel) -> Callable[[list[int]], torch.Tensor]:
    """What takes the next bytes of one text and gives the logits of the byte after them.

    A step takes as long after a million bytes as after a window of them. BigBird alone, whose last
    block is where the text ends, has to read again.
    """
    if model.config.attention != "bigbird":
        memory = Memory(model, batch=1)
        return lambda new: model(torch.tensor([new]), memory)[0, -1]
    text: list[int] = []

    def read_again(new: list[int]) -> torch.Tensor:
        text.extend(new)
        return model(torch.tensor([text[-CONTEXT:]]))[0, -1]

    return read_again


@torch.no_grad()
def generate(
    model: ByteModel, prompt: bytes, count: int, seed: int, temperature=0.8, top_p=0.95
) -> bytes:
    """`count` bytes that go on from `prompt`, drawn from the likeliest bytes (nucleus sampling)."""
    generator = torch.Generator().manual_seed(seed)
    read, new, text = reader(model), list(prompt or b"\n"), []
    for _ in range(count):
        probabilities, order = (read(new) / temperature).softmax(-1).sort(descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        choice = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)
        new = [int(order[choice])]
        text += new
    return bytes(text)
