"""Wrong options of the functions that choose keys by content, and of features."""

import pytest
import torch
from cases import DEVICE

from sparse_attn import Window
from sparse_attn.functional import (
    chunked_lsh_attention,
    low_rank_attention,
    lsh_attention,
    orthogonal_features,
    performer_attention,
    routing_attention,
)

QUERY, KEY, VALUE = torch.randn(3, 2, 2, 12, 4, device=DEVICE).unbind()
ROTATIONS = torch.randn(2, 4, 1, 2, device=DEVICE)


def lsh(**options):
    return lsh_attention(QUERY, KEY, VALUE, num_buckets=4, **options)


def chunked(**options):
    return chunked_lsh_attention(QUERY, VALUE, num_buckets=4, chunk_length=4, **options)


def routing(**options):
    return routing_attention(QUERY, KEY, VALUE, QUERY[0], window=3, **options)


def low_rank(query=QUERY, **options):
    return low_rank_attention(query, KEY, VALUE, **{"rank": 2, **options})


def performer(**options):
    return performer_attention(QUERY, KEY, VALUE, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lsh(seed=2**63), ValueError, "seed to have 64 bits"),
        (lambda: chunked(seed=-(2**70)), ValueError, "seed to have 64 bits"),
        (lambda: lsh(rotations=ROTATIONS, num_hashes=2), ValueError, "rotations of num_hashes = 2"),
        (lambda: chunked(rotations=ROTATIONS, num_hashes=3), ValueError, "got 1"),
        (lambda: routing(sink=torch.zeros(5, device=DEVICE)), ValueError, "sink of shape"),
        (lambda: routing(sink=1.0), TypeError, "sink to be a floating-point Tensor, got float"),
        (lambda: routing(enable_gqa=1), TypeError, "enable_gqa to be True or False, got 1"),
        (lambda: routing(return_lse=1), TypeError, "return_lse to be True or False, got 1"),
        (lambda: low_rank(rank=True), TypeError, "rank to be an int, got True"),
        (lambda: low_rank(QUERY.to_sparse()), TypeError, "query to be a dense Tensor"),
        (lambda: performer(num_features=True), TypeError, "num_features to be an int, got True"),
        (lambda: performer(kernel=["relu"]), ValueError, "kernel to be one of"),
        (lambda: orthogonal_features(3, 4, dtype=torch.int32), TypeError, "floating-point dtype"),
        (lambda: Window(True), TypeError, "left to be an int, got True"),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=f"^sparse_attn: expected .*{message}"):
        call()
