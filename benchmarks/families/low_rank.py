"""Linformer's and Nyströmformer's attention, beside the packages `linformer` and
`nystrom_attention`."""

from argparse import Namespace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from families import OURS, Calls, check_equal, leaf, leaves
from sparse_attn.functional import linformer_attention, nystrom_attention


def calls(args: Namespace) -> dict[str, Calls]:
    """By case."""
    return {"linformer": _linformer(args), "nystrom": _nystrom(args)}


def package_linformer(query: Tensor, key: Tensor, value: Tensor, *projections: Tensor) -> Tensor:
    """What linformer.LinformerSelfAttention (0.2.3) computes between its linear layers: its module
    takes x, and makes keys of all heads side by side; here they are given so."""
    batch, heads, _, size = query.shape
    mixed = []
    for x, projection in zip((key, value), projections, strict=True):
        rows = torch.einsum("bnd,nk->bkd", x.transpose(1, 2).flatten(2), projection)
        mixed.append(rows.reshape(batch, -1, heads, size).transpose(1, 2))
    shares = (torch.einsum("bhnd,bhkd->bhnk", query, mixed[0]) * size**-0.5).softmax(dim=-1)
    return torch.einsum("bhnk,bhkd->bhnd", shares, mixed[1])


def _linformer(args: Namespace) -> Calls:
    # As a layer has them: heads side by side in memory.
    shape = (args.batch, args.length, args.heads, args.head_dim)
    rows = [leaf(args.seed + i, *shape) for i in range(3)]
    projections = [leaf(args.seed + 3 + i, args.length, args.mixtures) for i in range(2)]
    x = [*(row.transpose(1, 2) for row in rows), *(p / args.mixtures**0.5 for p in projections)]
    x = [tensor.detach().requires_grad_() for tensor in x]
    found = {
        OURS: (lambda: linformer_attention(*x), x),
        "linformer": (lambda: package_linformer(*x), x),
    }
    check_equal(found, 1e-4)
    return found


def _nystrom(args: Namespace) -> Calls:
    x = leaves(args)
    found: Calls = {OURS: (lambda: nystrom_attention(*x, args.mixtures), x)}
    if find_spec("nystrom_attention"):
        from nystrom_attention import NystromAttention

        layer = NystromAttention(
            args.heads * args.head_dim,
            dim_head=args.head_dim,
            heads=args.heads,
            num_landmarks=args.mixtures,
            residual=False,
        )
        layer.to_qkv, layer.to_out = nn.Identity(), nn.Identity()

        def theirs() -> Tensor:
            rows = torch.cat([t.transpose(1, 2).flatten(2) for t in x], -1)
            return layer(rows).unflatten(-1, (args.heads, -1)).transpose(1, 2)

        found["nystrom_attention"] = (theirs, x)
        # The iterations for the pseudo-inverse start from different points.
        check_equal(found, 0.2)
    return found
