"""ReformerSelfAttention and RoutingSelfAttention."""

import copy
import os
import socket

import pytest
import torch
from cases import DEVICE
from torch import multiprocessing
from torch.nn.functional import normalize

from sparse_attn import ReformerSelfAttention, RoutingSelfAttention
from sparse_attn.functional import chunked_lsh_attention, routing_attention

EMBED, HEADS = 32, 4


def reformer(**options):
    torch.manual_seed(0)
    options = {"num_buckets": 8, "num_hashes": 2, "chunk_length": 16, "device": DEVICE, **options}
    return ReformerSelfAttention(EMBED, HEADS, **options)


def routing(**options):
    torch.manual_seed(0)
    options = {"num_clusters": 5, "window": 12, "device": DEVICE, **options}
    return RoutingSelfAttention(EMBED, HEADS, **options)


LAYERS = {"reformer": reformer, "routing": routing}
ALL = pytest.mark.parametrize("name", LAYERS)


def example(length=50, hidden=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, EMBED, generator=generator).to(DEVICE)
    mask = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    mask[0, length - hidden :] = True
    return x, mask


def heads_of(layer, x):
    return layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_reformer_is_its_function_between_projections(causal):
    layer = reformer(causal=causal)
    x, hidden = example()
    output = chunked_lsh_attention(
        *(heads_of(part, x) for part in (layer.query_key, layer.value)),
        num_buckets=8,
        num_hashes=2,
        chunk_length=16,
        is_causal=causal,
        key_padding_mask=hidden,
    )
    output = layer.output(output.transpose(1, 2).flatten(2))
    assert torch.equal(layer(x, hidden), output)
    assert sorted(layer.state_dict()) == ["output.weight", "query_key.weight", "value.weight"]


@pytest.mark.parametrize("causal", [False, True])
def test_routing_is_its_function_between_projections(causal):
    layer = routing(causal=causal).eval()
    x, hidden = example()
    output = routing_attention(
        *(heads_of(part, x) for part in (layer.query, layer.key, layer.value)),
        layer.centroids,
        window=12,
        is_causal=causal,
        key_padding_mask=hidden,
        query_padding_mask=hidden,
    )
    assert torch.equal(layer(x, hidden), layer.output(output.transpose(1, 2).flatten(2)))


