"""A byte-level causal language model in the style of Longformer."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import sparse_attn
from sparse_attn import BigBird, Causal, Fixed, Global, KVCache, Pattern, Strided, Window

VOCABULARY = 256  # bytes
ATTENTIONS = ("full", "window", "longformer", "strided", "fixed", "bigbird")


def check_pairs(width: int, heads: int) -> None:
    """Raise ValueError unless every head has pairs of channels."""
    if width % (2 * heads):
        raise ValueError(
            f"expected a width that is a multiple of 2 * heads = {2 * heads} "
            f"(rotary positions pair the channels), got {width}"
        )


@dataclass(frozen=True)
class Config:
    """The shape of the model. `attention` is one of ATTENTIONS; the parameters are the same."""

    layers: int = 4
    width: int = 192
    heads: int = 3
    window: int = 128
    buckets: int = 8192
    attention: str = "longformer"

    def __post_init__(self):
        check_pairs(self.width, self.heads)
        if self.attention not in ATTENTIONS:
            raise ValueError(f"expected attention in {ATTENTIONS}, got {self.attention!r}")

    @property
    def dilations(self) -> list[int]:
        """1 in the lower half, which reads the neighborhood, then 2, 4, 8, ... for reach."""
        return [2 ** max(0, layer + 1 - (self.layers + 1) // 2) for layer in range(self.layers)]

    def pattern(self, layer: int, window: int | None = None) -> Pattern:
        """The pairs that a layer may look at, all to the left.

        At the default length a sparse one has 1 to 1.5 times `window` keys per query: Longformer a
        dilated window and byte 0; the Sparse Transformer's strided and fixed sets a stride of
        `window` (Child et al. 2019 take 128, with 8 summaries, for text); BigBird blocks of a
        quarter of it: a window of three, three random ones, a global one.
        """
        size = self.window if window is None else window
        dilated = Window(size, 0, dilation=self.dilations[layer])
        patterns = {
            "full": Causal(),
            "window": Window(size, 0),
            "longformer": (dilated | Global([0])) & Causal(),
            "strided": Strided(size),
            "fixed": Fixed(size, max(1, size // 16)),
            "bigbird": BigBird(max(1, size // 4), seed=layer) & Causal(),
        }
        return patterns[self.attention]

    @property
    def global_tokens(self) -> int:
        """How many bytes at the start all later ones look at, by the pattern."""
        return {"longformer": 1, "bigbird": max(1, self.window // 4)}.get(self.attention, 0)

    def keys_per_query(self, length: int) -> float:
        """How many keys a query sees, on average over queries and layers."""
        pairs = sum(self.pattern(layer).cost(length).pairs for layer in range(self.layers))
        return pairs / (self.layers * length)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turn pairs of channels of x (B, N, ..., D) by the angles of `turns`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


class NgramEmbedding(nn.Module):
    """Embeds each byte, and by hash the pair and the triple of bytes that end with it.

    The tables of pairs and triples know soon what usually follows them, which leaves the blocks
    the longer context to learn (Byte Latent Transformer, section 3.2.1).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, config.width)
        self.pair = nn.Embedding(config.buckets, config.width)
        self.triple = nn.Embedding(config.buckets, config.width)

    def forward(self, tokens: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Bytes (B, N) that come after `two` others (B, 2), zeros at the start."""
        before = torch.cat([two, tokens], 1)
        pairs = tokens + VOCABULARY * before[:, 1:-1]
        triples = pairs + VOCABULARY**2 * before[:, :-2]
        x = self.byte(tokens)
        for table, code in ((self.pair, pairs), (self.triple, triples)):
            x = x + table(code * 2654435761 % 4294967291 % table.num_embeddings)
        return x


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.pattern = None if config.attention == "full" else config.pattern(layer)
        self.attention = sparse_attn.attention  # over a whole sequence, or a shard of one
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def query_key_value(self, x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, H, N, D) each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        query, key = rotate(qkv[:, :, :2], turns).transpose(1, 3).unbind(2)
        return query, key, qkv[:, :, 2].transpose(1, 2)

    def attend(self, x: torch.Tensor, turns: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        query, key, value = self.query_key_value(x, turns)
        if cache is not None:
            heads = cache.attend(query, key, value)
        elif self.pattern is None:
            heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            heads = self.attention(query, key, value, self.pattern)
        return self.project(heads.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, turns: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        x = x + self.attend(self.norm1(x), turns, cache)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Stack(nn.Module):
    """What causal models of sequences share: an embedding, blocks, a norm, and rotary positions."""

    def __init__(self, config: Config, embedding: nn.Module):
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):  # comes after its layers: the stream keeps its size
            for linear in (module.project, module.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.layers))

    def turns(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Rotary factors e^(i * position * frequency), shaped to fit (B, N, 2, H, D / 2)."""
        half = self.config.width // self.config.heads // 2
        frequency = 10000.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.outer(torch.arange(start, stop, device=device), frequency)
        return torch.polar(torch.ones_like(angles), angles)[:, None, None]


class ByteModel(Stack):
    """Bytes (B, N) to the logits (B, N, 256) of the byte after each."""

    def __init__(self, config: Config):
        super().__init__(config, NgramEmbedding(config))

    def forward(self, tokens: torch.Tensor, memory: "Memory | None" = None) -> torch.Tensor:
        """The bytes of a text; with a `memory` those that follow what it has seen."""
        start, caches = 0, [None] * len(self.blocks)
        two = tokens.new_zeros(len(tokens), 2)
        if memory is not None:
            start, caches, two = memory.length, memory.caches, memory.two
            memory.see(tokens)
        return self.from_place(tokens, two, start, caches)

    def from_place(
        self, tokens: torch.Tensor, two: torch.Tensor, start: int, caches: "list[KVCache | None]"
    ) -> torch.Tensor:
        """The bytes from place `start` on, after `two` others (B, 2), with a cache or None for
        each layer.
        """
        turns = self.turns(start, start + tokens.shape[1], tokens.device)
        x = self.embedding(tokens, two)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, turns, cache)
        return F.linear(self.norm(x), self.embedding.byte.weight)  # tied to the embedding


class Memory:
    """What a model keeps of the texts that it goes on from: of each layer the keys and values that
    its pattern still needs, and the last two bytes.

    Raises ValueError for BigBird, whose last block depends on how long the text will be.
    """

    def __init__(self, model: ByteModel, batch: int):
        config, weight = model.config, model.norm.weight
        self.caches = [
            KVCache(
                config.pattern(layer),
                batch_size=batch,
                num_heads_kv=config.heads,
                head_dim=config.width // config.heads,
                dtype=weight.dtype,
                device=weight.device,
            )
            for layer in range(config.layers)
        ]
        self.two = torch.zeros(batch, 2, dtype=torch.long, device=weight.device)

    @property
    def length(self) -> int:
        """How many bytes it has seen."""
        return self.caches[0].length

    def see(self, tokens: torch.Tensor) -> None:
        """Note the last two bytes."""
        self.two = torch.cat([self.two, tokens], 1)[:, -2:]


def build_model(config: Config | None = None) -> ByteModel:
    """A freshly initialized model of this shape (of the default one without a `config`)."""
    return ByteModel(config or Config())
