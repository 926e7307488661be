"""A window over a sharded sequence: halos, or all keys.

On the ranks of a gloo group, the forward pass of the same attention, by

    halo        sparse_attn.distributed.context_parallel_attention
    all_gather  all keys and values gathered, then the rank's rows (torch's context parallelism)
    ring        keys and values sent around, a part of the rows' keys at a time, merged

with bytes received by a rank, as counted, and milliseconds of the slowest rank (least of the
rounds). All three use the same kernels: what differs is what is sent, and that the last two visit
the keys of other ranks where the window has them. Ranks on one machine talk through its memory.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --lengths 16384 65536
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn import Window, merge
from sparse_attn.distributed import context_parallel_attention, count_traffic
from sparse_attn.distributed.shards import part_words


class Peers:
    """The three ways, for a rank's shard; `received` has the bytes of the last call."""

    def __init__(self, pattern: Window, length: int, heads: int, head_dim: int) -> None:
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.pattern, self.length, self.shard = pattern, length, length // self.ranks
        generator = torch.Generator().manual_seed(self.rank)
        shape = (1, heads, self.shard, head_dim)
        self.tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
        self.received = 0

    def halo(self) -> Tensor:
        with count_traffic() as traffic:
            lengths = [self.shard] * self.ranks
            output = context_parallel_attention(*self.tensors, self.pattern, lengths=lengths)
        sent = torch.tensor(traffic.forward)
        dist.all_reduce(sent, dist.ReduceOp.MAX)  # what the busiest one sends, it receives
        self.received = sent.item()
        return output

    def all_gather(self) -> Tensor:
        query, *own = self.tensors
        gathered = []
        for tensor in own:
            parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
            dist.all_gather(parts, tensor)
            gathered.append(torch.cat(parts, 2))
        self.received = sum(part.nbytes for part in own) * (self.ranks - 1)
        return self._attend(query, *gathered, 0, self.length)[0]

    def ring(self) -> Tensor:
        query, *held = self.tensors
        before, after = (self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks
        self.received, results = 0, None
        for step in range(self.ranks):
            owner = (self.rank - step) % self.ranks
            coming, works = [torch.empty_like(part) for part in held], []
            if step < self.ranks - 1:
                sends = [dist.P2POp(dist.isend, part, after, tag=i) for i, part in enumerate(held)]
                waits = [
                    dist.P2POp(dist.irecv, part, before, tag=i) for i, part in enumerate(coming)
                ]
                works = dist.batch_isend_irecv(sends + waits)
                self.received += sum(part.nbytes for part in coming)
            found = self._attend(query, *held, owner * self.shard, (owner + 1) * self.shard)
            results = found if results is None else merge(*results, *found)
            for work in works:
                work.wait()
            held = coming
        return results[0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int):
        """The rank's rows over the keys of some tokens."""
        rows = (self.rank * self.shard, (self.rank + 1) * self.shard)
        sizes = (self.length, self.length)
        words = part_words(self.pattern, sizes, [rows], [(0, start, stop)])
        return torch.ops.sparse_attn.attention(query, key, value, words)


def slowest(call: Callable[[], Tensor]) -> float:
    """Seconds of a call on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def measure(peers: Peers, rounds: int) -> list[dict]:
    """A row for each way, which must agree."""
    ways = {"halo": peers.halo, "all_gather": peers.all_gather, "ring": peers.ring}
    exact = peers.all_gather()
    for name, call in ways.items():
        torch.testing.assert_close(call(), exact, msg=lambda text, name=name: f"{name}: {text}")
    times = {name: [slowest(call) for _ in range(rounds)] for name, call in ways.items()}
    rows = []
    for name, call in ways.items():
        call()
        received = {"received_bytes": peers.received, "milliseconds": 1e3 * min(times[name])}
        sizes = {"length": peers.length, "ranks": peers.ranks, "pattern": repr(peers.pattern)}
        rows.append({"way": name, **sizes, **received})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--window", type=int, default=256, help="keys on each side")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = []
    for length in args.lengths:
        peers = Peers(Window(args.window), length, args.heads, args.head_dim)
        rows += measure(peers, args.rounds)
    if dist.get_rank() == 0:
        for row in rows:
            mebibytes = row["received_bytes"] / 2**20
            print(
                f"{row['length']:>8} tokens, {row['ranks']} ranks, {row['way']:<10} "
                f"{mebibytes:>9.2f} MiB {row['milliseconds']:>9.1f} ms"
            )
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
