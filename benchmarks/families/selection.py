"""The k largest logits of each query, beside torch: products, torch.topk, a gather."""

import math
from argparse import Namespace

import torch
from torch import Tensor

from families import OURS, Calls, check_equal, leaves
from sparse_attn.functional import topk_attention


def calls(args: Namespace) -> dict[str, Calls]:
    """By case."""
    found = {}
    for k in args.k:
        x = leaves(args)
        found[f"top {k}"] = {
            OURS: (lambda x=x, k=k: topk_attention(*x, k), x),
            "torch": (lambda x=x, k=k: torch_topk(*x, k), x),
        }
        check_equal(found[f"top {k}"], 1e-4)
    return found


def torch_topk(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    """The softmax over the largest logits, times the values gathered for each query."""
    logits, indices = (query @ key.mT / math.sqrt(query.shape[-1])).topk(k)
    heads = value.shape[0] * value.shape[1]
    first = torch.arange(heads).view(*value.shape[:2], 1, 1) * value.shape[2]
    chosen = value.flatten(0, 2).index_select(0, (indices + first).flatten())
    weights = logits.softmax(-1).unsqueeze(-2)
    return (weights @ chosen.view(*indices.shape, -1)).squeeze(-2)
