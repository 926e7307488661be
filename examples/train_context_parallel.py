"""Train the byte-level model of train_long_text.py on sequences that no process holds whole.

    torchrun --nproc-per-node 2 examples/train_context_parallel.py

Each process holds a part of every sequence. Attention gets what it needs of the others from
`sparse_attn.distributed.context_parallel_attention`: the halo of each layer's dilated window and
byte 0. Beside it the first process trains the same model on whole sequences, and the losses are
compared step by step (--alone-steps 0 leaves that out). It also runs without torchrun, as one
process.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from long_text.command import HelpFormatter, add_size_options, count, positive
from long_text.data import DataError, load_corpus, training_batch
from long_text.model import ByteModel, Config, build_model

from sparse_attn.distributed import context_parallel_attention, count_traffic

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    whole, config = positive(int), Config()
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="train on this file, not the Python reference")
    add("--length", type=whole, default=32768, help="bytes of a sequence")
    add("--batch", type=whole, default=1, help="sequences of a step")
    add_size_options(add, config)
    add("--window", type=whole, default=config.window, help="keys to the left")
    add("--steps", type=whole, default=4, help="updates")
    add("--learning-rate", type=positive(float), default=1e-3, help="of AdamW")
    add("--seed", type=int, default=0, help="of the parameters and the text")
    add("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    add("--alone-steps", type=count, default=None,
        help="steps of the process alone to compare with; all if not given")  # fmt: skip
    return parser


class Shards:
    """Where each rank's part of a sequence lies: as even as can be."""

    def __init__(self, length: int) -> None:
        ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.lengths = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
        self.start = sum(self.lengths[: self.rank])
        self.stop = self.start + self.lengths[self.rank]

    def shard(self, model: ByteModel) -> None:
        """Makes the attention of a model that over all ranks."""
        for block in model.blocks:
            block.attention = partial(context_parallel_attention, lengths=self.lengths)

    def loss(self, model: ByteModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """This rank's share of the loss of whole sequences: the ranks' shares add up to it."""
        before = F.pad(inputs, (2, 0))[:, self.start : self.start + 2]
        part = slice(self.start, self.stop)
        caches = [None] * len(model.blocks)
        logits = model.from_place(inputs[:, part], before, self.start, caches)
        return summed(logits, targets[:, part]) / targets.numel()


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of all bytes."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, *, over_ranks: bool) -> float:
    """One step; returns the loss, over all ranks if they share it."""
    optimizer.zero_grad()
    loss.backward()
    loss = loss.detach()
    if over_ranks:
        dist.all_reduce(loss)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter.grad)
    optimizer.step()
    return loss.item()


def train(args: argparse.Namespace) -> float:
    """Trains, prints a line for each step, and returns the largest difference of the losses."""
    corpus = load_corpus(args.text, args.length)
    config = Config(layers=args.layers, width=args.width, heads=args.heads, window=args.window)
    shards = Shards(args.length)
    alone_steps = args.steps if args.alone_steps is None else args.alone_steps

    def start() -> tuple[ByteModel, torch.optim.Optimizer]:
        torch.manual_seed(args.seed)
        model = build_model(config).to(DTYPES[args.dtype])
        return model, torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    model, optimizer = start()
    shards.shard(model)
    alone, alone_optimizer = start()
    if shards.rank == 0:
        print(f"{args.length} bytes over {len(shards.lengths)} processes: {shards.lengths}")
        print("step    loss       alone      difference  seconds  sent by rank 0 (MiB)")
    largest = 0.0
    for step in range(args.steps):
        text = (corpus.train, args.length, args.batch, step, args.seed)
        inputs, targets = training_batch(*text)
        began = time.perf_counter()
        with count_traffic() as traffic:
            loss = update(optimizer, shards.loss(model, inputs, targets), over_ranks=True)
        seconds = time.perf_counter() - began
        if shards.rank == 0:
            columns = " " * 23
            if step < alone_steps:
                whole = summed(alone(inputs), targets) / targets.numel()
                exact = update(alone_optimizer, whole, over_ranks=False)
                largest = max(largest, abs(loss - exact))
                columns = f"{exact:<11.7f}{abs(loss - exact):<12.1e}"
            sent = (traffic.forward + traffic.backward) / 2**20
            print(f"{step:<8}{loss:<11.7f}{columns}{seconds:<9.2f}{sent:.2f}", flush=True)
    return largest


def main() -> int:
    args = make_parser().parse_args()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group("gloo")
    try:
        largest = train(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    tolerance = 1e-10 if args.dtype == "float64" else 1e-4
    if largest > tolerance:
        print(f"error: the losses differ by {largest:.1e}", file=sys.stderr)
    return int(largest > tolerance)


if __name__ == "__main__":
    sys.exit(main())