@ALL
def test_padding_does_not_matter(name):
    x, hidden = example()
    other = torch.where(hidden[..., None], 9 * torch.randn_like(x), x)
    results = []
    for given in (x, other):
        layer = LAYERS[name]()
        output = layer(given, hidden)[~hidden]
        (output.square().sum() + getattr(layer, "commitment_loss", 0)).backward()
        gradients = [p.grad for p in layer.parameters()]
        results.append([output, *gradients, *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@ALL
def test_dropout_is_of_training(name):
    layer = LAYERS[name](dropout=0.5)
    x, hidden = example()
    assert not torch.equal(layer(x, hidden), layer(x, hidden))
    layer.eval()
    assert torch.equal(layer(x, hidden), layer(x, hidden))


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(name, dtype):
    layer = LAYERS[name](dtype=dtype)
    x, hidden = example()
    output = layer(x.to(dtype), hidden)
    assert output.dtype == dtype
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@ALL
def test_autocast_inference_and_copies(name):
    layer = LAYERS[name]()
    x, hidden = example()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x, hidden).dtype == torch.bfloat16
    twin = copy.deepcopy(layer).eval()
    twin.load_state_dict(layer.state_dict())
    layer.eval()
    with torch.inference_mode():
        assert torch.equal(layer(x), twin(x))


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_compile(name, training):
    layers = [LAYERS[name]().train(training) for _ in range(2)]
    x, hidden = example()
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    outputs = [layer(x, hidden) for layer in (layers[0], compiled)]
    torch.testing.assert_close(*outputs)
    for layer, output in zip(layers, outputs, strict=True):
        output.square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    for ours, theirs in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reformer_draws_as_its_seed_says():
    x, _ = example()
    fixed, fresh = reformer(), reformer(seed=None)
    assert torch.equal(fixed(x), fixed(x))
    assert not torch.equal(fresh(x), fresh(x))
    walks = [reformer(seed=torch.Generator().manual_seed(0)) for _ in range(2)]
    first, second = ([walk(x) for _ in range(2)] for walk in walks)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(*first)


def test_centroids_follow_the_data():
    layer = routing(decay=0.9)
    x, hidden = example()
    old = layer.centroids.clone()
    layer(x, hidden)
    units = torch.cat([heads_of(part, x) for part in (layer.query, layer.key)], 2)
    seen = ~hidden.repeat(1, 2)
    for head in range(HEADS):
        tokens = normalize(units[:, head][seen].detach(), dim=-1)
        nearest = (tokens @ old[head].mT).argmax(-1)
        for cluster in range(5):
            own = tokens[nearest == cluster]
            expected = old[head, cluster]
            if len(own):
                mean = normalize(own.mean(0), dim=-1)
                expected = normalize(0.9 * expected + 0.1 * mean, dim=-1)
            torch.testing.assert_close(layer.centroids[head, cluster], expected)


def test_centroids_stay_in_evaluation():
    layer = routing()
    x, _ = example()
    old = layer.centroids.clone()
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert torch.equal(layer.centroids, old)
    assert layer.commitment_loss == 0


def test_commitment_loss():
    layer = routing(commitment=0.5)
    x, hidden = example()
    old = layer.centroids.clone()
    layer(x, hidden)
    units = torch.cat([heads_of(part, x) for part in (layer.query, layer.key)], 2)
    tokens = normalize(units, dim=-1).transpose(0, 1)[:, ~hidden.repeat(1, 2)]
    nearest = (tokens @ old.mT).argmax(-1)
    distance = torch.stack([tokens[h] - old[h, nearest[h]] for h in range(HEADS)])
    expected = 0.5 * distance.square().mean()
    torch.testing.assert_close(layer.commitment_loss, expected)
    grads = [
        torch.autograd.grad(loss, layer.query.weight)[0]
        for loss in (layer.commitment_loss, expected)
    ]
    torch.testing.assert_close(*grads)


def test_two_passes_before_one_backward():
    layer = routing(decay=0.5)
    x, hidden = example()
    first = layer(x).sum() + layer.commitment_loss
    second = layer(x, hidden).sum() + layer.commitment_loss
    (first + second).backward()


def test_fit_centroids():
    layer = routing(num_clusters=3)
    x, hidden = example()
    x[hidden] = 100.0

    def spread():
        query, key = (heads_of(part, x) for part in (layer.query, layer.key))
        units = normalize(torch.cat([query, key], 2).transpose(0, 1), dim=-1)
        return (units[:, ~hidden.repeat(1, 2)] @ layer.centroids.mT).amax(-1).mean()

    before = spread()
    layer.fit_centroids(x, hidden)
    torch.testing.assert_close(layer.centroids.norm(dim=-1), torch.ones(HEADS, 3, device=DEVICE))
    assert spread() > before
    again = layer.centroids.clone()
    layer.fit_centroids(x, hidden)
    assert torch.equal(layer.centroids, again)


def _train(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    layer = routing(device=None)
    x, _ = example(hidden=0)
    layer(x[rank : rank + 1].cpu())
    results[rank] = layer.centroids
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_processes_share_their_sums():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_train, (port, results), nprocs=2)
        first, second = results[0], results[1]
    layer = routing(device=None)
    layer(example(hidden=0)[0].cpu())
    assert torch.equal(first, second)
    torch.testing.assert_close(first, layer.centroids)


@pytest.mark.parametrize(
    ("make", "error", "options"),
    [
        (reformer, ValueError, {"num_buckets": 3}),
        (reformer, ValueError, {"num_hashes": 0}),
        (reformer, ValueError, {"dropout": 2.0}),
        (routing, ValueError, {"window": 0}),
        (routing, ValueError, {"num_clusters": 0}),
        (routing, ValueError, {"decay": 1.5}),
        (routing, TypeError, {"window": 1.5}),
    ],
)
def test_wrong_arguments(make, error, options):
    with pytest.raises(error, match="sparse_attn: expected"):
        make(**options)
