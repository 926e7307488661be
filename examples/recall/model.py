"""A small model around any attention layer of the library."""

from collections.abc import Callable

from torch import Tensor, nn

from recall.data import Recall


class Block(nn.Module):
    """Attention and two matrices, each added to the stream."""

    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Tells the value of each question; positions are not told, the task does not need them."""

    def __init__(self, task: Recall, width: int, layers: int, attention: Callable[[], nn.Module]):
        super().__init__()
        self.questions = task.questions
        self.key = nn.Embedding(task.keys + 1, width)
        self.value = nn.Embedding(task.values + 1, width)
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Linear(width, task.values)
        self.blocks = nn.Sequential(*(Block(width, attention()) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, questions, values) for tokens (batch, length, 2)."""
        x = self.blocks(self.key(tokens[..., 0]) + self.value(tokens[..., 1]))
        return self.answer(self.norm(x[:, -self.questions :]))

    def auxiliary_loss(self) -> Tensor | float:
        """What the attention layers add to the objective."""
        return sum(getattr(block.attention, "commitment_loss", 0.0) for block in self.blocks)
