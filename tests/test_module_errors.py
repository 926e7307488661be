"""Wrong arguments and inputs of the layers: an exception that names what was expected."""

import math

import pytest
import torch
from cases import DEVICE

import sparse_attn
from sparse_attn import Window

LAYERS = {
    "longformer": ("LongformerSelfAttention", {"attention_window": 4}, "hidden_states"),
    "longformer_layer": ("LongformerLayer", {"attention_window": 4}, "hidden_states"),
    "bigbird": ("BigBirdSelfAttention", {"block": 2}, "query"),
    "sparse": ("SparseSelfAttention", {"pattern": Window(2)}, "query"),
    "transformer": ("SparseTransformerBlock", {"pattern": Window(2)}, "x"),
    "etc": ("ETCSelfAttention", {"radius": 2}, None),
    "learned": ("LearnedSparseSelfAttention", {"pattern": Window(2)}, "x"),
    "linformer": ("LinformerSelfAttention", {"seq_len": 8, "k": 2}, "x"),
    "reformer": ("ReformerSelfAttention", {"num_buckets": 2, "chunk_length": 4}, "x"),
    "routing": ("RoutingSelfAttention", {"num_clusters": 2, "window": 2}, "x"),
}


def make(name, **options):
    kind, own, _ = LAYERS[name]
    return getattr(sparse_attn, kind)(8, 2, **{"device": DEVICE, **own, **options})


FLAGS = [
    ("longformer", "causal"),
    ("longformer", "bias"),
    ("longformer_layer", "causal"),
    ("longformer_layer", "recompute"),
    ("bigbird", "causal"),
    ("bigbird", "bias"),
    ("sparse", "causal"),
    ("sparse", "bias"),
    ("sparse", "redraw"),
    ("transformer", "causal"),
    ("transformer", "bias"),
    ("transformer", "recompute"),
    ("etc", "bias"),
    ("etc", "share_kv_projections"),
    ("etc", "share_qkv_projections"),
    ("etc", "share_att_output_projection"),
    ("linformer", "share_kv"),
    ("linformer", "per_head"),
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_are_bools(name, flag):
    with pytest.raises(
        TypeError, match=f"^sparse_attn: expected {flag} to be True or False, got 'False'"
    ):
        make(name, **{flag: "False"})


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("learned", "initial", math.nan, ValueError),
        ("learned", "initial", "3", TypeError),
        ("longformer_layer", "layer_norm_eps", -1, ValueError),
        ("longformer_layer", "layer_norm_eps", math.nan, ValueError),
        ("routing", "commitment", math.inf, ValueError),
        ("routing", "commitment", 10**400, ValueError),
        ("routing", "decay", math.nan, ValueError),
        ("routing", "window", 2**70, ValueError),
        ("transformer", "mlp_ratio", "4", TypeError),
        ("transformer", "mlp_ratio", math.inf, ValueError),
        ("bigbird", "max_length", -1, ValueError),
        ("bigbird", "max_length", "3", TypeError),
        ("reformer", "max_length", [], TypeError),
        ("longformer", "dtype", torch.int32, TypeError),
        ("sparse", "dtype", "float", TypeError),
    ],
)
def test_numbers(name, option, value, error):
    with pytest.raises(error, match=f"^sparse_attn: expected {option} "):
        make(name, **{option: value})


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer[2]])
def test_another_dtype_or_device(name):
    layer, x = make(name), torch.randn(1, 6, 8, device=DEVICE)
    named = LAYERS[name][2]
    with pytest.raises(TypeError, match=f"^sparse_attn: expected {named} of dtype torch.float32"):
        layer(x.double())
    if (
        name == "reformer"
    ):  # torch multiplies a meta tensor with a real weight where no bias is added
        return
    with pytest.raises(ValueError, match=f"^sparse_attn: expected {named} on device .*, got meta"):
        layer(x.to("meta"))


@pytest.mark.parametrize("mask", ["attention_mask", "global_attention_mask"])
@pytest.mark.parametrize("name", ["longformer", "longformer_layer"])
def test_masks_are_tensors(name, mask):
    x = torch.randn(1, 6, 8, device=DEVICE)
    with pytest.raises(TypeError, match=f"^sparse_attn: expected {mask} to be a Tensor, got list"):
        make(name)(x, **{mask: [[1] * 6]})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere it would wait for the device")
@pytest.mark.parametrize("value", [-1e4, -math.inf, math.nan])
def test_masks_are_not_added_to_logits(value):
    layer, x = make("longformer"), torch.randn(1, 6, 8)
    mask = torch.zeros(1, 6)
    mask[0, 4:] = value
    with pytest.raises(ValueError, match=r"^sparse_attn: expected attention_mask of 1 and 0, "):
        layer(x, mask)
    layer(x, torch.ones(1, 6), torch.zeros(1, 6))
    torch.func.vmap(lambda x, mask: layer(x[None], mask[None])[0])(x, mask)  # shows no numbers


def test_a_star_import_leaves_torchs_names_alone():
    names = {}
    exec("from torch import nn\nfrom sparse_attn import *", names)
    assert names["nn"] is torch.nn
    assert sparse_attn.nn.LongformerSelfAttention is sparse_attn.LongformerSelfAttention
