"""Export a Longformer layer ahead of time, for a C++ program without Python.

Writes a package that AOTInductor compiled for any length, and one input with the layer's output:
`examples/cpp/exported.cpp` loads and runs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_attn import LongformerSelfAttention

WIDTH, HEADS, LENGTH = 64, 4, 500


class Encoder(nn.Module):
    """A Longformer layer whose first token is global."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = LongformerSelfAttention(
            WIDTH, HEADS, attention_window=32, dilation=(1, 1, 2, 2)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_global = torch.arange(hidden_states.shape[1], device=hidden_states.device) == 0
        marks = is_global.expand(hidden_states.shape[:2]).long()
        return self.attention(hidden_states, None, marks)[0]


def export(model: nn.Module, folder: Path) -> Path:
    """Compile a model of (1, any length, WIDTH) and write it, with an example, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.randn(1, LENGTH, WIDTH)
    length = torch.export.Dim("length", min=2, max=65536)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({1: length},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "longformer.pt2")
        )
        other = torch.randn(1, LENGTH // 3, WIDTH)  # another length than it was exported with
        for name, tensor in (("input", other), ("output", model(other))):
            (folder / f"{name}.bin").write_bytes(tensor.contiguous().numpy().tobytes())
    return Path(package)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/exported"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the layer's weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    print("wrote", export(Encoder().eval(), arguments.out))


if __name__ == "__main__":
    main()
