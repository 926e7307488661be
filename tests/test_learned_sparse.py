"""The learned gate: its numbers, its loss, what it hardens to, and what training finds."""

import cases
import pytest
import torch
from cases import DEVICE
from composed import dense

from sparse_attn import Causal, Full, Global, LearnedSparseSelfAttention, PerHead, Window, attention

KINDS = {
    "toeplitz": {},
    "slot": {"parametrisation": "slot", "seq_len": 40},
    "block": {"parametrisation": "block", "seq_len": 40, "block": 7},
    "dense": {"parametrisation": "dense", "seq_len": 40},
}
PATTERNS = {
    "window": Window(5, 3),
    "global": Window(5, 3) | Global([0]),
    "causal": (Window(5, 3) | Global([0])) & Causal(),
    "heads": PerHead([Window(5, 3), Window(3, 5, dilation=2)]),
}


def make(kind, pattern="window", heads=2, **options):
    layer = LearnedSparseSelfAttention(
        8 * heads, heads, pattern=PATTERNS[pattern], dtype=torch.float64, **KINDS[kind], **options
    )
    with torch.no_grad():
        numbers = cases.normal(*layer.gate_logits.shape, seed=7)
        layer.gate_logits.copy_(2 * numbers)
    return layer.to(DEVICE)


