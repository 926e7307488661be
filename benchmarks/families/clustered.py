"""Chunks of hashed tokens and clusters, beside transformers and the packages of both papers."""

from argparse import Namespace
from importlib.util import find_spec

import torch
from torch import nn

from families import OURS, Calls, leaf, leaves
from sparse_attn.functional import chunked_lsh_attention, routing_attention


def calls(args: Namespace) -> dict[str, Calls]:
    """By case. The draws of the packages differ, so the numbers do; the work is the same."""
    return {"reformer, causal": _reformer(args), "routing": _routing(args)}


def _reformer(args: Namespace) -> Calls:
    """One round of hashing; chunks see themselves and the one before."""
    buckets = 2 * args.length // args.chunk
    query_key, value, _ = leaves(args)

    def ours():
        return chunked_lsh_attention(
            query_key, value, num_buckets=buckets, chunk_length=args.chunk, is_causal=True
        )

    found: Calls = {OURS: (ours, [query_key, value])}
    if find_spec("transformers"):
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        config = ReformerConfig(
            attn_layers=["lsh"],
            num_attention_heads=args.heads,
            attention_head_size=args.head_dim,
            hidden_size=args.heads * args.head_dim,
            num_hashes=1,
            num_buckets=buckets,
            lsh_attn_chunk_length=args.chunk,
            is_decoder=True,
            lsh_attention_probs_dropout_prob=0.0,
            hash_seed=args.seed,
        )
        layer = LSHSelfAttention(config)
        layer.query_key, layer.value = nn.Identity(), nn.Identity()
        x = leaf(args.seed, args.batch, args.length, args.heads * args.head_dim)
        found["transformers"] = (lambda: layer(x).hidden_states, [x])
    if find_spec("reformer_pytorch"):
        from reformer_pytorch.reformer_pytorch import LSHAttention

        package = LSHAttention(
            bucket_size=args.chunk,
            n_hashes=1,
            causal=True,
            attend_across_buckets=True,
            allow_duplicate_attention=True,
        )
        flat = (args.batch * args.heads, args.length, args.head_dim)
        both = [leaf(args.seed + i, *flat) for i in range(2)]
        found["reformer_pytorch"] = (lambda: package(*both)[0], both)
    return found


def _routing(args: Namespace) -> Calls:
    """As many clusters as windows fit the length."""
    clusters = max(1, args.length // args.window)
    x = leaves(args)
    centroids = nn.functional.normalize(torch.randn(args.heads, clusters, args.head_dim), dim=2)
    found: Calls = {OURS: (lambda: routing_attention(*x, centroids, window=args.window), x)}
    if find_spec("routing_transformer"):
        from routing_transformer.routing_transformer import KmeansAttention

        layer = KmeansAttention(clusters, args.window, args.heads, args.head_dim).eval()
        layer.kmeans.means.copy_(centroids)
        layer.kmeans.initted.fill_(True)
        found["routing_transformer"] = (lambda: layer(*x)[0], x)
    return found
