"""Self-attention of low rank: projected keys, keys of lower rank, landmarks."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from sparse_attn.functional._common import check_flag, without_padding
from sparse_attn.functional.low_rank import linformer_attention, low_rank_attention
from sparse_attn.functional.nystrom import nystrom_attention
from sparse_attn.nn._projected import ProjectedSelfAttention
from sparse_attn.patterns.arguments import index


class _TwoSided(ProjectedSelfAttention):
    """Without a causal form: what stands for the keys depends on all of them."""

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        if options.get("causal", False):
            raise NotImplementedError(
                f"sparse_attn: expected causal=False for {type(self).__name__}, which mixes all "
                "keys, later ones too, into those that it attends to, got True"
            )
        super().__init__(embed_dim, num_heads, **options)


class LinformerSelfAttention(_TwoSided):
    """Multi-head attention to k learned mixtures of keys and of values (Linformer, Wang et al.
    2020), in time and memory linear in the length.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        seq_len: Largest length. Shorter inputs take the first rows of the projections.
        k: Number of mixtures.
        share_kv: One projection for keys and values, `proj_k`, instead of `proj_k` and `proj_v`.
            The key and value themselves stay apart.
        per_head: Projections of its own for each head.
        **options: dropout, bias, device, dtype, as for `SparseSelfAttention`. `causal` must stay
            False.

    Attributes:
        proj_k: (seq_len, k), or (num_heads, seq_len, k) with `per_head`; uniform in ±1 / √k.
        proj_v: The same; None with `share_kv`.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: An argument is out of range; in `forward`, the input is longer than seq_len.
        NotImplementedError: causal is set.

    >>> layer = LinformerSelfAttention(64, 4, seq_len=128, k=16)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        seq_len: int,
        k: int,
        share_kv: bool = False,
        per_head: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_flag("share_kv", share_kv)
        check_flag("per_head", per_head)
        self.seq_len = index("seq_len", seq_len, 1)
        self.k = index("k", k, 1)
        shape = (num_heads,) * per_head + (self.seq_len, self.k)
        like = self.key.weight

        def projection() -> nn.Parameter:
            return nn.Parameter(like.new_empty(shape).uniform_(-1, 1) / math.sqrt(self.k))

        self.proj_k = projection()
        self.register_parameter("proj_v", None if share_kv else projection())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`linformer_attention` with the learned projections."""
        if key.shape[2] > self.seq_len:
            raise ValueError(
                f"sparse_attn: expected x of at most {self.seq_len} tokens (seq_len), got "
                f"{key.shape[2]}"
            )
        return linformer_attention(
            query,
            key,
            value,
            self.proj_k,
            self.proj_v,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )

    def extra_repr(self) -> str:
        """The sizes, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, seq_len={self.seq_len}, k={self.k}"


class LowRankSelfAttention(_TwoSided):
    """Multi-head attention with the keys of each example and head replaced by their best
    approximation of a rank: `sparse_attn.functional.low_rank_attention`.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        rank: At least 1; from embed_dim / num_heads on it is full attention.
        **options: dropout, bias, device, dtype, as for `SparseSelfAttention`. `causal` must stay
            False.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: An argument is out of range.
        NotImplementedError: causal is set.

    >>> layer = LowRankSelfAttention(64, 4, rank=8)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, rank: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.rank = index("rank", rank, 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`low_rank_attention`."""
        options = {"key_padding_mask": key_padding_mask, "dropout_p": self.dropout_p}
        return low_rank_attention(query, key, value, self.rank, **options)

    def extra_repr(self) -> str:
        """The rank, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, rank={self.rank}"


class NystromSelfAttention(_TwoSided):
    """Multi-head attention through landmarks (Nyströmformer, Xiong et al. 2021):
    `sparse_attn.functional.nystrom_attention`, and the paper's convolution over the values.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Number of heads; divides embed_dim.
        num_landmarks: Segments whose means stand for queries and keys.
        iterations: Steps towards the pseudo-inverse; None for the pseudo-inverse itself.
        conv_kernel: Odd number of tokens of a depthwise convolution over the values of each head,
            whose result is added to that of the heads (the paper has 33 or 65); None for none.
        **options: dropout, bias, device, dtype, as for `SparseSelfAttention`. `causal` must stay
            False.

    Raises:
        TypeError: An int is expected and something else given.
        ValueError: An argument is out of range.
        NotImplementedError: causal is set.

    >>> layer = NystromSelfAttention(64, 4, num_landmarks=16, conv_kernel=33)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_landmarks: int,
        iterations: int | None = 6,
        conv_kernel: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.num_landmarks = index("num_landmarks", num_landmarks, 1)
        self.iterations = None if iterations is None else index("iterations", iterations, 1)
        self.conv = None if conv_kernel is None else self._convolution(conv_kernel)

    def _convolution(self, size: int) -> nn.Conv2d:
        size = index("conv_kernel", size, 1)
        if size % 2 == 0:
            raise ValueError(f"sparse_attn: expected conv_kernel to be odd, got {size}")
        return nn.Conv2d(
            self.num_heads,
            self.num_heads,
            (size, 1),
            padding=(size // 2, 0),
            groups=self.num_heads,
            bias=False,
            device=self.key.weight.device,
            dtype=self.key.weight.dtype,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`nystrom_attention`, plus the convolution."""
        heads = nystrom_attention(
            query,
            key,
            value,
            self.num_landmarks,
            iterations=self.iterations,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )
        if self.conv is None or value.shape[2] == 0:
            return heads
        return heads + self.conv(without_padding(value, key_padding_mask))

    def extra_repr(self) -> str:
        """The number of landmarks, in `print(module)`."""
        return f"{self.embed_dim}, {self.num_heads}, num_landmarks={self.num_landmarks}"
