"""Performer beside performer_pytorch, with the same projection, and linear attention."""

from argparse import Namespace
from importlib.util import find_spec

from families import OURS, Calls, check_equal, leaves
from sparse_attn.functional import linear_attention, performer_attention


def calls(args: Namespace) -> dict[str, Calls]:
    """By case."""
    found: dict[str, Calls] = {}
    for causal, name in ((False, "performer"), (True, "performer, causal")):
        found[name] = _performer(args, causal)
        x = leaves(args)
        elu = {OURS: (lambda x=x, causal=causal: linear_attention(*x, is_causal=causal), x)}
        found[name.replace("performer", "linear (elu + 1)")] = elu
    return found


def _performer(args: Namespace, causal: bool) -> Calls:
    x = leaves(args)
    if not find_spec("performer_pytorch"):
        return {OURS: (lambda: performer_attention(*x, is_causal=causal), x)}
    from performer_pytorch import performer_pytorch as package

    theirs = package.FastAttention(args.head_dim)
    projection = theirs.projection_matrix
    ours = (lambda: performer_attention(*x, projection=projection, is_causal=causal), x)
    found = {OURS: ours, "performer_pytorch": (lambda: theirs(*x), x)}
    if causal:
        # Its own causal form asks for another package's CUDA kernels; on the CPU it falls back to
        # this chunked one. One maximum is shared by all rows there, so the numbers differ.
        theirs.causal, theirs.causal_linear_fn = True, package.causal_linear_attention_noncuda
    else:
        check_equal(found, 1e-3)
    return found