def pair_gates(layer, n):
    """The gate of every pair, (heads, n, n), and whether P has a number for it, by loops."""
    gates = torch.ones(layer.num_heads, n, n, dtype=torch.float64)
    learned = torch.zeros(layer.num_heads, n, n, dtype=torch.bool)
    open_share = torch.sigmoid(layer.gate_logits.detach()).cpu()
    parts = layer.pattern.patterns if isinstance(layer.pattern, PerHead) else [layer.pattern]
    for h in range(layer.num_heads):
        heads_window = parts[h * len(parts) // layer.num_heads]
        left, dilation = (3, 2) if "dilation" in repr(heads_window) else (5, 1)
        for i in range(n):
            for j in range(n):
                slot, rest = (j - i) // dilation + left, (j - i) % dilation
                if layer.parametrisation == "dense":
                    place = (h, i, j)
                elif layer.parametrisation == "block":
                    place = (h, i // 7, j // 7)
                elif rest or not 0 <= slot < 9:
                    continue
                else:
                    place = (h, slot) if layer.parametrisation == "toeplitz" else (h, i, slot)
                gates[h, i, j] = open_share[place]
                learned[h, i, j] = True
    return gates.to(DEVICE), learned.to(DEVICE)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    @pytest.mark.parametrize("length", [40, 23])
    def test_output(self, kind, pattern, length):
        layer = make(kind, pattern)
        x = cases.normal(2, length, 16)
        padding = cases.padding(2, length)
        heads = [
            p(x).unflatten(-1, (2, 8)).transpose(1, 2)
            for p in (layer.query, layer.key, layer.value)
        ]
        allowed = layer.pattern.mask(length, heads=2).to(DEVICE)
        gates, _ = pair_gates(layer, length)
        expected = dense(*heads, padding, gate=gates, allowed=allowed)
        expected = layer.output(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, padding), expected)
        layer(x, padding).sum().backward()
        assert layer.gate_logits.grad.any()

    @pytest.mark.parametrize("length", [40, 23])
    def test_harden(self, kind, pattern, length):
        """The pairs with an open gate, and those of the global token."""
        layer = make(kind, pattern)
        gates, _ = pair_gates(layer, length)
        allowed = layer.pattern.mask(length, heads=2).to(DEVICE)
        for threshold in (0.5, 0.9, 0.0, 1.0):
            hard = layer.harden(threshold, length).mask(length, heads=2)
            expected = allowed & (gates >= threshold)
            if kind in ("toeplitz", "slot"):
                token = (Global([0]) & layer.pattern).mask(length, heads=2).to(DEVICE)
                expected = expected | (token if "Global" in repr(layer.pattern) else False)
            assert torch.equal(hard.view(2, length, length).to(DEVICE), expected), threshold

    def test_sparsity_loss(self, kind, pattern):
        length = 40
        layer = make(kind, pattern)
        gates, learned = pair_gates(layer, length)
        counted = layer.pattern.mask(length, heads=2).to(DEVICE) & learned
        if kind == "toeplitz":  # every slot alike, however near the ends cut it
            share = layer.sparsity_loss()
            last = counted[:, length // 2] if pattern != "global" else learned[:, length // 2]
            expected = gates[:, length // 2][last].mean()
        else:
            share, expected = layer.sparsity_loss(), gates[counted].mean()
        torch.testing.assert_close(share, expected)
        share.backward()
        assert layer.gate_logits.grad.any()


def test_hardened_pattern_runs_and_reads():
    layer = make("toeplitz")
    with torch.no_grad():
        layer.gate_logits.fill_(-3)
        layer.gate_logits[0, 3:7] = 3  # distances −2 … 1
        layer.gate_logits[1, [0, 8]] = 3  # distances −5 and 3
    hard = layer.harden()
    assert hard.patterns[0] == Window(2, 1)
    assert repr(hard.patterns[1]) == "OpenSlots(<distances [-5, 3]>)"
    for n_q, n_k in ((30, 30), (10, 30), (1, 30), (9, 4)):
        tensors = [cases.normal(1, 2, n, 8, seed=n) for n in (n_q, n_k, n_k)]
        distance = torch.arange(n_k)[None] - torch.arange(n_q)[:, None] - (n_k - n_q)
        near, far = (distance >= -2) & (distance <= 1), (distance == -5) | (distance == 3)
        allowed = torch.stack([near, far]).to(DEVICE)
        torch.testing.assert_close(attention(*tensors, hard), dense(*tensors, allowed=allowed))
    with torch.no_grad():
        layer.gate_logits.fill_(-3)
    assert not attention(*tensors, layer.harden()).any()


def test_training_finds_planted_distances():
    """The answer of each token is the mean of the tokens 3 before and 2 after: of all slots, those
    two stay open."""
    torch.manual_seed(0)
    length, channels = 48, 8
    layer = LearnedSparseSelfAttention(channels, 1, pattern=Window(5), initial=0.0, bias=False)
    layer = layer.to(DEVICE)
    with torch.no_grad():  # products of all pairs alike: only the gate can tell them apart
        for projection in (layer.value, layer.output):
            projection.weight.copy_(torch.eye(channels))
        for projection in (layer.query, layer.key):
            projection.weight.copy_(torch.eye(channels) * 0)
            projection.weight[:, 0] = 2
    optimizer = torch.optim.Adam([layer.gate_logits], lr=0.2)
    for _ in range(120):
        x = torch.randn(8, length, channels, device=DEVICE)
        x[..., 0] = 1
        target = (x.roll(3, 1) + x.roll(-2, 1)) / 2
        error = (layer(x) - target)[:, 5:-5].square().mean()
        optimizer.zero_grad()
        (error + 0.01 * layer.sparsity_loss()).backward()
        optimizer.step()
    found = (layer.gate[0] >= 0.5).nonzero()[:, 0] - 5
    assert found.tolist() == [-3, 2]
    assert layer.harden().cost(1000).pairs < 2 * 1000
    assert layer.sparsity_loss() < 0.25


def test_state_compile_and_types():
    layer = make("toeplitz", "heads", heads=4).float().eval()
    other = LearnedSparseSelfAttention(32, 4, pattern=PATTERNS["heads"]).to(DEVICE).eval()
    layer.sparsity_loss()
    other.load_state_dict(layer.state_dict())
    x = cases.normal(2, 33, 32, dtype=torch.float32)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.sparsity_loss(), other.sparsity_loss())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.sparsity_loss().dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": 3}, TypeError, "pattern to be a Pattern"),
        ({"pattern": Full()}, ValueError, "exactly one finite Window"),
        ({"pattern": PerHead([Window(1), Window(2)])}, ValueError, "same number of slots"),
        ({"pattern": PerHead([Window(1)] * 3)}, ValueError, "heads that divides 2, got 3"),
        ({"parametrisation": "free"}, ValueError, "toeplitz, slot, block, dense, got 'free'"),
        ({"parametrisation": "slot"}, ValueError, "seq_len with parametrisation 'slot'"),
        ({"parametrisation": "block", "seq_len": 9}, ValueError, "block if and only if"),
        ({"block": 4}, ValueError, "block if and only if"),
        ({"parametrisation": "dense", "seq_len": 0}, ValueError, "seq_len to be at least 1"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        LearnedSparseSelfAttention(16, 2, **{"pattern": Window(4), **options})


def test_longer_inputs_are_refused():
    for kind in ("slot", "block", "dense"):
        layer = make(kind)
        with pytest.raises(ValueError, match=r"at most 40 tokens \(seq_len\), got 41"):
            layer(cases.normal(1, 41, 16))
        with pytest.raises(ValueError, match=r"at most 40 tokens \(seq_len\), got 50"):
            layer.harden(length=50)
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\], got 2"):
        make("toeplitz").harden(2)
