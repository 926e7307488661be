"""A training step of Hugging Face's Longformer layer, before and after `replace_attention`.

The shape is that of Longformer-base: 12 heads, 768 channels, a window of 512, 4096 tokens, the
first one global. Three things are timed, interleaved, forward and backward:

    layer   the whole encoder layer with its optimizer (AdamW)
    module  its attention module, with the six projections
    core    the attention module, its projections taken out

The peak memory of a step of the layer is measured in a process for each, beyond the parameters.

    python benchmarks/longformer_layer.py                  # about 3 minutes
    python benchmarks/longformer_layer.py --dropout 0      # without dropout
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import report
import torch
from memory import PeakMemory
from peers import Given
from timing import interleave
from torch import Tensor, nn

from sparse_attn.huggingface import replace_attention

BEFORE, AFTER = "transformers", "sparse_attn"
PARTS = ("layer", "module", "core")


class Step:
    """One training step of a part: forward, backward and, of the layer, the optimizer."""

    def __init__(self, layer: nn.Module, part: str, args: argparse.Namespace):
        self.length, self.part = args.length, part
        self.module = layer if part == "layer" else layer.attention.self
        shape = (args.batch, args.length, args.embed_dim)
        self.x = torch.randn(shape, requires_grad=True)
        self.grad = torch.randn(shape)
        is_global = torch.zeros(shape[:2], dtype=torch.bool)
        is_global[:, : args.globals] = True
        self.masks = {
            "attention_mask": torch.zeros(shape[:2]).masked_fill(is_global, 1e4),
            "is_index_masked": torch.zeros_like(is_global),
            "is_index_global_attn": is_global,
            "is_global_attn": args.globals > 0,
        }
        self.given = self._take_projections_out(args.globals) if part == "core" else []
        self.optimizer = None
        if part == "layer":
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)

    def __call__(self) -> Tensor:
        for projection in self.given:
            projection.value = projection.source()
        output = self.module(self.x, **self.masks)[0]
        output.backward(self.grad)
        if self.optimizer is not None:
            self.optimizer.step()
        for tensor in (self.x, *self.leaves(), *self.module.parameters()):
            tensor.grad = None
        return output

    def leaves(self) -> list[Tensor]:
        return [projection.tensor for projection in self.given]

    def _take_projections_out(self, tokens: int) -> list[Given]:
        """The original scales queries in place, takes (length, batch, embed_dim), and of the global
        queries the global tokens alone.
        """
        original = BEFORE in type(self.module).__module__
        given = []
        for name in ("query", "key", "value"):
            tensor = torch.randn_like(self.x).requires_grad_()
            for suffix in ("", "_global"):
                projection = Given()
                projection.tensor = tensor
                projection.source = lambda x=tensor: x
                if original:
                    count = tokens if name + suffix == "query_global" else self.length
                    projection.source = lambda x=tensor, count=count: x.transpose(0, 1)[
                        :count
                    ].clone()
                setattr(self.module, name + suffix, projection)
                given.append(projection)
        return given


def make_layer(args: argparse.Namespace) -> nn.Module:
    """Hugging Face's layer in training, of drawn weights."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerLayer

    config = LongformerConfig(
        hidden_size=args.embed_dim,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.embed_dim,
        attention_window=[args.window],
        attention_probs_dropout_prob=args.dropout,
        hidden_dropout_prob=args.dropout,
    )
    torch.manual_seed(args.seed)
    return LongformerLayer(config, 0).train()


def layers(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Before and after."""
    layer = make_layer(args)
    return {BEFORE: layer, AFTER: replace_attention(copy.deepcopy(layer))}


def check(args: argparse.Namespace) -> None:
    """Raises unless both compute the same."""
    results = []
    for layer in layers(args).values():
        torch.manual_seed(args.seed)
        results.append(Step(layer.eval(), "layer", args)())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def time_steps(args: argparse.Namespace) -> dict[str, dict]:
    """Of each part the times of both, and their ratio."""
    tasks: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for part in PARTS:
        for name, layer in layers(args).items():
            tasks[part, name] = Step(layer, part, args)
    times = interleave(tasks, args.rounds, args.seconds, args.seed)
    found = {}
    for part in PARTS:
        before, after = times[part, BEFORE], times[part, AFTER]
        found[part] = {
            BEFORE: before.summary(),
            AFTER: after.summary(),
            "ratio": before.median / after.median,
        }
        print(
            f"{part:8} {1e3 * before.median:8.1f} ms {1e3 * after.median:8.1f} ms "
            f"{found[part]['ratio']:6.2f} x"
        )
    return found


def memory_of(name: str, args: argparse.Namespace) -> int:
    """Bytes that a step of the layer needs at its peak beyond what was there before it."""
    layer = layers(args)[name]
    short = argparse.Namespace(**{**vars(args), "length": 2 * args.window})
    Step(layer, "layer", short)()  # loads libraries and starts threads
    step = Step(layer, "layer", args)
    peak = PeakMemory()
    step()
    return peak.rise()


def memory_apart(args: argparse.Namespace) -> dict[str, float]:
    """`memory_of` both, each in a process of its own."""
    found = {}
    for name in (BEFORE, AFTER):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.splitlines()[-1])
    found["ratio"] = found[BEFORE] / found[AFTER]
    mebibytes = " ".join(f"{found[name] / 2**20:8.0f} MiB" for name in (BEFORE, AFTER))
    print(f"{'memory':8} {mebibytes} {found['ratio']:6.2f} x")
    return found


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 1),
        ("length", 4096),
        ("heads", 12),
        ("embed-dim", 768),
        ("window", 512),
        ("globals", 1),
        ("rounds", 6),
        ("threads", torch.get_num_threads()),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.1, help="of Longformer-base: 0.1")
    parser.add_argument("--seconds", type=float, default=12.0, help="spent on each task")
    parser.add_argument("--memory-of", choices=[BEFORE, AFTER], help="print the bytes of one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(args.memory_of, args))
        return
    check(args)
    print(f"{'':8} {BEFORE:>11} {AFTER:>11}")
    result = {
        "environment": report.environment(),
        "options": {k: v for k, v in vars(args).items() if k not in ("out", "memory_of")},
        "times": time_steps(args),
        "memory_bytes": memory_apart(args),
    }
    path = args.out / f"longformer_layer_{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
